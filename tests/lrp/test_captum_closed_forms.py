"""captum's LRP: the closed forms of its own tests as known numbers, and captum itself on small networks in float64.

captum modifies weights only, and stabilizes with 1e-9. Its conventions are those of the rules here where inputs are not
negative (as behind a ReLU) and biases are left out, or have the sign that both read alike (see `BIASES`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, PropagationRule
from torch import Tensor, nn

import lrp
from lrp.composites import Composite
from lrp.rules import AnyRule

Floats = npt.NDArray[np.float64]
Modify = Callable[[Floats], Floats]
EPS = 1e-9
EPSILON = lrp.Epsilon(EPS)
ALPHA1 = lrp.AlphaBeta(1.0, 0.0, epsilon=EPS)
PLAIN = Composite("test", convolution=EPSILON, linear=EPSILON, norm_epsilon=EPS)


def explained(module: nn.Module, x: Tensor, target: int, rules: dict[str, AnyRule] | None = None) -> Tensor:
    explainer = lrp.Explainer(
        module, composite=PLAIN, rules=rules, dtype=torch.float64, device="cpu", example=x
    )
    return explainer.explain(x, target).relevance


# --- closed forms ---------------------------------------------------------------------------------------------------
def filled(module: nn.Linear, value: float) -> nn.Linear:
    nn.init.constant_(module.weight, value)
    return module


class Simple(nn.Module):
    """Twos, then threes; the second class is there because a classifier has two. first: the first of the twos."""

    def __init__(self, first: float = 2.0) -> None:
        super().__init__()
        self.linear = filled(nn.Linear(3, 3, bias=False), 2.0)
        self.linear.weight.data[0, 0] = first
        self.linear2 = filled(nn.Linear(3, 2, bias=False), 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(torch.relu(self.linear(x)))  # type: ignore[no-any-return]


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = filled(nn.Linear(2, 2, bias=False), 5.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x  # type: ignore[no-any-return]


class OneConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3)
        self.fc1 = nn.Linear(8, 4, bias=False)
        nn.init.ones_(self.conv1.weight)
        self.conv1.bias = nn.Parameter(torch.tensor([-50.0, -75.0]))
        self.fc1.weight = nn.Parameter(torch.cat([torch.ones(4, 5), -torch.ones(4, 3)], 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc1(torch.relu(self.conv1(x)).flatten(1)))


LINE = [[1.0, 2.0, 3.0]]
PAIRS = [[[1.0, 2.0], [5.0, 6.0]]]
# network, input, rules, class, relevance
CLOSED_FORMS: dict[str, tuple[Callable[[], nn.Module], list[Any], dict[str, AnyRule], int, list[Any]]] = {
    "epsilon": (Simple, LINE, {}, 0, [[18, 36, 54]]),
    "a batch": (Simple, [*LINE, [3.0, 6.0, 9.0]], {}, 0, [[18, 36, 54], [54, 108, 162]]),
    "gamma 1 below gamma .25": (
        lambda: Simple(-2.0),
        LINE,
        {"linear": lrp.Gamma(1.0, epsilon=EPS), "linear2": lrp.Gamma(0.25, epsilon=EPS)},
        0,
        [[28 / 3, 104 / 3, 52]],
    ),
    "alpha1 beta0": (
        lambda: Simple(-2.0),
        LINE,
        {"linear": ALPHA1, "linear2": ALPHA1},
        0,
        [[12, 33.6, 50.4]],
    ),
    "a skip connection": (Skip, [[2.0, 3.0]], {}, 1, [[10, 18]]),
    "max pool 1d behind twos": (
        lambda: nn.Sequential(filled(nn.Linear(2, 2, bias=False), 2.0), nn.MaxPool1d(2), nn.Flatten()),
        PAIRS,
        {},
        1,
        [[[0, 0], [10, 12]]],
    ),
    "max pool 2d": (
        lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten()),
        [[*PAIRS, *PAIRS]],
        {},
        0,
        [[[[0, 0], [0, 6]], [[0, 0], [0, 0]]]],
    ),
    "max pool 3d": (
        lambda: nn.Sequential(nn.MaxPool3d(2), nn.Flatten()),
        [[[[[1.0, 2.0], [5.0, 6.0]], [[3.0, 4.0], [7.0, 8.0]]]] * 2],
        {},
        1,
        [[[[[0, 0], [0, 0]], [[0, 0], [0, 0]]], [[[0, 0], [0, 0]], [[0, 0], [0, 8]]]]],
    ),
    "tanh, passed over": (
        lambda: nn.Sequential(
            filled(nn.Linear(3, 3, bias=False), 0.1), nn.Tanh(), filled(nn.Linear(3, 2, bias=False), 0.1)
        ),
        LINE,
        {},
        0,
        [[0.3 * math.tanh(0.6) * i / 6 for i in (1, 2, 3)]],
    ),
    "a convolution": (
        OneConvolution,
        torch.arange(16.0).reshape(1, 1, 4, 4).tolist(),
        {},
        0,
        # Both channels answer to the two lower windows, and cancel: the window at the upper right is left.
        [[[[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 0, 0, 0]]]],
    ),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_closed_form(name: str) -> None:
    make, values, rules, target, expected = CLOSED_FORMS[name]
    x = torch.tensor(values, dtype=torch.float64)
    got = explained(make().double().eval(), x, target, rules)
    # Stabilizers of 1e-9 take at most 5e-9 of these relevances.
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_identity_at_the_first_layer_is_the_relevance_of_what_it_feeds() -> None:
    x = torch.tensor(LINE, dtype=torch.float64)
    explainer = lrp.Explainer(
        Simple(-2.0).double(), composite=PLAIN, dtype=torch.float64, device="cpu", example=x
    )
    hidden = explainer.explain(x, 0, at="linear").inner["linear"].values
    torch.testing.assert_close(hidden, torch.tensor([[24.0, 36.0, 36.0]]).double(), rtol=0, atol=1e-8)


# --- captum, run beside ---------------------------------------------------------------------------------------------
class Sequential(nn.Sequential):
    """Flattens in between: captum has no rule for nn.Flatten."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x.flatten(1) if isinstance(layer, nn.Linear) else x)
        return x


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (
        lambda: Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6)),
        (8,),
    ),
    "max pool": (
        lambda: Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
            nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 6),
        ),
        (3, 8, 8),
    ),
    "average pool": (
        lambda: Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 2, groups=2),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 6),
        ),
        (3, 12, 12),
    ),
}  # fmt: skip
# captum's rule, the same rule here, and the biases with which they are the same: captum's alpha1 beta0 has all of the
# bias in the denominator where here it is b+, its gamma rule b where here it is b + gamma b+.
BIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda b: b,
    "none": torch.zeros_like,
    "positive": torch.abs,
    "negative": lambda b: -b.abs(),
}
RULES: dict[str, tuple[Callable[[], PropagationRule], AnyRule, str]] = {
    "epsilon 1e-9": (EpsilonRule, EPSILON, "any"),
    "epsilon .1": (lambda: EpsilonRule(0.1), lrp.Epsilon(0.1), "any"),
    "gamma .25": (GammaRule, lrp.Gamma(0.25, epsilon=EPS), "negative"),
    "gamma 1": (lambda: GammaRule(1.0), lrp.Gamma(1.0, epsilon=EPS), "negative"),
    "gamma .25, no bias": (GammaRule, lrp.Gamma(0.25, epsilon=EPS), "none"),
    "gamma .25, bias left out": (
        lambda: GammaRule(set_bias_to_zero=True),
        lrp.Gamma(0.25, epsilon=EPS, bias="omit"),
        "any",
    ),
    "alpha1 beta0": (Alpha1_Beta0_Rule, ALPHA1, "positive"),
    "alpha1 beta0, no bias": (Alpha1_Beta0_Rule, ALPHA1, "none"),
    "alpha1 beta0, bias left out": (
        lambda: Alpha1_Beta0_Rule(set_bias_to_zero=True),
        lrp.AlphaBeta(1.0, 0.0, epsilon=EPS, bias="omit"),
        "any",
    ),
    "z+, bias left out": (
        lambda: Alpha1_Beta0_Rule(set_bias_to_zero=True),
        lrp.ZPlus(epsilon=EPS, bias="omit"),
        "any",
    ),
}


def network(name: str, biases: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor, list[str]]:
    """A random network with such biases, inputs that are not negative, and the names of its weighted layers."""
    make, shape = NETWORKS[name]
    module = make().double().eval()
    weighted = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for layer in weighted.values():
        assert layer.bias is not None
        nn.init.kaiming_normal_(layer.weight)
        layer.bias.data = biases(torch.randn_like(layer.bias) / 10)
    return module, torch.rand(3, *shape, dtype=torch.float64), list(weighted)


def by_captum(module: nn.Module, x: Tensor, target: int, rules: dict[str, PropagationRule]) -> Tensor:
    module = copy.deepcopy(module)
    for name, rule in rules.items():
        module.get_submodule(name).rule = rule
    found = LRP(module).attribute(x.clone().requires_grad_(), target=target)
    assert isinstance(found, Tensor)
    return found.detach()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_relevance_as_captum(name: str, rule: str) -> None:
    theirs, ours, biases = RULES[rule]
    module, x, layers = network(name, BIASES[biases])
    target = int(module(x).amin(0).argmax())
    assert bool((module(x)[:, target] > 0).all())  # gamma goes by the score's sign, captum does not
    expected = by_captum(module, x, target, {layer: theirs() for layer in layers})
    got = explained(module, x, target, dict.fromkeys(layers, ours))
    # captum stabilizes max pools by 1e-9 too; here they hand relevance to the winner as it is.
    bound = 1e-7 if name == "max pool" else 1e-12
    assert float((got - expected).abs().max()) <= bound * float(expected.abs().max())


# --- where the conventions part -------------------------------------------------------------------------------------
def share(contributions: Floats, bias: Floats, r: Floats) -> Floats:
    """sum_k c_ik / (sum_j c_jk + b_k) R_k for contributions c[i, k]."""
    return (contributions / (contributions.sum(0) + bias) * r).sum(1)


# captum's rule, the rule here, the weights of both, and the bias in the denominator of captum's and of this one.
CONVENTIONS: dict[str, tuple[type[PropagationRule], AnyRule, Modify, Modify, Modify]] = {
    "gamma": (
        GammaRule,
        lrp.Gamma(0.25, epsilon=EPS),
        lambda w: w + 0.25 * np.maximum(w, 0),
        lambda b: b,
        lambda b: b + 0.25 * np.maximum(b, 0),
    ),
    "alpha1 beta0": (
        Alpha1_Beta0_Rule,
        ALPHA1,
        lambda w: np.maximum(w, 0),
        lambda b: b,
        lambda b: np.maximum(b, 0),
    ),
}


@pytest.mark.parametrize("bias", [0.7, -0.7])
@pytest.mark.parametrize("rule", CONVENTIONS)
def test_the_bias_is_all_that_parts_us(rule: str, bias: float) -> None:
    theirs, ours, weights, captums_bias, our_bias = CONVENTIONS[rule]
    module = nn.Sequential(nn.Linear(5, 2)).double()
    module[0].weight.data = torch.tensor([[1.0, -0.5, 2.0, 0.25, -0.75], [0.0] * 5]).double()
    module[0].bias.data = torch.tensor([bias, 0.0]).double()
    x = torch.tensor([[0.5, 0.25, 1.0, 0.75, 0.125]]).double()
    a, w = x[0].numpy(), module[0].weight.detach().numpy().T[:, :1]
    b, score = np.array([bias]), module(x)[0, :1].detach().numpy()
    contributions = a[:, None] * weights(w)
    captums = by_captum(module, x, 0, {"0": theirs()})[0].numpy()
    np.testing.assert_allclose(captums, share(contributions, captums_bias(b), score), rtol=1e-8)
    got = explained(module, x, 0, {"0": ours})[0].numpy()
    np.testing.assert_allclose(got, share(contributions, our_bias(b), score), rtol=1e-8)
