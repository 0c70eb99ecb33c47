"""Every rule against its formula written out with dense matrices, for linear and (transposed) convolutions 1d to 3d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import fusion
import lrp
from lrp.composites import Composite
from lrp.rules import AnyRule, InputRule

Floats = npt.NDArray[np.float64]
EPS = 1e-6

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 15), (16,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2, bias=False), (2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2), (3, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, padding=1), (4, 4, 4)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3)),
}


def dense(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """The layer as a matrix w[i, k] and a bias b[k], read off its answers to unit vectors."""
    size = int(np.prod(shape))
    with torch.no_grad():
        bias = layer(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        units = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
        w = layer(units).flatten(1) - bias
    return w.numpy(), bias.numpy()


def present(layer: nn.Module, shape: tuple[int, ...]) -> Floats:
    """1 where input i reaches output k at all: the connections that flat counts, zero weights included."""
    ones = {
        name: torch.ones_like(p) if "weight" in name else torch.zeros_like(p)
        for name, p in layer.named_parameters()
    }
    size = int(np.prod(shape))
    units = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return torch.func.functional_call(layer, ones, (units,)).flatten(1).detach().numpy()


def stab(z: Floats) -> Floats:
    return z + EPS * np.where(z >= 0, 1.0, -1.0)


def pos(v: Floats) -> Floats:
    return np.maximum(v, 0)


def neg(v: Floats) -> Floats:
    return np.minimum(v, 0)


def share(contributions: Floats, bias: Floats, r: Floats) -> Floats:
    """sum_k c_ik / stab(sum_j c_jk + b_k) R_k for contributions c[i, k]."""
    return (contributions / stab(contributions.sum(0) + bias) * r).sum(1)


def epsilon(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
    return share(a[:, None] * w, b, r)


def zplus(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
    return share(pos(a[:, None] * w), pos(b), r)


def alpha_beta(alpha: float, beta: float) -> Callable[..., Floats]:
    def formula(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
        c = a[:, None] * w
        return alpha * share(pos(c), pos(b), r) - beta * share(neg(c), neg(b), r)

    return formula


def gamma(g: float) -> Callable[..., Floats]:
    def formula(a: Floats, w: Floats, b: Floats, r: Floats, outputs: Floats | None = None) -> Floats:
        z = a @ w + b if outputs is None else outputs
        p, n = pos(a)[:, None], neg(a)[:, None]
        up = p * (w + g * pos(w)) + n * (w + g * neg(w))
        down = p * (w + g * neg(w)) + n * (w + g * pos(w))
        return share(up, b + g * pos(b), np.where(z > 0, r, 0)) + share(
            down, b + g * neg(b), np.where(z < 0, r, 0)
        )

    return formula


def evenly(c: Floats, kept: Floats) -> Floats:
    """What biases would keep, handed to the inputs by the magnitude of their contributions c[i, k]; where there are
    none, the bias keeps it."""
    total = np.abs(c).sum(0)
    return (np.abs(c) / np.where(total > 0, total, 1) * kept).sum(1)


def redistributed_epsilon(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
    return epsilon(a, w, b, r) + evenly(a[:, None] * w, b / stab(a @ w + b) * r)


def redistributed_alpha_beta(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
    c = a[:, None] * w
    kept = 2 * pos(b) / stab(pos(c).sum(0) + pos(b)) - neg(b) / stab(neg(c).sum(0) + neg(b))
    return alpha_beta(2, 1)(a, w, b, r) + evenly(c, kept * r)


def redistributed_gamma(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
    z, p, n = a @ w + b, pos(a)[:, None], neg(a)[:, None]
    up, down = w + 0.25 * pos(w), w + 0.25 * neg(w)
    upper, lower = (p * up + n * down).sum(0), (p * down + n * up).sum(0)
    b_up, b_down = b + 0.25 * pos(b), b + 0.25 * neg(b)
    kept = np.where(z > 0, b_up / stab(upper + b_up), b_down / stab(lower + b_down)) * r
    return gamma(0.25)(a, w, b, r) + evenly(a[:, None] * w, kept)


def relative_epsilon(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
    z = a @ w + b
    return (a[:, None] * w / (z + 0.25 * np.sqrt((z**2).mean()) * np.where(z >= 0, 1, -1)) * r).sum(1)


def abs_lrp(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
    c = a[:, None] * w
    messages = ((c + np.abs(c)) / np.abs(a @ w + b) * r).sum(1)
    return messages / messages.sum() * r.sum()


RULES: dict[str, tuple[AnyRule, Callable[..., Floats]]] = {
    "LRP-0": (lrp.LRP0(), lambda a, w, b, r: (a[:, None] * w / (a @ w + b) * r).sum(1)),
    "epsilon": (lrp.Epsilon(EPS), epsilon),
    "epsilon without bias": (lrp.Epsilon(EPS, bias="omit"), lambda a, w, b, r: epsilon(a, w, 0 * b, r)),
    "z+": (lrp.ZPlus(), zplus),
    "z+ without bias": (lrp.ZPlus(bias="omit"), lambda a, w, b, r: zplus(a, w, 0 * b, r)),
    "alpha2 beta1": (lrp.AlphaBeta(2.0, 1.0), alpha_beta(2, 1)),
    "alpha1 beta0": (lrp.AlphaBeta(1.0, 0.0), alpha_beta(1, 0)),
    "gamma .25": (lrp.Gamma(0.25), gamma(0.25)),
    "gamma .5": (lrp.Gamma(0.5), gamma(0.5)),
    "epsilon, bias redistributed": (lrp.Epsilon(EPS, bias="redistribute"), redistributed_epsilon),
    "alpha2 beta1, bias redistributed": (lrp.AlphaBeta(bias="redistribute"), redistributed_alpha_beta),
    "gamma .25, bias redistributed": (lrp.Gamma(0.25, bias="redistribute"), redistributed_gamma),
    "epsilon relative to the spread": (lrp.Epsilon(0.25, relative=True), relative_epsilon),
    "absLRP": (lrp.AbsLRP(), abs_lrp),
    "alpha2 beta1 without bias": (
        lrp.AlphaBeta(2.0, 1.0, bias="omit"),
        lambda a, w, b, r: alpha_beta(2, 1)(a, w, 0 * b, r),
    ),
    "gamma .25 without bias": (
        lrp.Gamma(0.25, bias="omit"),
        # The branch is chosen by the output, which has its bias.
        lambda a, w, b, r: gamma(0.25)(a, w, 0 * b, r, a @ w + b),
    ),
}


class Scores(nn.Module):
    """The layer as a whole network: its outputs are the scores."""

    def __init__(self, layer: nn.Module, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(x) if self.relu else x).flatten(1)  # type: ignore[no-any-return]


@cache
def captured(kind: str, relu: bool = False) -> tuple[nn.Module, tuple[int, ...], fusion.Network]:
    """A layer, its input's shape, and its network; captured once for all rules."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().double().eval()
    return layer, shape, fusion.capture(Scores(layer, relu), (torch.randn(1, *shape, dtype=torch.float64),))


def explained(network: fusion.Network, x: Tensor, rule: AnyRule) -> tuple[Floats, Floats]:
    """(relevance at the input, relevance of the scores) of one image, for a random linear functional of the scores."""
    composite = Composite("test", convolution=lrp.LRP0(), linear=lrp.LRP0(), overrides=(("layer", rule),))
    explainer = lrp.Explainer(network, composite=composite, dtype=torch.float64)
    weights = torch.randn(explainer.network.outputs[0].shape[1] or 0, dtype=torch.float64)
    answer = explainer.explain(x, target=lambda scores: scores @ weights)
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-9
    return answer.relevance[0].flatten().numpy(), (answer.output[0] * weights).numpy()


@pytest.mark.parametrize("relu", [False, True], ids=["any sign", "behind a relu"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_rule_is_its_formula(kind: str, rule: str, relu: bool) -> None:
    layer, shape, network = captured(kind, relu)
    x = torch.randn(1, *shape, dtype=torch.float64)
    got, r = explained(network, x, RULES[rule][0])
    w, b = dense(layer, shape)
    a = x.flatten().numpy()
    expected = RULES[rule][1](pos(a) if relu else a, w, b, r)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(
    "rule",
    [lrp.AbsLRP(), lrp.Epsilon(0.25, relative=True), lrp.Gamma(relative=True, bias="redistribute")],
    ids=str,
)
def test_what_is_measured_over_a_sample_stays_in_it(rule: AnyRule) -> None:
    _, shape, network = captured("conv2d", True)
    composite = Composite("test", convolution=rule, linear=lrp.LRP0())
    explainer = lrp.Explainer(network, composite=composite, dtype=torch.float64)
    x = torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])[:, None, None, None]
    alone = torch.cat([explainer.explain(one[None], 7).relevance for one in x])
    torch.testing.assert_close(explainer.explain(x, 7).relevance, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", [lrp.Epsilon(0.0), lrp.Gamma(epsilon=0.0)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_redistributed_biases_keep_nothing(kind: str, rule: AnyRule) -> None:
    _, shape, network = captured(kind)
    x = torch.randn(1, *shape, dtype=torch.float64)
    got, r = explained(network, x, replace(rule, bias="redistribute"))
    assert got.sum() == pytest.approx(r.sum(), rel=1e-9, abs=1e-9 * float(np.abs(r).sum()))


LOW, HIGH = -3.5, 2.5


def zbox(a: Floats, w: Floats, b: Floats, r: Floats) -> Floats:
    return share(a[:, None] * w - LOW * pos(w) - HIGH * neg(w), 0 * b, r)


INPUT_RULES: dict[str, tuple[InputRule, Callable[..., Floats]]] = {
    "zB": (lrp.ZBox(LOW, HIGH), zbox),
    "w2": (lrp.WSquare(), lambda a, w, b, r: share(w**2, b**2, r)),
}


@pytest.mark.parametrize("rule", INPUT_RULES)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_input_rule_is_its_formula(kind: str, rule: str) -> None:
    layer, shape, network = captured(kind)
    x = torch.randn(1, *shape, dtype=torch.float64)
    got, r = explained(network, x, INPUT_RULES[rule][0])
    w, b = dense(layer, shape)
    expected = INPUT_RULES[rule][1](x.flatten().numpy(), w, b, r)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("kind", LAYERS)
def test_flat_is_its_formula(kind: str) -> None:
    layer, shape, network = captured(kind)
    x = torch.randn(1, *shape, dtype=torch.float64)
    got, r = explained(network, x, lrp.Flat())
    connections = present(layer, shape)
    expected = share(connections, np.zeros(connections.shape[1]), r)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_zbox_takes_bounds_per_channel() -> None:
    layer = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    network = fusion.capture(Scores(layer, False), (x,))
    got, r = explained(network, x, lrp.ZBox((-1.0, -2.0), (1.0, 3.0)))
    w, _ = dense(layer, (2, 5, 5))
    low, high = (np.repeat(v, 25)[:, None] for v in ([-1.0, -2.0], [1.0, 3.0]))
    expected = share(x.flatten().numpy()[:, None] * w - low * pos(w) - high * neg(w), np.zeros(w.shape[1]), r)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


class Normalizing(nn.Module):
    """The first layer of a network that normalizes and rearranges its input inside, as GoogLeNet does."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.layer = conv

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, 0:1] * 0.5 + 0.1, x[:, 1:2] * -2.0 - 0.3], 1)
        return self.layer(x).flatten(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", [lrp.Flat(), lrp.WSquare(), lrp.ZBox(-1.0, 1.0)], ids=["flat", "w2", "zB"])
def test_input_rules_reach_through_a_normalization_inside_the_network(rule: Any) -> None:
    conv = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    composite = Composite("test", convolution=lrp.LRP0(), linear=lrp.LRP0(), first=rule)
    inside = lrp.Explainer(Normalizing(conv), composite=composite, dtype=torch.float64, example=x)
    outside_x = torch.cat([x[:, 0:1] * 0.5 + 0.1, x[:, 1:2] * -2.0 - 0.3], 1)
    if isinstance(rule, lrp.ZBox):
        composite = Composite("t", lrp.LRP0(), lrp.LRP0(), first=lrp.ZBox((-0.4, -2.3), (0.6, 1.7)))
    outside = lrp.Explainer(Scores(conv, False), composite=composite, dtype=torch.float64, example=outside_x)
    torch.testing.assert_close(inside.explain(x, 4).relevance, outside.explain(outside_x, 4).relevance)
