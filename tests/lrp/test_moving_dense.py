"""Operators that move, repeat, average and choose values, each in a small network, against matrices of shares.

A linear operator y = A x + c hands input i the share x_i A_ik / y_k of what output k receives; A is made column by
column, from the operator's answers to single ones. The constants c keep the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp
from lrp.composites import Composite

F64 = torch.float64
SHAPE = (4, 6, 6)
COUNT = 4 * 6 * 6
LRP0 = Composite("LRP0", convolution=lrp.LRP0(), linear=lrp.LRP0())
Function = Callable[[Tensor], Tensor]


class Through(nn.Module):
    """A convolution, the operator, and a linear layer."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(function(torch.zeros(1, *SHAPE)).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


# --- shares: [N, inputs, outputs], how much of what an output receives goes to an input ------------------------------
def linear_shares(function: Function, x: Tensor) -> Tensor:
    nothing = function(x.new_zeros(1, *SHAPE)).flatten(1)
    matrix = function(torch.eye(COUNT, dtype=x.dtype).reshape(COUNT, *SHAPE)).flatten(1) - nothing
    contributions = x.flatten(1)[:, :, None] * matrix
    total = contributions.sum(1, keepdim=True) + nothing
    return torch.where(contributions == 0, 0.0, contributions / total)


def winners(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """All to the winner, whose place in its channel the operator tells."""
    _, places = function(x, return_indices=True)
    channels, size = x.shape[1], x[0, 0].numel()
    offsets = torch.arange(channels).reshape(1, -1, *[1] * (places.ndim - 2)) * size
    return F.one_hot((places + offsets).flatten(1), COUNT).transpose(1, 2).to(x.dtype)


def by_softmax(x: Tensor) -> Tensor:
    """log sum e^x over the places of a channel: s_i x_i of every input, the entropy of s keeps its part."""
    values = x.flatten(2)
    s = values.exp() / values.exp().sum(2, keepdim=True)
    return per_channel(s * values / values.exp().sum(2, keepdim=True).log())


def by_exponential(r: float, x: Tensor) -> Tensor:
    """log mean e^(r x) / r spelled out: activations pass relevance, the mean divides it as e^(r x_i) is to the sum."""
    powers = (r * x.flatten(2)).exp()
    return per_channel(powers / powers.sum(2, keepdim=True))


def per_channel(shares: Tensor) -> Tensor:
    """Shares [N, C, P] of one output per channel, as [N, C P, C]."""
    own = torch.eye(shares.shape[1], dtype=shares.dtype)
    return (shares[..., None] * own[:, None, :]).flatten(1, 2)


def by_exponential_in_windows(r: float, x: Tensor) -> Tensor:
    return linear_shares(lambda t: F.avg_pool2d(t, 2), (r * x).exp())


MOVING: dict[str, Function] = {
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 3),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "focus": lambda x: torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1),
    "nearest, up": lambda x: F.interpolate(x, scale_factor=2),
    "nearest, uneven": lambda x: F.interpolate(x, size=(4, 9)),
    "nearest-exact": lambda x: F.interpolate(x, size=(4, 9), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, size=(9, 4), mode="bilinear"),
    "bilinear, corners": lambda x: F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=True),
    "bilinear, antialias": lambda x: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True),
    "bicubic": lambda x: F.interpolate(x, size=(9, 4), mode="bicubic"),
    "bicubic, antialias": lambda x: F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True),
    "area": lambda x: F.interpolate(x, size=(3, 4), mode="area"),
    "linear": lambda x: F.interpolate(x.flatten(2), size=20, mode="linear"),
    "trilinear": lambda x: F.interpolate(x[:, None], size=(3, 8, 8), mode="trilinear"),
    "roll": lambda x: x.roll((2, -1), (2, 3)),
    "flip": lambda x: x.flip(2, 3),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "zero pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "constant pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.7),
    "crop by padding": lambda x: F.pad(x, (-1, 0, -2, 1)),
    "reflection pad": lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"),
    "reflection pad, 3d": lambda x: F.pad(x[:, None], (1, 2, 3, 1, 1, 1), mode="reflect"),
    "replication pad": lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate"),
    "replication pad, 3d": lambda x: F.pad(x[:, None], (1, 2, 3, 1, 1, 1), mode="replicate"),
    "circular pad": lambda x: F.pad(x, (1, 2, 3, 1), mode="circular"),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, (4, 1)),
    "adaptive average, 1d": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5),
    "average, ceil": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "slices": lambda x: x[:, 1:, ::2, 1:5],
    "index": lambda x: x[:, [2, 0, 0]],
    "concat": lambda x: torch.cat([x[:, :2].flip(3), x, x[:, 3:]], 1),
    "concat in space": lambda x: torch.cat([x, x[..., ::2]], 3),
    "concat with a constant": lambda x: torch.cat([x, torch.ones_like(x[:, :1])], 1),
    "chunks swapped": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "stack": lambda x: torch.stack([x, x.flip(2)], 1),
    "tile": lambda x: x.tile(1, 1, 2, 1),
    "repeat interleave": lambda x: x.repeat_interleave(2, 1),
    "unfold": lambda x: F.unfold(x, 3, stride=2),
    "unfold and fold": lambda x: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1),
    "lower triangle": lambda x: x.tril(),
}
CHOOSING: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "adaptive maximum": partial(F.adaptive_max_pool2d, output_size=(4, 1)),
    "maximum": partial(F.max_pool2d, kernel_size=3, stride=2, padding=1),
    "maximum, dilated": partial(F.max_pool2d, kernel_size=2, stride=1, padding=1, dilation=2),
}
POOLING: dict[str, tuple[Function, Function]] = {
    "logsumexp": (lambda x: x.logsumexp((2, 3)), by_softmax),
    "log mean exp": (lambda x: (2 * x).exp().mean((2, 3)).log() / 2, partial(by_exponential, 2.0)),
    "log mean exp in windows": (
        lambda x: F.avg_pool2d((3 * x).exp(), 2).log() / 3,
        partial(by_exponential_in_windows, 3.0),
    ),
}
CASES: dict[str, tuple[Function, Function]] = {
    **{name: (function, partial(linear_shares, function)) for name, function in MOVING.items()},
    **{name: (function, partial(winners, function)) for name, function in CHOOSING.items()},
    **POOLING,
}


@pytest.mark.parametrize("composite", ["EpsilonPlus", "EpsilonAlpha2Beta1"])
@pytest.mark.parametrize("name", CASES)
def test_an_operator_hands_on_its_shares(name: str, composite: str) -> None:
    function, shares = CASES[name]
    module, x = Through(function).to(F64).eval(), torch.randn(2, 3, 6, 6, dtype=F64)
    explainer = lrp.Explainer(module, composite=composite, dtype=F64, example=x, device="cpu")
    before_last = explainer.inner_layers()[-2].name  # what the linear layer reads
    answer = explainer.explain(x, 1, at=["conv", before_last])
    torch.testing.assert_close(answer.output, module(x).detach(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        inside = module.conv(x)
        z = module.fc(function(inside).flatten(1))[:, 1:2]
        last = function(inside).flatten(1) * module.fc.weight[1] * z / (z + 1e-6 * z.sign())
        want = (shares(inside) @ last[:, :, None]).reshape(inside.shape)
    torch.testing.assert_close(answer.inner[before_last].values.flatten(1), last, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(answer.inner["conv"].values, want, rtol=1e-9, atol=1e-12)
    ledger = answer.ledger
    assert ledger is not None
    assert float(ledger.error.max()) <= 1e-11
    kept = ledger.kept - ledger.kept_by()["conv2d"] - ledger.kept_by()["linear"]
    torch.testing.assert_close(kept, last.sum(1) - want.sum((1, 2, 3)), rtol=1e-9, atol=1e-11)
    keeps = name in ("constant pad", "concat with a constant", "logsumexp")
    assert (float(kept.abs().min()) > 1e-4) == keeps


@pytest.mark.parametrize("name", [*MOVING, *CHOOSING, "logsumexp"])
def test_under_the_plain_rule_it_is_the_input_times_the_gradient(name: str) -> None:
    function = CASES[name][0]
    module, x = Through(function).to(F64).eval(), torch.randn(2, 3, 6, 6, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[:, 2].sum(), x)
    x = x.detach()
    found = lrp.Explainer(module, composite=LRP0, dtype=F64, example=x, device="cpu").explain(x, 2)
    torch.testing.assert_close(found.relevance, x * gradient, rtol=1e-9, atol=1e-12)
    assert found.ledger is not None
    assert float(found.ledger.error.max()) <= 1e-11
