"""How relevance passes what fusion leaves of a normalizer, against formulas written out densely."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusion
from fusion.network import op_name
from lrp.composites import Composite
from lrp.explainer import Explainer
from lrp.rules import LRP0, AlphaBeta, Epsilon, Gamma, LinearRule, ZPlus
from tests.normalizers import layers

LRP_0 = Composite("LRP-0", convolution=LRP0(), linear=LRP0())


class Flat(nn.Module):
    """A layer whose every output is a class: the relevance of one output is the layer's own share of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(1)  # type: ignore[no-any-return]


def _relevance(layer: nn.Module, x: Tensor, composite: Composite = LRP_0) -> Tensor:
    """[outputs, *x.shape[1:]]: what each output of one sample hands to the input; every ledger must balance."""
    module = Flat(layer).eval().double()
    explainer = Explainer(module, composite=composite, dtype=torch.float64, device="cpu", example=x)
    outputs = explainer.predict(x).shape[1]
    explanation = explainer.explain(x, [list(range(outputs))])
    assert explanation.ledger is not None
    assert float(explanation.ledger.error.max()) <= 1e-9
    return explanation.relevance[0]


def _own(x: Tensor, share: Tensor) -> Tensor:
    """The relevance where output k gives input k `share_k` and the others nothing."""
    return torch.diag(share.flatten()).reshape(-1, *x.shape[1:])


def _variance(layer: layers.VarianceNorm, x: Tensor) -> Tensor:
    deviation = (x.var((2, 3), unbiased=False, keepdim=True) + layer.eps).sqrt()
    return _own(x, layer.gamma * x / deviation)


def _filter_response(layer: layers.FilterResponseNorm, x: Tensor) -> Tensor:
    normalized = layer.gamma * x / ((x * x).mean((2, 3), keepdim=True) + layer.eps.abs()).sqrt()
    return _own(x, torch.where(normalized + layer.beta > layer.tau, normalized, 0))


def _evolved(layer: layers.EvoNormS0, x: Tensor) -> Tensor:
    # All of y but the shift belongs to x.
    return _own(x, layer(x) - layer.beta)


def _local(layer: nn.LocalResponseNorm, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for c in range(x.shape[1]):
        low, high = max(0, c - layer.size // 2), min(x.shape[1], c + (layer.size + 1) // 2)
        total[:, c] = (x[:, low:high] ** 2).sum(1)
    return _own(x, x / (layer.k + layer.alpha / layer.size * total) ** layer.beta)


def _mixture(layer: layers.MixtureNorm, x: Tensor) -> Tensor:
    slope = torch.zeros_like(x)
    n, _, h, w = x.shape
    for i in range(n):
        for position in ((a, b) for a in range(h) for b in range(w)):
            value = x[i, :, position[0], position[1]]
            likelihood = []
            for k in range(len(layer.weights)):
                variance = layer.variances[k] + layer.eps
                normal = torch.exp(-((value - layer.means[k]) ** 2) / (2 * variance)) / torch.sqrt(
                    2 * math.pi * variance
                )
                likelihood.append(layer.weights[k] * normal.prod())
            for k in range(len(layer.weights)):
                belongs = likelihood[k] / sum(likelihood)
                slope[i, :, position[0], position[1]] += (
                    belongs / layer.weights[k].sqrt() / (layer.variances[k] + layer.eps).sqrt()
                )
    return _own(x, layer.gamma * slope * x)


def _adaptive(layer: layers.AdaNorm, x: Tensor) -> Tensor:
    # Linear in the centred input, with the gate and the deviation held constant.
    d = x.shape[-1]
    found = torch.zeros(x[0].numel(), *x.shape[1:], dtype=x.dtype)
    for token in range(x.shape[1]):
        row = x[0, token]
        deviation = row.std() + layer.eps
        centred = row - row.mean()
        gate = 1 - layer.k * centred / deviation
        for k in range(d):
            weights = (torch.arange(d) == k).double() - 1 / d
            found[token * d + k, token] = layer.scale * gate[k] / deviation * weights * row
    return found


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[int, ...]]] = {
    "variance norm": (lambda: layers.VarianceNorm(3), _variance, (1, 3, 4, 3)),
    "filter response norm": (lambda: layers.FilterResponseNorm(3), _filter_response, (1, 3, 4, 3)),
    "EvoNorm-S0": (lambda: layers.EvoNormS0(4, 2), _evolved, (1, 4, 3, 3)),
    "local response norm": (lambda: nn.LocalResponseNorm(3, 0.5, 0.75, 1.3), _local, (1, 5, 3, 2)),
    "mixture norm": (lambda: layers.MixtureNorm(3, 2), _mixture, (1, 3, 3, 2)),
    "AdaNorm": (lambda: layers.AdaNorm(), _adaptive, (1, 3, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_statistics_and_gates_are_numbers(name: str) -> None:
    build, formula, shape = CASES[name]
    layer, x = build().double(), torch.randn(*shape, dtype=torch.float64)
    with torch.no_grad():
        want = formula(layer, x)
    got = _relevance(layer, x)
    assert float((want - got).abs().max()) <= 1e-12 * float(want.abs().max())


class Spelled(nn.Module):
    """x / sqrt(var x + eps), in several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        v = x.var((2, 3), unbiased=False, keepdim=True) + 1e-5
        factors = {
            "rsqrt": lambda: x * torch.rsqrt(v),
            "power": lambda: v.pow(-0.5) * x,
            "reciprocal": lambda: x * torch.reciprocal(v.sqrt()),
            "one over": lambda: x * (1.0 / v.sqrt()),
            "quotient": lambda: x / v.sqrt(),
        }
        return factors[self.spelling]()


@pytest.mark.parametrize("spelling", ["rsqrt", "power", "reciprocal", "one over", "quotient"])
def test_a_division_is_a_division_however_it_is_spelled(spelling: str) -> None:
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    want = _own(x, x / (x.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt())
    assert torch.allclose(_relevance(Spelled(spelling), x), want, atol=0, rtol=1e-12)


# --- centred activations ----------------------------------------------------------------------------------------------
class Shifted(nn.Module):
    """conv, softplus(b x) / b less a constant, conv."""

    def __init__(self, shift: float, beta: float = 2.0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)
        self.shift, self.beta = shift, beta

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.softplus(self.first(x), beta=self.beta) - self.shift
        return self.second(hidden).mean((2, 3))  # type: ignore[no-any-return]


def test_a_centred_activation_keeps_nothing_and_hands_on_all_it_has() -> None:
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    layer = layers.CenteredSoftplus().double()
    with torch.no_grad():
        want = _own(x, layer(x))
    got = _relevance(layer, x)
    assert torch.allclose(got, want, atol=1e-15, rtol=1e-12)
    assert not _relevance(layer, torch.zeros_like(x)).any()


def test_the_centre_is_no_bias_of_the_layer_behind() -> None:
    x = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    centred, shifted = Shifted(math.log(2) / 2).double(), Shifted(0.4).double()
    for module, folds in ((centred, False), (shifted, True)):
        fused = fusion.fuse(fusion.capture(module, (x,)))
        left = [n for n in fused.network.calls() if op_name(n) == "sub"]
        assert bool(left) != folds
        assert fusion.certify(module, fused.network, [x]).max_relative <= 1e-12
        same = torch.equal(fused.network.constants["second.bias"], module.second.bias)
        assert same != folds


# --- layers of distances ----------------------------------------------------------------------------------------------
class Adder(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int, norm: bool) -> None:
        super().__init__()
        self.adder = layers.AdderConv(inputs, outputs, kernel, stride, padding)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.adder(x))  # type: ignore[no-any-return]


def _adder(seed: int, inputs: int, outputs: int, kernel: int, stride: int, padding: int, norm: bool) -> Adder:
    torch.manual_seed(seed)
    module = Adder(inputs, outputs, kernel, stride, padding, norm)
    if isinstance(module.norm, nn.BatchNorm2d):
        size = inputs * kernel * kernel
        for tensor, low, high in (
            (module.norm.weight, -1.5, 1.5),
            (module.norm.bias, -1.0, 1.0),
            (module.norm.running_mean, -1.5 * size, -0.5 * size),
            (module.norm.running_var, 0.5, 2.0),
        ):
            nn.init.uniform_(tensor, low, high)  # type: ignore[arg-type]
        with torch.no_grad():
            module.norm.weight[0] = 0.0
    return module.eval().double()


def _dense_adder(module: Adder, x: Tensor, rule: LinearRule) -> Tensor:
    """R_i = sum over the rule's branches of part(c_ki) / stab(sum part(c_ki) + part(b0_k)) z_k, output by output, with
    c_ki = s_k (|w_ki| - |x_i - w_ki|) and b0_k = -s_k (sum_i |w_ki| + mu_k) + beta_k."""
    adder, norm = module.adder, module.norm
    w = adder.weight.flatten(1)
    s, t = torch.ones(len(w), dtype=x.dtype), torch.zeros(len(w), dtype=x.dtype)
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        s = norm.weight / (norm.running_var + norm.eps).sqrt()
        t = norm.bias - s * norm.running_mean
    columns = F.unfold(x, adder.kernel, padding=adder.padding, stride=adder.stride)[0]  # [I, L]
    found = []
    for k in range(len(w)):
        bias = t[k] - s[k] * w[k].abs().sum()
        for place in range(columns.shape[1]):
            c = s[k] * (w[k].abs() - (columns[:, place] - w[k]).abs())
            z = c.sum() + bias
            shares = torch.zeros_like(columns)
            shares[:, place] = _shares(rule, c, bias, z)
            found.append(
                F.fold(shares, x.shape[2:], adder.kernel, padding=adder.padding, stride=adder.stride)
            )
    return torch.stack(found)


def _shares(rule: LinearRule, c: Tensor, bias: Tensor, z: Tensor) -> Tensor:
    def share(part: Callable[[Tensor], Tensor]) -> Tensor:
        total = part(c).sum() + part(bias)
        total = total + (rule.epsilon if total >= 0 else -rule.epsilon)
        return torch.zeros_like(c) if total == 0 else part(c) / total * z

    def up(t: Tensor) -> Tensor:
        return t.clamp(min=0)

    def down(t: Tensor) -> Tensor:
        return t.clamp(max=0)

    if isinstance(rule, AlphaBeta):
        return rule.alpha * share(up) - rule.beta * share(down)
    if isinstance(rule, ZPlus):
        return share(up)
    if isinstance(rule, Gamma):
        side = up if z > 0 else down
        return share(lambda t: t + rule.gamma * side(t))
    return share(lambda t: t)


RULES: tuple[LinearRule, ...] = (LRP0(), Epsilon(0.25), ZPlus(), AlphaBeta(2.0, 1.0), Gamma(0.25))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "with batch norm"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_rules_read_what_each_input_adds_to_a_distance(rule: LinearRule, norm: bool) -> None:
    module = _adder(0, 2, 3, 3, 2, 1, norm)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    x[0, 0, 1] = 0.0
    composite = Composite("one rule", convolution=rule, linear=rule)
    with torch.no_grad():
        want = _dense_adder(module, x, rule)
    got = _relevance(module, x, composite)
    assert float((want - got).abs().max()) <= 1e-10 * float(want.abs().max())
    assert not got[:, 0, 1].any()


def test_a_gradient_explains_no_distance() -> None:
    """What the published backward pass, and what the true derivative, would say instead."""
    module = _adder(0, 2, 3, 3, 1, 0, False)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (published,) = torch.autograd.grad(module(x).sum(), x)
    difference = x.detach() - module.adder.weight.detach()
    derivative = -torch.sign(difference).sum(0, keepdim=True)
    assert not torch.allclose(published, derivative)
    got = _relevance(module, x.detach()).sum(0, keepdim=True)
    for gradient in (published, derivative):
        assert not torch.allclose(x.detach() * gradient, got, rtol=1e-2)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    inputs=st.integers(1, 3),
    outputs=st.integers(2, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    batch=st.integers(1, 4),
)
def test_a_batch_norm_folds_into_a_layer_of_distances(
    seed: int, inputs: int, outputs: int, kernel: int, stride: int, padding: int, batch: int
) -> None:
    if inputs * kernel == 1:
        return  # one value: no sum
    module = _adder(seed, inputs, outputs, kernel, stride, padding, True)
    x = torch.randn(batch, inputs, 5, 6, dtype=torch.float64)
    fused = fusion.fuse(fusion.capture(module, (x,)), certified=True)
    assert [(r.op, r.outcome, r.into) for r in fused.report.rows] == [("batch_norm", "folded", ("adder",))]
    assert fusion.certify(module, fused.network, [x]).max_relative <= 1e-12
