"""Small networks, one for each normalizer of the literature, and what is expected to become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.networks import randomize
from fusion.report import Outcome
from tests.normalizers import layers

CLASSES, CHANNELS, SIZE = 5, 8, 12
SHAPE = (3, SIZE, SIZE)

Layer = Callable[[int], nn.Module]
Conv = Callable[..., nn.Module]


@dataclass(frozen=True)
class Normalizer:
    """A normalizer, a network that uses it, and what fusion must make of it.

    report: (operator, outcome) of every row of the fusion report, in order; a normalizer of weights, or one that is an
    activation, has none. foldable and rule: what the table says of it. refused: what explaining it says instead.
    """

    name: str
    build: Callable[[], nn.Module]
    report: tuple[tuple[str, Outcome], ...]
    foldable: str
    rule: str
    refused: str = ""


class Images(nn.Module):
    """conv, norm, activation, strided conv, norm, activation, mean over space, classes."""

    def __init__(
        self,
        norm: Layer = lambda channels: nn.Identity(),
        conv: Conv = nn.Conv2d,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.norm1, self.act1 = norm(CHANNELS), activation()
        self.conv = conv(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        self.norm2, self.act2 = norm(CHANNELS), activation()
        self.fc = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.stem(x)))
        x = self.act2(self.norm2(self.conv(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """Patches as tokens; a normalized perceptron beside the stream; a norm, the mean over tokens, classes."""

    def __init__(self, norm: Layer) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, CHANNELS, 4, stride=4)
        self.norm1, self.norm2 = norm(CHANNELS), norm(CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.down(torch.relu(self.up(self.norm1(x))))
        return self.head(self.norm2(x).mean(1))  # type: ignore[no-any-return]


class Vectors(nn.Module):
    """The image as a vector, through fully connected layers."""

    def __init__(self, linear: Callable[[int, int], nn.Module], activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), linear(3 * SIZE * SIZE, 16), activation(), nn.AlphaDropout(0.1),
            linear(16, 16), activation(), linear(16, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def _adder(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> nn.Module:
    return layers.AdderConv(inputs, outputs, kernel, stride, padding)


def _weight_norm(*args: int, **kwargs: int) -> nn.Module:
    conv = parametrizations.weight_norm(nn.Conv2d(*args, **kwargs))  # type: ignore[arg-type]
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(torch.rand(args[1], 1, 1, 1) + 0.5)
    return conv


def _old_weight_norm(*args: int, **kwargs: int) -> nn.Module:
    return torch.nn.utils.weight_norm(nn.Conv2d(*args, **kwargs))  # type: ignore[arg-type]


def _spectral_norm(*args: int, **kwargs: int) -> nn.Module:
    return parametrizations.spectral_norm(nn.Conv2d(*args, **kwargs))  # type: ignore[arg-type]


def _frozen(channels: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(channels)


def _local_response(channels: int) -> nn.Module:
    return nn.LocalResponseNorm(5, alpha=0.3, beta=0.75, k=2.0)


FOLDED: tuple[tuple[str, Outcome], ...] = (("batch_norm", "folded"),) * 2
_WHOLE, _AFFINE, _STAYS, _WEIGHTS = "whole", "affine part", "no", "part of the weights"
_NOTHING, _NORM_RULE = "nothing is left", "LN-rule: deviation held constant"
_DIVISOR = "divisor held constant"


def _twice(op: str, outcome: Outcome) -> tuple[tuple[str, Outcome], ...]:
    return ((op, outcome),) * 2


NORMALIZERS: tuple[Normalizer, ...] = (
    # --- constant coefficients
    Normalizer("BatchNorm", lambda: Images(nn.BatchNorm2d), FOLDED, _WHOLE, _NOTHING),
    Normalizer("SyncBatchNorm", lambda: Images(nn.SyncBatchNorm), FOLDED, _WHOLE, _NOTHING),
    Normalizer("FrozenBatchNorm", lambda: Images(_frozen), FOLDED, _WHOLE, _NOTHING),
    Normalizer(
        "GhostBatchNorm", lambda: Images(lambda c: layers.GhostBatchNorm(c, 4)), FOLDED, _WHOLE, _NOTHING
    ),
    Normalizer(
        "BatchNorm, track_running_stats=False",
        lambda: Images(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        _twice("batch_norm", "kept"),
        _STAYS,
        "refused",
        refused="statistics of the batch",
    ),
    Normalizer(
        "InstanceNorm, running statistics",
        lambda: Images(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)),
        _twice("instance_norm", "folded"),
        _WHOLE,
        _NOTHING,
    ),
    Normalizer(
        "Lipschitz-clipped BatchNorm",
        lambda: Images(lambda c: layers.ClippedBatchNorm(c, 0.1)),
        FOLDED,
        _WHOLE,
        _NOTHING,
    ),
    # --- statistics of the input
    Normalizer(
        "LayerNorm",
        lambda: Patches(nn.LayerNorm),
        (("layer_norm", "partly"),) * 2,
        "centering, affine part",
        _NORM_RULE,
    ),
    Normalizer(
        "LayerNorm over channels",
        lambda: Images(layers.ChannelLayerNorm),
        _twice("layer_norm", "partly"),
        "centering, affine part",
        _NORM_RULE,
    ),
    Normalizer(
        "GroupNorm",
        lambda: Images(lambda c: nn.GroupNorm(4, c)),
        _twice("group_norm", "partly"),
        _AFFINE,
        _NORM_RULE,
    ),
    Normalizer(
        "InstanceNorm",
        lambda: Images(lambda c: nn.InstanceNorm2d(c, affine=True)),
        _twice("instance_norm", "partly"),
        _AFFINE,
        _NORM_RULE,
    ),
    Normalizer("RMSNorm", lambda: Patches(nn.RMSNorm), _twice("rms_norm", "partly"), _AFFINE, _NORM_RULE),
    Normalizer(
        "RMSNorm, spelled out",
        lambda: Patches(layers.RootMeanSquareNorm),
        _twice("rms_norm", "partly"),
        _AFFINE,
        _NORM_RULE,
    ),
    Normalizer(
        "Filter Response Norm",
        lambda: Images(layers.FilterResponseNorm, activation=nn.Identity),
        _twice("rms_norm", "partly"),
        _AFFINE,
        _NORM_RULE,
    ),
    Normalizer(
        "Variance normalization",
        lambda: Images(layers.VarianceNorm),
        _twice("variance_norm", "partly"),
        _AFFINE,
        _DIVISOR,
    ),
    Normalizer(
        "Local response normalization",
        lambda: Images(_local_response),
        _twice("local_response_norm", "kept"),
        _STAYS,
        _DIVISOR,
    ),
    Normalizer(
        "AdaNorm",
        lambda: Patches(lambda c: layers.AdaNorm()),
        _twice("ada_norm", "partly"),
        "constant factor",
        _DIVISOR,
    ),
    Normalizer(
        "Mixture Normalization",
        lambda: Images(lambda c: layers.MixtureNorm(c, 3)),
        _twice("mixture_norm", "partly"),
        _AFFINE,
        "responsibilities held constant",
    ),
    Normalizer(
        "EvoNorm-S0",
        lambda: Images(lambda c: layers.EvoNormS0(c, 4), activation=nn.Identity),
        _twice("variance_norm", "partly"),
        _AFFINE,
        _DIVISOR,
    ),
    # --- weights
    Normalizer("Weight normalization", lambda: Images(conv=_weight_norm), (), _WEIGHTS, _NOTHING),
    Normalizer("Weight normalization, hook", lambda: Images(conv=_old_weight_norm), (), _WEIGHTS, _NOTHING),
    Normalizer(
        "Weight standardization",
        lambda: Images(nn.BatchNorm2d, layers.StandardizedConv),
        FOLDED,
        _WEIGHTS,
        _NOTHING,
    ),
    Normalizer(
        "Scaled weight standardization",
        lambda: Images(conv=layers.ScaledStandardizedConv),
        (),
        _WEIGHTS,
        _NOTHING,
    ),
    Normalizer("Spectral normalization", lambda: Images(conv=_spectral_norm), (), _WEIGHTS, _NOTHING),
    Normalizer("Self-normalizing (SELU)", lambda: Vectors(nn.Linear, nn.SELU), (), "an activation", "f(x)/x"),
    Normalizer(
        "DropConnect with weight normalization",
        lambda: Vectors(layers.WeightNormDropConnect, nn.ReLU),
        (),
        _WEIGHTS,
        _NOTHING,
    ),
    Normalizer("Binary weights", lambda: Images(nn.BatchNorm2d, layers.BinaryConv), FOLDED, _WHOLE, _NOTHING),
    # --- activations and other layers
    Normalizer("DyT", lambda: Patches(layers.DynamicTanh), (), _AFFINE, "f(x)/x"),
    Normalizer(
        "Centered softplus",
        lambda: Images(nn.BatchNorm2d, activation=layers.CenteredSoftplus),
        FOLDED,
        _WHOLE,
        "f(x)/x, with f(0) = 0",
    ),
    Normalizer(
        "Polynomial activation",
        lambda: Images(nn.BatchNorm2d, activation=layers.Polynomial),
        FOLDED,
        _WHOLE,
        "x^2 as an activation",
    ),
    Normalizer(
        "Focused convolution",
        lambda: Images(nn.BatchNorm2d, layers.FocusedConv),
        FOLDED,
        _WHOLE,
        "mask held constant",
    ),
    Normalizer("AdderNet", lambda: Images(nn.BatchNorm2d, _adder), FOLDED, _WHOLE, "the composite's rule"),
)


def built(normalizer: Normalizer, seed: int = 0) -> nn.Module:
    """The network in evaluation mode and float64, its parameters random, its running statistics near those of its
    inputs, as training leaves them (an AdderNet's sums are far below zero: any others would close every ReLU)."""
    torch.manual_seed(seed)
    module = normalizer.build()
    randomize(module)
    module.eval().double()
    hooks = [
        layer.register_forward_pre_hook(_measure)
        for layer in module.modules()
        if isinstance(getattr(layer, "running_mean", None), Tensor)
    ]
    with torch.no_grad():
        module(images(8, seed=2))
    for hook in hooks:
        hook.remove()
    return module


def _measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    mean, var = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    (x,) = inputs
    own_var, own_mean = torch.var_mean(x, (0, 2, 3))
    copies = len(mean) // len(own_mean)  # a ghost batch norm has several
    mean.copy_(own_mean.repeat(copies) + 0.2 * own_var.sqrt().repeat(copies) * torch.randn_like(mean))
    var.copy_(own_var.repeat(copies) * (torch.rand_like(var) + 0.5))


def images(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
