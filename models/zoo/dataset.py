"""Large generated data sets, made by worker processes."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from models.zoo.objects import SIZE, batch

CHUNK = 250  # images per task: some 12 MB to send back

Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class Dataset:
    """Generated images with their labels."""

    images: NDArray[np.uint8]  # N x H x W x 3
    labels: NDArray[np.int64]


def generate_dataset(seed: int, count: int, workers: int, progress: Progress | None = None) -> Dataset:
    """The first `count` images of the data set `seed`; the result does not depend on `workers`."""
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    spans = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    # Spawned, since forking a process that runs numeric threads may lock up.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        parts = pool.map(_part, repeat(seed), spans)
        for (start, stop), (part_images, part_labels) in zip(spans, parts, strict=True):
            images[start:stop], labels[start:stop] = part_images, part_labels
            if progress is not None:
                progress(stop, count)
    return Dataset(images, labels)


def _part(seed: int, span: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels, _ = batch(seed, range(*span))
    return images, labels
