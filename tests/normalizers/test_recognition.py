"""Chains of primitives: recognized where they compute a normalization, left alone where one operand differs."""

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
from benchmarks.networks import randomize
from fusion.network import Network, op_name
from lrp.explainer import Explainer
from tests.normalizers import layers

Function = Callable[[Tensor], Tensor]


class Calls(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _captured(function: Function, x: Tensor) -> Network:
    module = Calls(function)
    network = fusion.capture(module, (x,))
    for batch in (x, x[:1], torch.cat([x, x])):
        assert torch.allclose(network(batch), module(batch), rtol=1e-12, atol=1e-12)
    return network


def _ops(network: Network) -> list[str]:
    return [op_name(node) for node in network.calls()]


def _rows(network: Network) -> list[str]:
    return [row.op for row in fusion.fuse(network).report.rows]


def _images(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- LayerNorm and RMSNorm --------------------------------------------------------------------------------------------
AXES = [(1,), (2,), (3,), (-1,), (2, 3), (1, 3), (1, 2, 3), (-2, -1)]


def _layer_norm(x: Tensor, axes: tuple[int, ...], spelling: str) -> Tensor:
    middle = x - x.mean(axes, keepdim=True)
    if spelling == "square":
        return middle / torch.sqrt((middle**2).mean(axes, keepdim=True) + 1e-3)
    if spelling == "again":  # x - mean(x) computed twice
        return (x - x.mean(axes, keepdim=True)) * torch.rsqrt(
            (middle * middle).mean(axes, keepdim=True) + 1e-3
        )
    if spelling == "variance":
        return middle / (1e-3 + x.var(axes, unbiased=False, keepdim=True)) ** 0.5
    return middle * (torch.var(middle, dim=axes, correction=0, keepdim=True) + 1e-3).pow(-0.5)


@pytest.mark.parametrize("spelling", ["square", "again", "variance", "correction"])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_layer_norms_are_one_operator_over_any_axes(axes: tuple[int, ...], spelling: str) -> None:
    network = _captured(lambda x: _layer_norm(x, axes, spelling), _images())
    assert set(_ops(network)) <= {"layer_norm", "permute"}
    assert _rows(network) == ["layer_norm"]


def _rms_norm(x: Tensor, axes: tuple[int, ...], spelling: str) -> Tensor:
    if spelling == "rsqrt":
        return x * torch.rsqrt(x.pow(2).mean(axes, keepdim=True) + 1e-3)
    if spelling == "square":
        return torch.square(x).mean(axes, keepdim=True).add(1e-3).rsqrt() * x
    return x / torch.sqrt((x * x).mean(axes, keepdim=True))


@pytest.mark.parametrize("spelling", ["rsqrt", "square", "no eps"])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_rms_norms_are_one_operator_over_any_axes(axes: tuple[int, ...], spelling: str) -> None:
    network = _captured(lambda x: _rms_norm(x, axes, spelling), _images())
    assert set(_ops(network)) <= {"rms_norm", "permute"}
    assert _rows(network) == ["rms_norm"]


def _mean(x: Tensor, *axes: int) -> Tensor:
    return x.mean(axes, keepdim=True)


def _var(x: Tensor, axis: int = 1, unbiased: bool = False) -> Tensor:
    return x.var(axis, unbiased=unbiased, keepdim=True)


def _centred(x: Tensor) -> Tensor:
    return x - _mean(x, 1)


def test_a_cast_to_the_same_type_is_no_operand() -> None:
    """Networks compute statistics in float32 whatever they are given; in float32 that is no operation."""

    def normalized(x: Tensor) -> Tensor:
        rms = x.square().float().mean((2, 3), keepdim=True).add(1e-3).rsqrt().to(x.dtype)
        return x * rms.expand(x.shape)

    single, double = (fusion.capture(Calls(normalized), (x,)) for x in (_images().float(), _images()))
    assert _ops(single) == ["rms_norm"]
    assert "rms_norm" not in _ops(double)  # there it rounds
    assert _rows(double) == ["divisive_norm"]


@pytest.mark.parametrize(
    ("name", "op"), [("resnetv2_50d_frn", "rms_norm"), ("resnetv2_50d_evos", "variance_norm")]
)
def test_published_networks_are_recognized(name: str, op: str) -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model(name, pretrained=False, num_classes=5)
    randomize(module)
    x = torch.randn(1, 3, 32, 32)
    network = fusion.capture(module.eval(), (x,))
    report = fusion.fuse(network).report
    assert {(row.op, row.outcome) for row in report.rows} == {(op, "partly")}
    assert len(report.rows) == 51
    wide = fusion.fuse(network.to(dtype=torch.float64)).network
    assert fusion.certify(network.to(dtype=torch.float64), wide, [x.double()]).max_relative <= 1e-12
    explanation = Explainer(wide, dtype=torch.float64, device="cpu").explain(x, 1)
    assert explanation.ledger is not None
    assert float(explanation.ledger.error.max()) <= 1e-10


NOT_QUITE: dict[str, tuple[Function, str | None]] = {
    "variance over other axes": (lambda x: _centred(x) / (_var(x, 2) + 1e-3).sqrt(), "standardization"),
    "variance of something else": (lambda x: _centred(x) / (_var(x + x.abs()) + 1e-3).sqrt(), None),
    "unbiased variance": (lambda x: _centred(x) / (_var(x, 1, True) + 1e-3).sqrt(), "standardization"),
    "eps outside the root": (lambda x: _centred(x) / (_var(x).sqrt() + 1e-3), "standardization"),
    "no root": (lambda x: _centred(x) / (_var(x) + 1e-3), None),
    "nothing centred": (lambda x: x / (_var(x) + 1e-3).sqrt(), "variance_norm"),
    "the mean added": (lambda x: (x + _mean(x, 1)) / (_var(x) + 1e-3).sqrt(), "variance_norm"),
    "fourth powers": (lambda x: x * torch.rsqrt(_mean(x.pow(4), 1) + 1e-3), "divisive_norm"),
    "the sum of squares": (lambda x: x / (x.pow(2).sum(1, keepdim=True) + 1e-3).sqrt(), "divisive_norm"),
    "another root": (lambda x: x / (_mean(x.pow(2), 1) + 1e-3).pow(0.25), "divisive_norm"),
    "another numerator": (lambda x: torch.relu(x) / (_mean(x.pow(2), 1) + 1e-3).sqrt(), None),
    "softmax": (lambda x: x.exp() / x.exp().sum(1, keepdim=True), None),
    "a squeezed gate": (lambda x: x * torch.sigmoid(_mean(x, 2, 3)), None),
    "a root of itself": (lambda x: x / (x.pow(2) + 1e-3).sqrt(), None),
}


@pytest.mark.parametrize("name", NOT_QUITE)
def test_a_chain_with_another_operand_stays_as_it_is(name: str) -> None:
    function, called = NOT_QUITE[name]
    network = _captured(function, _images())
    assert not {"layer_norm", "rms_norm"} & set(_ops(network))
    assert _rows(network) == ([] if called is None else [called])


def test_statistics_of_a_batch_are_no_layer_norm() -> None:
    """Over the samples, the answer to an image depends on its neighbours."""
    x = _images()
    network = fusion.capture(Calls(lambda x: (x - _mean(x, 0)) / (_var(x, 0) + 1e-3).sqrt()), (x,))
    assert not {"layer_norm", "rms_norm"} & set(_ops(network))


# --- frozen batch norms -----------------------------------------------------------------------------------------------
class Frozen(nn.Module):
    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong = wrong
        for name in ("weight", "bias", "mean", "var", "other"):
            self.register_buffer(name, torch.rand(4, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var, other = (
            getattr(self, n).reshape(1, -1, 1, 1) for n in ("weight", "bias", "mean", "var", "other")
        )
        scale = weight * (var + 1e-3).rsqrt()
        if self.wrong == "scale":
            return x * scale + (bias - mean * other)
        if self.wrong == "sign":
            return x * scale + (bias + mean * scale)
        return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("wrong", ["", "scale", "sign"])
def test_a_frozen_batch_norm_is_a_batch_norm(wrong: str) -> None:
    module = Frozen(wrong)
    network = _captured(module, _images())
    assert _ops(network) == (["batch_norm"] if not wrong else ["mul", "add"])


# --- what belongs to a normalization ----------------------------------------------------------------------------------
def test_constants_behind_statistics_are_their_scale_and_shift() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.conv = (
                nn.Conv2d(4, 4, 1),
                layers.FilterResponseNorm(4),
                nn.Conv2d(4, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.stem(x)))  # type: ignore[no-any-return]

    network = fusion.capture(Scaled().double(), (_images(),))
    (row,) = fusion.fuse(network).report.rows
    assert (row.layer, row.op, row.outcome, row.into) == ("norm", "rms_norm", "partly", ("conv",))


# --- layers of distances ----------------------------------------------------------------------------------------------
WEIGHT = torch.randn(3, 4 * 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _patches(x: Tensor) -> Tensor:
    return F.unfold(x, 3, padding=1)  # [N, I, L]


def _samples_first(x: Tensor) -> Tensor:
    return -(_patches(x)[:, None] - WEIGHT[None, :, :, None]).abs().sum(2).reshape(-1, 3, 3, 5)


def _filters_last(x: Tensor) -> Tensor:
    distance = (WEIGHT.t()[None, None] - _patches(x).transpose(1, 2)[..., None]).abs().sum(-2)  # [N, L, K]
    return distance.transpose(1, 2).reshape(-1, 3, 3, 5).neg()


def _not_negated(x: Tensor) -> Tensor:
    return (_patches(x)[:, None] - WEIGHT[None, :, :, None]).abs().sum(2).reshape(-1, 3, 3, 5)


@pytest.mark.parametrize("function", [_samples_first, _filters_last, _not_negated])
def test_distances_are_found_however_their_axes_lie(function: Function) -> None:
    network = _captured(function, _images())
    assert "conv1d" in _ops(network)
    assert "sum" not in _ops(network)


def _shuffled_places(x: Tensor) -> Tensor:
    return _samples_first(x).flip(3)


def _over_places(x: Tensor) -> Tensor:
    return (_patches(x)[:, None] - torch.ones(1, 3, 1, 15, dtype=x.dtype)).abs().sum(3)


def _squares(x: Tensor) -> Tensor:
    return (_patches(x)[:, None] - WEIGHT[None, :, :, None]).square().sum(2)


def _mixed_patches(x: Tensor) -> Tensor:
    wrong = (
        _patches(x).transpose(1, 2).reshape(-1, 36, 15)
    )  # not a transpose: values of several patches in one
    return (wrong[:, None] - WEIGHT[None, :, :, None]).abs().sum(2)


@pytest.mark.parametrize("function", [_over_places, _squares, _mixed_patches])
def test_other_sums_are_no_distances(function: Function) -> None:
    assert "conv1d" not in _ops(_captured(function, _images()))


def test_what_is_moved_behind_distances_is_moved_still() -> None:
    network = _captured(_shuffled_places, _images())
    assert {"conv1d", "flip"} <= set(_ops(network))


# --- what is held constant --------------------------------------------------------------------------------------------
class Gated(nn.Module):
    """A gate with layers of its own, and a statistic with operators that no rule is for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = x * gate / (1 + torch.logsumexp(x.std((2, 3), keepdim=True), 1, keepdim=True))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_what_only_scales_a_signal_needs_no_rule_and_gets_no_relevance() -> None:
    module, x = Gated().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    explanation = Explainer(module, dtype=torch.float64, device="cpu", example=x).explain(x, 1)
    assert explanation.ledger is not None
    assert float(explanation.ledger.error.max()) <= 1e-10
    assert "squeeze" not in {entry.layer for entry in explanation.ledger.entries}
    # A linear network in the signal, gate and statistic being numbers: relevance of the stem is what the head hands on.
    by_layer = {entry.layer: entry for entry in explanation.ledger.entries}
    assert torch.allclose(by_layer["conv"].received, by_layer["fc"].passed, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    channels=st.integers(1, 6),
    size=st.integers(2, 5),
    batch=st.integers(1, 3),
    eps=st.sampled_from([0.0, 1e-5, 0.3]),
    seed=st.integers(0, 100),
)
def test_a_channel_layer_norm_is_exact_for_all_shapes(
    channels: int, size: int, batch: int, eps: float, seed: int
) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(2, channels, 1),
        layers.ChannelLayerNorm(channels, max(eps, 1e-9)),
        nn.Conv2d(channels, 3, size),
    ).double()
    x = torch.randn(batch, 2, size, size, dtype=torch.float64) * math.sqrt(channels)
    fused = fusion.fuse(fusion.capture(module, (x,)))
    (row,) = fused.report.rows
    assert row.op == "layer_norm"
    scale = 1e-12 if channels > 1 else 1e-6  # one channel less its mean is rounding, divided by sqrt(eps)
    assert fusion.certify(module, fused.network, [x]).max_relative <= scale
