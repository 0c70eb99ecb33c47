"""MNIST and CIFAR-10 from a folder of files, as tensors."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"
Name = Literal["mnist", "cifar10"]


@dataclass(frozen=True)
class Images:
    """Eight-bit images [N, C, H, W] with class indices [N], and how a network gets to see them."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalized(self, images: Tensor) -> Tensor:
        """(value / 255 - mean) / std per channel, float32."""
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


def _mnist(folder: Path) -> Images:
    with np.load(folder / "mnist.npz") as arrays:
        parts = [torch.from_numpy(arrays[name]) for name in ("x_train", "y_train", "x_test", "y_test")]
    train_x, train_y, test_x, test_y = parts
    return Images(
        train_x[:, None], train_y.long(), test_x[:, None], test_y.long(), mean=(0.1307,), std=(0.3081,)
    )


def _cifar10(folder: Path) -> Images:
    """The images as JPEG files train/CLASS/*.jpg and test/CLASS/*.jpg, classes in alphabetical order. They are lossy,
    so accuracies are some points below those on the original."""
    found: dict[str, list[tuple[str, Tensor]]] = {"train": [], "test": []}
    with tarfile.open(folder / "cifar10_jpeg.tar.xz") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and member.name.endswith(".jpg"):
                split, label = member.name.split("/")[-3:-1]
                pixels = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB"))
                found[split].append((label, torch.from_numpy(pixels.copy()).permute(2, 0, 1)))
    classes = sorted({label for label, _ in found["train"]})
    x = {split: torch.stack([pixels for _, pixels in items]) for split, items in found.items()}
    y = {split: torch.tensor([classes.index(label) for label, _ in items]) for split, items in found.items()}
    return Images(
        x["train"],
        y["train"],
        x["test"],
        y["test"],
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.2435, 0.2616),
    )


READERS: dict[Name, tuple[str, Callable[[Path], Images]]] = {
    "mnist": ("mnist.npz", _mnist),
    "cifar10": ("cifar10_jpeg.tar.xz", _cifar10),
}


def load(name: Name, folder: Path = FOLDER) -> Images | None:
    """A data set in an order drawn once (its files may be sorted by class), or None where its file is not there."""
    file, read = READERS[name]
    if not (folder / file).is_file():
        return None
    images = read(folder)
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randperm(len(y), generator=generator) for y in (images.train_y, images.test_y))
    return Images(
        images.train_x[train], images.train_y[train], images.test_x[test], images.test_y[test],
        images.mean, images.std,
    )  # fmt: skip
