"""The architectures that benchmarks run over: torchvision's families and a list of timm's, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# One small member of every torchvision classifier family.
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 "
    "squeezenet1_0 swin_t swin_v2_t vgg11_bn vit_b_16 wide_resnet50_2"
).split()
TIMM_LIST = Path(__file__).resolve().parents[2] / "shared" / "networks" / "timm_architectures.txt"


@dataclass(frozen=True)
class Architecture:
    """A zoo name and the input [C, H, W] that it takes."""

    name: str
    shape: tuple[int, int, int]

    def build(self, seed: int = 0) -> nn.Module:
        """The network with random weights and random normalization parameters, in evaluation mode."""
        torch.manual_seed(seed)
        zoo, _, name = self.name.partition(":")
        if zoo == "torchvision":
            import torchvision

            extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            module: nn.Module = torchvision.models.get_model(name, weights=None, **extra)
        else:
            import timm

            module = timm.create_model(name, pretrained=False)
        randomize(module)
        return module.eval()

    def example(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(batch, *self.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def randomize(module: nn.Module) -> None:
    """Give every normalization statistics and parameters that a fold cannot get right by accident, and a head that is
    not zero."""
    with torch.no_grad():
        for layer in module.modules():
            mean, variance = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                mean.normal_(0.0, 0.1)
                variance.uniform_(0.5, 1.5)
            if "norm" in type(layer).__name__.lower() or mean is not None:
                if isinstance(getattr(layer, "weight", None), Tensor):
                    layer.weight.normal_(1.0, 0.3)  # type: ignore[union-attr,operator]
                if isinstance(getattr(layer, "bias", None), Tensor):
                    layer.bias.normal_(0.0, 0.2)  # type: ignore[union-attr,operator]
            if isinstance(layer, nn.Linear) and not layer.weight.any():
                layer.weight.normal_(0.0, 0.02)


def architectures(timm_list: Path = TIMM_LIST, only: str = "") -> Iterator[Architecture]:
    """All of them, or those whose name contains `only`; timm's where it is installed and its list is there."""
    for name in TORCHVISION:
        size = 299 if name == "inception_v3" else 224
        if only in f"torchvision:{name}":
            yield Architecture(f"torchvision:{name}", (3, size, size))
    if not timm_list.is_file():
        return
    import timm

    for name in timm_list.read_text().split():
        if only not in f"timm:{name}":
            continue
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        shape = config.input_size if config is not None else (3, 224, 224)
        yield Architecture(f"timm:{name}", tuple(shape))
