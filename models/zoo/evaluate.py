"""Accuracy of the built-in network on images it has never seen: `python -m models.zoo.evaluate`."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.zoo.dataset import Dataset, generate_dataset
from models.zoo.network import load_builtin, normalize
from models.zoo.objects import CLASSES
from models.zoo.seeds import Seed

BATCH = 200


@dataclass(frozen=True)
class Accuracy:
    """How many of the images a network names rightly."""

    images: int
    accuracy: float
    per_class: dict[str, float]
    confusion: dict[str, int]  # "true class -> named class": how often, mistakes only


def predict(network: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The class index with the largest output for every image (N x H x W x 3)."""
    return np.concatenate([_named(network, part) for part in _parts(images)])


def measure(network: nn.Module, data: Dataset) -> Accuracy:
    named = predict(network, data.images)
    right = named == data.labels
    mistakes = [
        f"{CLASSES[truth]} -> {CLASSES[answer]}"
        for truth, answer in zip(data.labels[~right], named[~right], strict=True)
    ]
    counts = {pair: mistakes.count(pair) for pair in set(mistakes)}
    return Accuracy(
        images=len(right),
        accuracy=float(right.mean()),
        per_class={name: float(right[data.labels == label].mean()) for label, name in enumerate(CLASSES)},
        confusion=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    )


def _parts(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


@torch.inference_mode()
def _named(network: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    device = next(network.parameters()).device
    answer = network(normalize(images).to(device)).argmax(dim=1)
    return np.asarray(answer.cpu().numpy(), dtype=np.int64)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy of the built-in network on unseen images.")
    parser.add_argument("--images", type=int, default=2000, help="number of images (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=int(Seed.EVALUATION), help="data set (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that generate images")
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    result = measure(load_builtin(), generate_dataset(arguments.seed, arguments.images, arguments.workers))
    print(f"{result.images} images of seed {arguments.seed}: {result.accuracy:.2%} right")
    for name, share in result.per_class.items():
        print(f"  {name:10} {share:.2%}")
    for pair, times in result.confusion.items():
        print(f"  {pair}: {times}")
    if arguments.json is not None:
        report = {"seed": arguments.seed, **asdict(result)}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
