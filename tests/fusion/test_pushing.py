"""Pushing: an affine map passes whatever it commutes with, exactly, until a linear layer takes it, or it stays."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fusion
from fusion.network import Network, annotate
from tests.fusion.test_folds import certificate_of, norm

aten = torch.ops.aten

CHANNELS = 4
X = (2, CHANNELS, 8, 8)

# Operators between a normalization and the next convolution; all keep [N, 4, H, W].
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(x, 2, 1, 1),
    "average pool without padding": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "zero pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "constant pad": lambda x: F.pad(x, (1, 1), value=0.3),
    "reflection pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replication pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "flip": lambda x: x.flip(1),
    "slice": lambda x: x[:, :, 1:],
    "shuffle": lambda x: x.reshape(x.shape[0], 2, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    "split and join": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "join with its relu": lambda x: torch.cat([x, F.relu(x)], 1)[:, 2:6],
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "times two": lambda x: x * 2.0,
    "one minus": lambda x: 1.0 - x,
    "layer scale": lambda x: x * torch.linspace(-1, 1, CHANNELS, dtype=x.dtype).reshape(1, -1, 1, 1),
}


class Between(nn.Module):
    """norm -> operators -> conv, with a residual around the operators where asked for."""

    def __init__(self, names: list[str], residual: bool, first: bool, zero: bool, seed: int) -> None:
        super().__init__()
        self.names, self.residual = names, residual
        self.conv0 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) if first else nn.Identity()
        self.bn = norm(2, CHANNELS, True, zero, seed)
        self.conv = nn.Conv2d(CHANNELS, 3, 3, padding=1)
        self.side = nn.Conv2d(CHANNELS, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv0(F.relu(x)))
        y = x
        for name in self.names:
            y = BETWEEN[name](y)
        result = self.conv(y).mean((2, 3))
        return torch.cat([result, self.side(x).mean((2, 3))], 1) if self.residual else result


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(BETWEEN)), max_size=3),
    residual=st.booleans(),
    first=st.booleans(),
    zero=st.booleans(),
    seed=st.integers(0, 50),
)
def test_every_chain_is_exact_and_takes_the_norm(
    names: list[str], residual: bool, first: bool, zero: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    fused, certificate = certificate_of(
        Between(names, residual, first, zero, seed), torch.randn(X, dtype=torch.float64)
    )
    assert certificate.max_relative <= 1e-12
    if not _varies_before_a_max_pool(names):
        assert [row.outcome for row in fused.report.rows] == ["folded"]


def _varies_before_a_max_pool(names: list[str]) -> bool:
    """Behind padding the shift is another one at the border, and max(x + t) is no max(x) + t then."""
    pads = [i for i, name in enumerate(names) if name in ("zero pad", "constant pad", "average pool")]
    return any(name == "max pool" and any(pad < i for pad in pads) for i, name in enumerate(names))


class Residual(nn.Module):
    """A norm behind a residual sum: only backward, into both branches."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.fc = norm(2, 4, True, False, 3), nn.Linear(4, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        branches = self.a(x) + self.b(torch.tanh(x))  # of the same values they would be one layer
        return self.fc(self.activation(self.bn(branches)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("activation", [F.relu, F.gelu, torch.sigmoid])
def test_a_norm_behind_a_sum_folds_into_both_summands(activation: Callable[[Tensor], Tensor]) -> None:
    fused, certificate = certificate_of(Residual(activation), torch.randn(X, dtype=torch.float64))
    assert set(fused.report.rows[0].into) == {"a", "b"}
    assert certificate.max_relative <= 1e-12


class Dense(nn.Module):
    """DenseNet: norm -> relu -> conv behind a growing concatenation that many norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(norm(2, 4 + 2 * i, True, i == 1, i) for i in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.first(x)]
        for bn, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(bn(torch.cat(features, 1)))))
        return self.fc(F.relu(self.norms[3](torch.cat(features, 1))).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_densenet_folds_whole() -> None:
    fused, certificate = certificate_of(Dense(), torch.randn(X, dtype=torch.float64))
    assert {row.outcome for row in fused.report.rows} == {"folded"}
    assert certificate.max_relative <= 1e-12


class Tokens(nn.Module):
    """A transformer block: layer norms, layer scale, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 8, 2, 2)
        self.n1, self.n2, self.head_norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.RMSNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        for layer in (self.n1, self.n2, self.head_norm):
            nn.init.normal_(layer.weight, 1.0, 0.5)
            if getattr(layer, "bias", None) is not None:
                nn.init.normal_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.n1(x)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.scale * self.proj(y)
        x = x + self.down(F.gelu(self.up(self.n2(x))))
        return self.head(self.head_norm(x).mean(1))  # type: ignore[no-any-return]


def test_the_affine_part_of_layer_norms_folds_into_their_readers() -> None:
    fused, certificate = certificate_of(Tokens(), torch.randn(X, dtype=torch.float64))
    assert [(row.layer, row.outcome, row.into) for row in fused.report.rows] == [
        ("n1", "partly", ("qkv",)),
        ("n2", "partly", ("up",)),
        ("head_norm", "partly", ("head",)),
    ]
    # The layer scale went into the projection in front of it.
    assert "mul" not in {info.op for info in fused.network.layers()}
    assert certificate.max_relative <= 1e-12


@pytest.mark.parametrize("name", ["silu", "gelu", "hardswish", "sigmoid", "softmax"])
def test_what_is_not_piecewise_linear_is_named_as_the_reason(name: str) -> None:
    function = {"softmax": lambda x: F.softmax(x, 1)}.get(name) or getattr(F, name)

    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = norm(2, 4, True, False, 0), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(function(self.bn(F.max_pool2d(x, 2)))).mean((2, 3))  # type: ignore[no-any-return]

    fused, certificate = certificate_of(Smooth(), torch.randn(X, dtype=torch.float64))
    assert fused.report.rows[0].outcome == "kept"
    assert name in fused.report.rows[0].reason
    assert certificate.max_absolute == 0


def deep(kind: str, depth: int) -> Network:
    """Layers of convolution, batch norm and ReLU as a chain or around residual sums, the norm behind the convolution or
    in front of the activation. Written as a graph: to capture hundreds of layers takes longer than to fuse them."""
    graph, constants = fx.Graph(), {}
    x = graph.placeholder("x")
    x.meta |= {"shape": (None, 4, 4, 4), "dtype": torch.float32, "layer": ""}

    def constant(name: str, value: Tensor) -> fx.Node:
        constants[name] = value
        return graph.create_node("get_attr", name)

    def convolved(i: int, y: fx.Node) -> fx.Node:
        weights = constant(f"{i}.weight", torch.randn(4, 4, 3, 3)), constant(f"{i}.bias", torch.randn(4))
        return graph.call_function(aten.conv2d.default, (y, *weights, [1, 1], [1, 1]))

    def normalized(i: int, y: fx.Node) -> fx.Node:
        tensors = [constant(f"{i}.norm.{n}", torch.rand(4) + 0.5) for n in ("weight", "bias", "mean", "var")]
        return graph.call_function(aten.batch_norm.default, (y, *tensors, False, 0.1, 1e-5, False))

    for i in range(depth):
        if kind == "pre-activation":
            y = convolved(i, graph.call_function(aten.relu.default, (normalized(i, x),)))
        else:
            y = graph.call_function(aten.relu.default, (normalized(i, convolved(i, x)),))
        x = y if kind == "chain" else graph.call_function(aten.add.Tensor, (x, y))
    graph.output(x)
    return annotate(Network(graph, constants))


@pytest.mark.parametrize("kind", ["chain", "residual", "pre-activation"])
def test_the_time_of_fusion_grows_linearly_and_stays_below_two_seconds(kind: str) -> None:
    """In the time of the processor: the wall's depends on who else is running."""
    torch.manual_seed(0)
    networks = {depth: deep(kind, depth) for depth in (150, 300, 600)}
    seconds: dict[int, list[float]] = {depth: [] for depth in networks}
    for _ in range(3):  # interleaved, so that all see the same machine
        for depth, network in networks.items():
            started = time.process_time()
            assert fusion.fuse(network).report.count("folded") == depth
            seconds[depth].append(time.process_time() - started)
    best = {depth: min(times) for depth, times in seconds.items()}
    assert best[300] <= 2.0
    # Four times the depth: 4 where time grows linearly, 16 where it grows with the square.
    assert best[600] / best[150] <= 6.5
