"""The built-in network: a small residual network with batch normalization, and its trained weights.

The network expects normalized input, as networks trained on photographs do: pixel values in 0..1,
minus `MEAN`, divided by `STD`, per channel. The normalization is not a part of the network, so that
its first convolution is an ordinary first layer.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from models.zoo.objects import CLASSES, SIZE

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
INPUT_SHAPE = (3, SIZE, SIZE)

STEM_WIDTH = 16
STAGES = ((24, 1), (48, 1), (96, 2))  # (channels, blocks); each stage halves height and width

FOLDER = Path(__file__).parent / "weights"
WEIGHTS_FILE = FOLDER / "builtin.safetensors"
CARD_FILE = FOLDER / "builtin.json"


class BasicBlock(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(
                nn.AvgPool2d(stride),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + self.downsample(x)
        activated: Tensor = self.relu2(out)
        return activated


class BuiltinNetwork(nn.Module):
    """One convolution, three stages of residual blocks, a global average and one linear layer."""

    def __init__(self, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.conv1 = _convolution(INPUT_SHAPE[0], STEM_WIDTH, stride=2)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.relu = nn.ReLU()
        widths = (STEM_WIDTH, *(width for width, _ in STAGES))
        self.layer1, self.layer2, self.layer3 = (
            _stage(before, width, blocks) for before, (width, blocks) in zip(widths, STAGES, strict=False)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    """A convolution that divides height and width by its stride, and reads every pixel equally often.

    A kernel that is no multiple of the stride (3 for 2) reads every second pixel twice as often, which shows as a
    grid in every heatmap; so does a shortcut that skips pixels, hence the average pool there.
    """
    return nn.Conv2d(inputs, outputs, 3 if stride == 1 else 2 * stride, stride, padding=1, bias=False)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride=2)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)))


def normalize(images: NDArray[np.uint8]) -> Tensor:
    """Images (N x H x W x 3, eight bits) as network input (N x 3 x H x W)."""
    return normalize_tensor(torch.from_numpy(images).permute(0, 3, 1, 2))


def normalize_tensor(images: Tensor) -> Tensor:
    """The same for a tensor of eight-bit values with the channels first."""
    mean = torch.tensor(MEAN, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(STD, device=images.device).view(1, -1, 1, 1)
    return (images.float() / 255.0 - mean) / std


def load_builtin(weights: Path = WEIGHTS_FILE) -> BuiltinNetwork:
    """The trained network in evaluation mode."""
    network = BuiltinNetwork()
    network.load_state_dict(load_file(weights))
    return network.eval()


def read_card(card: Path = CARD_FILE) -> dict[str, Any]:
    """What is known of the trained network: classes, input, training settings, measured accuracy."""
    contents: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))
    return contents
