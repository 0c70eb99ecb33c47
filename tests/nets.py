"""Networks for tests: torchvision families with calibrated statistics, and small ones for single questions."""

from __future__ import annotations

from collections.abc import Iterator

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


def family(name: str, size: int = 64, seed: int = 0, *, conditioned: bool = False) -> nn.Module:
    """A torchvision classifier with random weights, random affine batch norms and calibrated statistics.

    Random weights make deep networks chaotic: ResNeXt-50 blows float32's rounding up to 4e-5 of its own answer.
    conditioned: as training leaves them, most units active and residual branches small against the stream, so that
    the network's own rounding stays below 5e-6 and differences of 1e-5 mean something.
    """
    import torchvision

    torch.manual_seed(seed)
    extra = (
        {"init_weights": False, "transform_input": True, "aux_logits": False} if name == "googlenet" else {}
    )
    module = torchvision.models.get_model(name, weights=None, num_classes=10, **extra)
    return calibrated(module, (3, size, size), conditioned=conditioned)


def calibrated(module: nn.Module, shape: tuple[int, ...], *, conditioned: bool = False) -> nn.Module:
    """The module in evaluation mode, its batch norms random and their statistics those of a random batch."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 1.0 if conditioned else 0.0, 0.2)
    for layer in _ends_of_branches(module) if conditioned else ():
        nn.init.uniform_(layer.weight, 0.1, 0.4)
    with torch.no_grad():
        module.train()
        module(torch.randn(8, *shape))
    return module.eval()


def without_eps(module: nn.Module) -> nn.Module:
    """The module with every batch norm's eps moved into its variance, in place: the same function, and a merge that
    leaves eps behind, like zennit's, leaves nothing."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var += layer.eps
            layer.eps = 0.0
    return module


def _ends_of_branches(module: nn.Module) -> Iterator[nn.BatchNorm2d]:
    """The last batch norm of every residual branch of torchvision's networks."""
    last = {
        "BasicBlock": "bn2",
        "Bottleneck": "bn3",
        "InvertedResidual": "conv.3",
        "_InvertedResidual": "layers.7",
    }
    for layer in module.modules():
        path = last.get(type(layer).__name__)
        if path is not None and getattr(layer, "use_res_connect", True):
            found = layer.get_submodule(path)
            assert isinstance(found, nn.BatchNorm2d)
            yield found


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
