"""Networks for tests: torchvision families with calibrated statistics, and small ones for single questions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FAMILIES = (
    "vgg11_bn",
    "resnet18",
    "resnext50_32x4d",
    "densenet121",
    "mobilenet_v2",
    "googlenet",
    "squeezenet1_1",
    "mnasnet0_5",
)


def family(name: str, size: int = 64, seed: int = 0) -> nn.Module:
    """A torchvision classifier with random weights, random affine batch norms and calibrated statistics."""
    import torchvision

    torch.manual_seed(seed)
    extra = (
        {"init_weights": False, "transform_input": True, "aux_logits": False} if name == "googlenet" else {}
    )
    module = torchvision.models.get_model(name, weights=None, num_classes=10, **extra)
    return calibrated(module, (3, size, size))


def calibrated(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The module in evaluation mode, its batch norms random and their statistics those of a random batch."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0.0, 0.2)
    with torch.no_grad():
        module.train()
        module(torch.randn(8, *shape))
    return module.eval()


class Bottleneck(nn.Module):
    """A small residual network with every fold in it, for tests that need a quick real network."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.before = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        x = torch.relu(self.conv3(self.before(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def bottleneck() -> nn.Module:
    torch.manual_seed(1)
    return calibrated(Bottleneck(), (3, 16, 16))
