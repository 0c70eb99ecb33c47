"""Whole samples: the object of one class, its mask, and everything around it, from `(seed, index)`."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from models.zoo.objects.geometry import Canvas, Patch, Pose, fit, place, rasterize
from models.zoo.objects.scene import background, distractors
from models.zoo.objects.shapes import OBJECTS
from models.zoo.objects.surfaces import paint_over

CLASSES: tuple[str, ...] = tuple(OBJECTS)
SIZE = 128
RADIUS = (27.0, 46.0)  # pixels, of the circle around an object
ASPECT = (0.87, 1.15)
SENSOR_NOISE = (0.004, 0.02)


class Stream(IntEnum):
    """Independent random streams of one sample, so that one part can change while others stay."""

    CLASS = 0
    OBJECT = 1
    SCENE = 2
    SURFACE = 3


@dataclass(frozen=True)
class Sample:
    """An image with its ground truth."""

    image: NDArray[np.uint8]  # H x W x 3
    label: int
    mask: NDArray[np.bool_]  # H x W: the pixels at least half covered by the object


def generate(seed: int, index: int, scene_seed: int | None = None) -> Sample:
    """Sample number `index` of the data set `seed`.

    `scene_seed` draws another background, other distractors, colours and textures for the very same
    object in the very same place.
    """
    scene = seed if scene_seed is None else scene_seed
    label = class_of(seed, index)
    patch = _object(_stream(seed, index, Stream.OBJECT), label)
    image = _picture(_stream(scene, index, Stream.SCENE), _stream(scene, index, Stream.SURFACE), patch)
    mask = np.zeros((SIZE, SIZE), dtype=np.bool_)
    mask[patch.window] = patch.coverage >= 0.5
    return Sample(image, label, mask)


def batch(
    seed: int, indices: Iterable[int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Images (N x H x W x 3), labels (N) and masks (N x H x W) of the given samples."""
    samples = [generate(seed, index) for index in indices]
    if not samples:
        return (
            np.empty((0, SIZE, SIZE, 3), np.uint8),
            np.empty(0, np.int64),
            np.empty((0, SIZE, SIZE), np.bool_),
        )
    return (
        np.stack([sample.image for sample in samples]),
        np.array([sample.label for sample in samples], dtype=np.int64),
        np.stack([sample.mask for sample in samples]),
    )


def class_of(seed: int, index: int) -> int:
    """Every run of ten samples holds each class once, in an order drawn anew for each run."""
    run, position = divmod(index, len(CLASSES))
    return int(_stream(seed, run, Stream.CLASS).permutation(len(CLASSES))[position])


def _stream(seed: int, index: int, stream: Stream) -> np.random.Generator:
    return np.random.default_rng((seed, index, int(stream)))


def _object(rng: np.random.Generator, label: int) -> Patch:
    outline = fit(OBJECTS[CLASSES[label]](rng))
    radius = rng.uniform(*RADIUS)
    # The aspect may stretch the object by a few per cent; it stays inside the image all the same.
    reach = radius * float(np.sqrt(max(*ASPECT))) + 1.0
    x, y = rng.uniform(reach, SIZE - reach, 2)
    pose = Pose(float(x), float(y), radius, rng.uniform(0.0, 2.0 * np.pi), rng.uniform(*ASPECT))
    return rasterize(place(outline, pose), SIZE)


def _picture(scene: np.random.Generator, surface: np.random.Generator, patch: Patch) -> NDArray[np.uint8]:
    light = scene.uniform(0.0, 2.0 * np.pi)
    behind = paint_over(background(scene, SIZE), distractors(scene, SIZE), scene, light)
    return _exposed(scene, paint_over(behind, (patch,), surface, light))


def _exposed(rng: np.random.Generator, canvas: Canvas) -> NDArray[np.uint8]:
    """The canvas as a camera would store it: a little sensor noise, eight bits."""
    grain = rng.standard_normal(canvas.shape[1:], dtype=np.float32) * np.float32(rng.uniform(*SENSOR_NOISE))
    levels = np.asarray(np.clip(canvas + grain, 0.0, 1.0) * np.float32(255) + np.float32(0.5), dtype=np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))
