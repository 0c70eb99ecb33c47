"""Small networks for the tests of the readers."""

from pathlib import Path

import torch
from torch import Tensor, nn


def calibrate(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random but sane batch-normalization statistics, so that a lost or doubled one shows."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            if layer.affine:
                layer.weight.data.uniform_(0.5, 1.5, generator=generator)
                layer.bias.data.normal_(0, 0.1, generator=generator)
    return module.eval()


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(self.bn(self.conv(x)))


class Small(nn.Module):
    """A residual network on small images, with branches and shape arithmetic in its forward."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = x.mean([2, 3]).view(x.size(0), -1)
        return self.fc(self.drop(x))


def small(channels: int = 3, classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return calibrate(Small(channels, classes))


def traced(module: nn.Module, path: Path, size: int = 16, channels: int = 3, **options: object) -> Path:
    dtype = next(module.parameters()).dtype
    script = torch.jit.trace(module, torch.randn(2, channels, size, size, dtype=dtype))
    torch.jit.save(script, str(path), **options)
    return path


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module), str(path))
    return path
