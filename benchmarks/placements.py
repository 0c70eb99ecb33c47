"""Small networks that differ in where their batch norms stand, trained the same way from the same seed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.datasets import Images, Name

Norm = Literal["none", "before", "behind"]


@dataclass(frozen=True)
class Placement:
    """Where batch norms stand. widths: of the convolutions, each with a ReLU and a pool. hidden: of the linear layers
    between them and the scores. convolution, linear: whether a batch norm stands before or behind the ReLUs there."""

    name: str
    dataset: Name
    widths: tuple[int, ...]
    hidden: tuple[int, ...]
    convolution: Norm = "none"
    linear: Norm = "none"

    @property
    def normalizes(self) -> bool:
        return self.convolution != "none" or self.linear != "none"


@dataclass(frozen=True)
class Training:
    """Everything that determines a training run."""

    images: int
    epochs: int
    batch: int = 100
    peak_learning_rate: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0


_CONVOLUTIONAL: dict[Name, dict[str, tuple[int, ...]]] = {
    "mnist": {"widths": (16, 32), "hidden": (128,)},
    "cifar10": {"widths": (24, 48, 64), "hidden": (128,)},
}
_WHERE: tuple[tuple[str, Norm, Norm], ...] = (
    ("no batch norm", "none", "none"),
    ("conv, before ReLU", "before", "none"),
    ("conv, behind ReLU", "behind", "none"),
    ("linear, before ReLU", "none", "before"),
    ("linear, behind ReLU", "none", "behind"),
)
_WHERE_LINEAR: tuple[tuple[str, Norm], ...] = (
    ("no batch norm", "none"),
    ("before ReLU", "before"),
    ("behind ReLU", "behind"),
)
PLACEMENTS = (
    *(
        Placement(f"{dataset}: {name}", dataset, **sizes, convolution=convolution, linear=linear)
        for dataset, sizes in _CONVOLUTIONAL.items()
        for name, convolution, linear in _WHERE
    ),
    *(
        Placement(f"mnist: all-linear, {name}", "mnist", (), (256, 256), linear=linear)
        for name, linear in _WHERE_LINEAR
    ),
)
TRAINING: dict[Name, Training] = {
    "mnist": Training(images=20_000, epochs=3),
    "cifar10": Training(images=20_000, epochs=5),
}


def _block(layer: nn.Module, norm: nn.Module, where: Norm, *rest: nn.Module) -> nn.Sequential:
    chain = {"none": (nn.ReLU(),), "before": (norm, nn.ReLU()), "behind": (nn.ReLU(), norm)}[where]
    return nn.Sequential(layer, *chain, *rest)


def build(placement: Placement, shape: Sequence[int], classes: int = 10) -> nn.Module:
    """The network for images [C, H, W], with random weights."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for outputs in placement.widths:
        conv = nn.Conv2d(channels, outputs, 3, padding=1)
        layers.append(_block(conv, nn.BatchNorm2d(outputs), placement.convolution, nn.MaxPool2d(2)))
        channels, height, width = outputs, height // 2, width // 2
    layers.append(nn.Flatten())
    features = channels * height * width
    for outputs in placement.hidden:
        layers.append(_block(nn.Linear(features, outputs), nn.BatchNorm1d(outputs), placement.linear))
        features = outputs
    return nn.Sequential(*layers, nn.Linear(features, classes))


def train(placement: Placement, images: Images, training: Training) -> nn.Module:
    """The network trained from scratch, in evaluation mode."""
    torch.manual_seed(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    x, y = images.train_x[: training.images], images.train_y[: training.images]
    network = build(placement, x.shape[1:]).train()
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        network.parameters(), training.peak_learning_rate, weight_decay=training.weight_decay
    )
    steps = len(x) // training.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.peak_learning_rate, epochs=training.epochs, steps_per_epoch=steps
    )
    for _ in range(training.epochs):
        order = torch.randperm(len(x), generator=generator)
        for chosen in order[: steps * training.batch].reshape(steps, training.batch):
            part = images.normalized(x[chosen])
            if float(torch.rand((), generator=generator)) < 0.5 and placement.dataset == "cifar10":
                part = part.flip(3)
            # In 16 bits and with the channels last a step takes half the time on a CPU.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = network(part.to(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(scores.float(), y[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.to(memory_format=torch.contiguous_format)
    return network.eval()


@dataclass(frozen=True)
class Trained:
    """A trained network, and the seconds that training took (0 where the weights were there)."""

    network: nn.Module
    seconds: float


def trained(placement: Placement, images: Images, training: Training, folder: Path) -> Trained:
    """The network from the weights in a folder, or trained and written there. Weights that were trained with other
    settings, or for another placement, are replaced."""
    name = placement.name.replace(": ", "-").replace(", ", "-").replace(" ", "_")
    path = folder / f"{name}-{training.seed}.safetensors"
    settings = json.dumps({**asdict(placement), **asdict(training)}, sort_keys=True)
    shape = images.train_x.shape[1:]
    if path.is_file():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("settings") == settings:
                network = build(placement, shape)
                network.load_state_dict(load_file(path))
                return Trained(network.eval(), 0.0)
    started = time.perf_counter()
    network = train(placement, images, training)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        path,
        {"settings": settings},
    )
    return Trained(network, time.perf_counter() - started)


@torch.no_grad()
def accuracy(network: nn.Module, images: Images, batch: int = 500) -> float:
    """The share of all test images that the network names rightly."""
    hits = sum(
        int((network(images.normalized(x)).argmax(1) == y).sum())
        for x, y in zip(torch.split(images.test_x, batch), torch.split(images.test_y, batch), strict=True)
    )
    return hits / len(images.test_y)


def unseen(network: nn.Module, images: Images, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` test images that the network names rightly: input [N, C, H, W], pixels [N, C, H, W], class."""
    x = images.normalized(images.test_x[: 4 * count])
    with torch.no_grad():
        right = torch.cat([network(part).argmax(1) for part in torch.split(x, 500)])
    chosen = (right == images.test_y[: 4 * count]).nonzero()[:count, 0]
    return x[chosen], images.test_x[chosen], images.test_y[chosen]
