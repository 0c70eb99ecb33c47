"""Reach: folds off the straight path: beside a layer, past activations backward, through mixers, windows and states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fusion
from fusion.affine import reshaped
from tests.fusion.test_folds import CONVOLUTIONS, certificate_of, norm

SETTINGS = settings(max_examples=25, deadline=None)
SMOOTH = nn.GELU()


def outcomes(fused: fusion.Fused) -> set[str]:
    return {row.outcome for row in fused.report.rows}


# --- beside ---------------------------------------------------------------------------------------------------------
class Reparametrizable(nn.Module):
    """RepVGG: an activation that a layer and a norm read, whose answers are added."""

    def __init__(self, layer: nn.Module, rank: int, bn: nn.Module, order: str, again: bool = False) -> None:
        super().__init__()
        self.layer, self.bn, self.order, self.again = layer, bn, order, again
        self.embed = nn.Linear(5 if rank else 6, 5 if rank else 6)
        self.own = norm(
            rank, 4 if isinstance(layer, nn.Conv2d) and layer.out_channels == 4 else 6, True, False, 5
        )

    def forward(self, x: Tensor) -> Tensor:
        x = SMOOTH(self.embed(x))
        y, z = self.own(self.layer(x)), self.bn(x)
        total = {
            "first": lambda: z + y,
            "second": lambda: y + z,
            "minus": lambda: y - z,
            "minus in a sum": lambda: x.flip(1) - (y - z),
            "below": lambda: (x.flip(1) - y) + z,
            "from nothing": lambda: 0 + z + 1 * y,
        }[self.order]()
        return SMOOTH(total) + y if self.again else SMOOTH(total)  # type: ignore[no-any-return]


ORDERS = ["first", "second", "minus", "minus in a sum", "below", "from nothing"]


@st.composite
def square_layers(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A layer that writes as many values as it reads, each at the middle of its kernel."""
    rank, bias = draw(st.integers(0, 3)), draw(st.booleans())
    if rank == 0:
        return nn.Linear(6, 6, bias=bias), 0
    kernel, dilation = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2))
    padding: Any = dilation * (kernel - 1) // 2
    options: dict[str, Any] = {"groups": draw(st.sampled_from([1, 2, 6])), "dilation": dilation, "bias": bias}
    options["padding"] = "same" if draw(st.booleans()) else padding
    return CONVOLUTIONS[rank](6, 6, kernel, **options), rank


@SETTINGS
@given(layer=square_layers(), order=st.sampled_from(ORDERS), zero=st.booleans(), seed=st.integers(0, 99))
def test_a_norm_beside_a_layer_becomes_a_part_of_it(
    layer: tuple[nn.Module, int], order: str, zero: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    module = Reparametrizable(layer[0], layer[1], norm(layer[1], 6, True, zero, seed), order)
    fused, certificate = certificate_of(module, torch.randn(2, 6, *[5] * layer[1], dtype=torch.float64))
    assert [row.into for row in fused.report.rows] == [("layer",)] * 2
    assert outcomes(fused) == {"folded"}
    assert certificate.max_relative <= 1e-12


@pytest.mark.parametrize(
    ("layer", "again"),
    [
        (nn.Conv2d(4, 4, 3, padding=2, dilation=1, stride=1), False),  # writes more values
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), True),  # its answer is also read elsewhere
        (nn.Conv2d(4, 4, 4, padding="same"), False),  # its kernel has no middle
        (nn.Conv2d(4, 4, 3, padding=1, stride=2), False),
    ],
)
def test_a_layer_that_cannot_take_what_is_beside_it_is_left_alone(layer: nn.Conv2d, again: bool) -> None:
    class Cut(Reparametrizable):
        def forward(self, x: Tensor) -> Tensor:
            x = SMOOTH(x)
            y = self.own(self.layer(x))
            total = y[:, :, :3, :3] + self.bn(x)[:, :, :3, :3] if y.shape != x.shape else y + self.bn(x)
            return SMOOTH(total) + SMOOTH(y).mean() * 0 if self.again else SMOOTH(total)  # type: ignore[no-any-return]

    bn = norm(2, 4, True, False, 1)
    module = Cut(layer, 2, bn, "first", again)
    fused, certificate = certificate_of(module, torch.randn(2, 4, 6, 6, dtype=torch.float64))
    assert {row.layer: row.outcome for row in fused.report.rows} == {"own": "folded", "bn": "kept"}
    assert certificate.max_relative <= 1e-12


# --- backward, past activations ---------------------------------------------------------------------------------------
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2, -0.1, 0.0, 1.5], dtype=x.dtype)),
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "two": lambda x: F.relu6(F.leaky_relu(x, 0.3)),
    "pooled": lambda x: F.avg_pool2d(F.relu(x), 3, 1, 1, count_include_pad=False),
}


class Mixer(nn.Module):
    """ConvMixer: convolution -> activation -> norm -> a residual sum around something that is not linear."""

    def __init__(self, activation: str, zero: bool, seed: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv, self.inner, self.fc = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(4, 2),
        )
        self.bn, self.inner_bn = norm(2, 4, True, zero, seed), norm(2, 4, True, False, seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.activation(self.conv(x)))
        x = SMOOTH(x + self.inner_bn(self.activation(self.inner(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@SETTINGS
@given(activation=st.sampled_from(sorted(ACTIVATIONS)), zero=st.booleans(), seed=st.integers(0, 99))
def test_a_norm_behind_an_activation_and_in_front_of_a_sum_folds_back(
    activation: str, zero: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    fused, certificate = certificate_of(
        Mixer(activation, zero, seed), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    )
    assert [(row.outcome, row.into) for row in fused.report.rows] == [
        ("folded", ("conv",)),
        ("folded", ("inner",)),
    ]
    assert certificate.max_relative <= 1e-12


def test_an_activation_keeps_its_bend_where_the_layer_behind_can_take_the_norm() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), norm(2, 4, True, False, 0), nn.Conv2d(4, 2, 1))
    fused, certificate = certificate_of(module, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert fused.report.rows[0].into == ("3",)
    assert "relu" in {info.op for info in fused.network.layers()}
    assert certificate.max_relative <= 1e-12


# --- samples spread over the first axis -------------------------------------------------------------------------------
@SETTINGS
@given(
    parts=st.integers(1, 4),
    inner=st.integers(1, 3),
    channels=st.integers(1, 4),
    alike=st.booleans(),
    data=st.data(),
)
def test_a_coefficient_is_reshaped_as_what_it_multiplies_is(
    parts: int, inner: int, channels: int, alike: bool, data: st.DataObject
) -> None:
    shape, spread = (None, parts, inner, channels), (None, inner, channels)
    t = torch.randn(1, 1 if alike else parts, inner, channels)
    got = reshaped(t, shape, spread)
    x = torch.randn(3, parts, inner, channels)
    want = (t * x).reshape(-1, inner, channels)
    if got is None:
        assert parts > 1
        assert not alike
    else:
        assert torch.equal(got * x.reshape(-1, inner, channels), want)
        back = reshaped(got, spread, shape)
        assert back is not None
        assert torch.equal(back * x, t * x)


class Windows(nn.Module):
    """A norm inside windows, which are samples of their own: in front of a layer, or (batch norm) behind one."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.behind, self.embed, self.fc = behind, nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 5)
        self.bn = norm(0, 4, True, True, 0)
        self.ln = nn.LayerNorm(4)
        nn.init.normal_(self.ln.weight)
        nn.init.normal_(self.ln.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        x = self.ln(SMOOTH(x)) if not self.behind else x
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        if self.behind:
            y = x.flatten(0, 1)
            x = SMOOTH(self.bn(y).reshape_as(y).reshape(x.shape))
        x = self.fc(x)
        return x.reshape(n, h // 2, w // 2, 4, 5).mean((1, 2, 3))


@pytest.mark.parametrize(
    ("behind", "expected"), [(False, ("partly", ("fc",))), (True, ("folded", ("embed",)))]
)
def test_windows_are_no_obstacle_where_all_are_treated_alike(behind: bool, expected: tuple[str, Any]) -> None:
    fused, certificate = certificate_of(Windows(behind), torch.randn(3, 3, 8, 8, dtype=torch.float64))
    assert [(row.outcome, row.into) for row in fused.report.rows] == [expected]
    assert certificate.max_relative <= 1e-12


# --- layers along other axes, stacks, states --------------------------------------------------------------------------
class Gated(nn.Module):
    """gMLP: a layer norm, a layer along the tokens, and a product with what passed beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.tokens, self.down = (
            nn.Linear(3, 8), nn.LayerNorm(4), nn.Linear(6, 6), nn.Linear(4, 2),
        )  # fmt: skip
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        u, v = SMOOTH(self.up(x)).chunk(2, -1)
        return self.down(u * self.tokens(self.norm(v).transpose(1, 2)).transpose(1, 2)).mean(1)  # type: ignore[no-any-return]


class TokensThenNorm(nn.Module):
    """A batch norm of channels behind a layer along the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions, self.bn = nn.Conv1d(3, 4, 1), nn.Linear(6, 5), norm(1, 4, True, True, 0)

    def forward(self, x: Tensor) -> Tensor:
        return SMOOTH(self.bn(self.positions(self.embed(x.transpose(1, 2))))).mean(2)  # type: ignore[no-any-return]


class Stacked(nn.Module):
    """Two signals in a stack, with a norm behind it, or in front of one of them."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.behind, self.a, self.b = behind, nn.Linear(3, 4), nn.Linear(3, 4)
        self.norm, self.fc, self.side = nn.LayerNorm(4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.bn = norm(2, 2, True, True, 0)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.behind:
            return SMOOTH(self.bn(torch.stack([self.a(x), self.b(x)], 1))).mean((1, 2, 3))  # type: ignore[no-any-return]
        pair = torch.stack([SMOOTH(self.a(x)), self.norm(SMOOTH(self.b(x)))], 1)
        return (self.fc(pair[:, 1]) + SMOOTH(self.side(pair[:, 0]))).mean(1)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, both_ways: bool, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(3) if bias else nn.RMSNorm(3)
        self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=both_ways, bias=bias)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.norm(x))[0].mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Gated(), ("partly", ("tokens", "down"))),
        (TokensThenNorm(), ("folded", ("embed",))),
        (Stacked(True), ("folded", ("b", "a"))),
        (Stacked(False), ("partly", ("fc",))),
        (Recurrent(True, True), ("partly", ("lstm",))),
        (Recurrent(False, True), ("partly", ("lstm",))),
        (Recurrent(False, False), ("partly", ("lstm",))),
    ],
    ids=lambda v: type(v).__name__,
)
def test_the_map_reaches_a_layer(module: nn.Module, expected: tuple[str, Any]) -> None:
    torch.manual_seed(0)
    fused, certificate = certificate_of(module, torch.randn(3, 6, 3, dtype=torch.float64))
    assert [(row.outcome, set(row.into)) for row in fused.report.rows] == [(expected[0], set(expected[1]))]
    assert certificate.max_relative <= 1e-12


# --- capture ----------------------------------------------------------------------------------------------------------
class Blocks(nn.Module):
    """Blocks in which gradients, or mixed precision, are switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), norm(2, 4, True, False, 0), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.enable_grad():
            y = self.bn(y)
            with torch.autocast("cpu", enabled=False):
                y, z = F.relu(y), y.sigmoid()
        with torch.no_grad():
            w = z * 2
        return self.fc((y * w).mean((2, 3)))  # type: ignore[no-any-return]


def test_blocks_with_other_modes_are_captured_as_what_they_compute() -> None:
    module = Blocks()
    fused, certificate = certificate_of(module, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert [(row.layer, row.outcome) for row in fused.report.rows] == [("bn", "folded")]
    assert all(info.op.startswith("wrap") is False for info in fused.network.layers())
    assert certificate.max_relative <= 1e-12
