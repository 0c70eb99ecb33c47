"""Train the built-in network on generated images and write its weights: `python -m models.zoo.train`."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.zoo.dataset import Dataset, generate_dataset
from models.zoo.evaluate import Accuracy, measure
from models.zoo.network import FOLDER, INPUT_SHAPE, MEAN, STD, BuiltinNetwork, normalize_tensor
from models.zoo.objects import CLASSES
from models.zoo.seeds import Seed

CHANNEL_ORDERS = tuple(permutations(range(3)))


@dataclass(frozen=True)
class Settings:
    """Everything that determines a training run."""

    images: int = 20_000
    epochs: int = 8
    batch_size: int = 128
    peak_learning_rate: float = 4e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    contrast: float = 0.25  # largest relative change of contrast
    brightness: float = 0.4  # largest shift, in units of normalized input
    seed: int = int(Seed.TRAINING)
    evaluation_images: int = 5_000
    evaluation_seed: int = int(Seed.EVALUATION)


def batches(data: Dataset, settings: Settings, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of augmented batches in random order. A last incomplete batch is left out."""
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    order = torch.randperm(len(labels), generator=rng)
    for start in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
        chosen = order[start : start + settings.batch_size]
        yield augment(images[chosen].permute(0, 3, 1, 2), settings, rng), labels[chosen]


def augment(images: Tensor, settings: Settings, rng: torch.Generator) -> Tensor:
    """Eight-bit images (N x 3 x H x W) as randomly changed network input.

    Quarter turns, mirror images and swapped colour channels are drawn per batch, where they cost
    nothing; contrast and brightness are drawn per image. No class depends on any of these.
    """
    turns, mirrored, order = (
        int(torch.randint(top, (), generator=rng)) for top in (4, 2, len(CHANNEL_ORDERS))
    )
    turned = torch.rot90(images, turns, (2, 3))
    flipped = turned.flip(3) if mirrored else turned
    x = normalize_tensor(flipped[:, list(CHANNEL_ORDERS[order])])
    draw = torch.rand(2, len(x), 1, 1, 1, generator=rng) * 2.0 - 1.0
    return x * (1.0 + settings.contrast * draw[0]) + settings.brightness * draw[1]


def train(data: Dataset, settings: Settings, device: torch.device) -> BuiltinNetwork:
    """A network trained from scratch."""
    torch.manual_seed(settings.seed)
    rng = torch.Generator().manual_seed(settings.seed)
    # With the channels last, and in 16 bits, a step takes a fraction of the time on a CPU.
    network = BuiltinNetwork().to(device)
    network.to(memory_format=torch.channels_last)
    loss_function = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    steps = len(data.labels) // settings.batch_size
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.peak_learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.peak_learning_rate, epochs=settings.epochs, steps_per_epoch=steps, pct_start=0.2
    )
    for epoch in range(settings.epochs):
        started, loss_sum, right = time.perf_counter(), 0.0, 0
        network.train()
        for images, labels in batches(data, settings, rng):
            images = images.to(device=device, memory_format=torch.channels_last)
            labels = labels.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = network(images)
            loss = loss_function(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += float(loss.detach())
            right += int((logits.argmax(dim=1) == labels).sum())
        seconds = time.perf_counter() - started
        print(
            f"epoch {epoch + 1:2}/{settings.epochs}: loss {loss_sum / steps:.4f}, "
            f"training accuracy {right / (steps * settings.batch_size):.2%}, {seconds:.0f} s",
            flush=True,
        )
    network.to(memory_format=torch.contiguous_format)
    return network.eval()


def card(network: nn.Module, settings: Settings, accuracy: Accuracy, seconds: float) -> dict[str, Any]:
    """What a user of the weights has to know."""
    return {
        "name": "builtin",
        "classes": list(CLASSES),
        "input_shape": list(INPUT_SHAPE),
        "mean": list(MEAN),
        "std": list(STD),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "training": {
            **asdict(settings),
            "optimizer": "AdamW, one cycle",
            "seconds": round(seconds),
            "torch": torch.__version__,
        },
        "evaluation": {"seed": settings.evaluation_seed, **asdict(accuracy)},
    }


def write(network: nn.Module, contents: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # Bytes written here get ordinary file permissions; safetensors would make the file private.
    (folder / "builtin.safetensors").write_bytes(save(tensors))
    (folder / "builtin.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _show(done: int, total: int) -> None:
    if done % 5_000 == 0 or done == total:
        print(f"generated {done} of {total} images", flush=True)


def _arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(description="Train the built-in network on generated images.")
    parser.add_argument(
        "--images", type=int, default=defaults.images, help="training images (default %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="default %(default)s")
    parser.add_argument("--evaluation-images", type=int, default=defaults.evaluation_images)
    parser.add_argument("--workers", type=int, default=2, help="processes that generate images")
    parser.add_argument("--threads", type=int, default=2, help="threads that train")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write (default: the package)")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        images=arguments.images, epochs=arguments.epochs, evaluation_images=arguments.evaluation_images
    )
    data = generate_dataset(settings.seed, settings.images, arguments.workers, _show)
    started = time.perf_counter()
    network = train(data, settings, torch.device(arguments.device))
    seconds = time.perf_counter() - started
    unseen = generate_dataset(settings.evaluation_seed, settings.evaluation_images, arguments.workers)
    accuracy = measure(network, unseen)
    write(network, card(network, settings, accuracy, seconds), arguments.folder)
    print(f"trained for {seconds:.0f} s; {accuracy.accuracy:.2%} of {accuracy.images} unseen images right")
    print(json.dumps(accuracy.confusion))


if __name__ == "__main__":
    main()
