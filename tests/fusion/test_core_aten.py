"""A program decomposed to core ATen is the network that it was: the same operators, folds and heatmap."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import lrp
from fusion import Network, from_exported, fuse

SIZE = 12
Function = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A function of feature maps [N, 6, 12, 12] between a convolution and a classifier."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = function  # a module's parameters become its own
        with torch.no_grad():
            features = function(torch.zeros(2, 6, SIZE, SIZE)).flatten(1).shape[1]
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.conv(x)).flatten(1))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """A module of tokens [N, T, 6] on feature maps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, :, :3, :3].flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention of two heads, with a mask or without."""

    def __init__(self, mask: Tensor | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.register_buffer("mask", mask)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, self.mask, scale=self.scale)  # type: ignore[arg-type]
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Computed(nn.Module):
    """A layer without a bias for one part of what it answers (EVA-02), another of weights of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("none", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, torch.cat([self.bias, self.none]))  # type: ignore[list-item]
        return F.linear(y.relu(), F.normalize(self.other, dim=1))


class MultiHead(nn.Module):
    """torch's own attention, which lays tokens before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Moved(nn.Module):
    """A module of tokens that lie before the samples."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


class Bounded(nn.Module):
    """An activation that is cut off above."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_max(0.4)


class Scaled(nn.Module):
    """A scale and a shift per channel, as global response normalization has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.rand(6, 1, 1) + 0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, self.scale, x)


ACTIVATIONS: dict[str, Function] = {
    **{name: getattr(F, name) for name in (
        "relu6", "hardtanh", "hardsigmoid", "silu", "hardswish", "mish", "elu", "celu", "selu", "softplus", "gelu",
        "softshrink", "hardshrink", "leaky_relu",
    )},
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus of another slope": lambda x: F.softplus(x, beta=2.5),
    "hardshrink of another width": lambda x: F.hardshrink(x, 0.1),
    "threshold": lambda x: F.threshold(x, 0.2, -0.7),
    "clamped from below": lambda x: x.clamp_min(0.2),
    "clamped from above, in the layer behind": nn.Sequential(nn.BatchNorm2d(6), Bounded(), nn.Conv2d(6, 4, 3)),
    "clamped from above": lambda x: x.clamp_max(0.2),
    "one less": lambda x: 1 - x.sigmoid(),
}  # fmt: skip
LAYERS: dict[str, Function] = {
    "group norm": nn.GroupNorm(2, 6),
    "instance norm": nn.InstanceNorm2d(6, affine=True),
    "instance norm without parameters": nn.InstanceNorm2d(6),
    "instance norm with running statistics": nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "batch norm": nn.BatchNorm2d(6),
    "layer norm": nn.LayerNorm(SIZE),
    "layer norm of tokens": Tokens(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))),
    "local response norm": nn.LocalResponseNorm(3),
    "PReLU": nn.PReLU(),
    "PReLU per channel": nn.Sequential(nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 4, 3)),
    "max pool": nn.Sequential(nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(6, 4, 3)),
    "adaptive average pool": nn.AdaptiveAvgPool2d(5),
    "global average pool": nn.AdaptiveAvgPool2d(1),
    "adaptive max pool": nn.AdaptiveMaxPool2d(3),
    "reflection": nn.Sequential(nn.BatchNorm2d(6), nn.ReflectionPad2d((1, 2, 0, 3)), nn.Conv2d(6, 4, 3)),
    "replication": nn.Sequential(nn.BatchNorm2d(6), nn.ReplicationPad2d((1, 2, 0, 3)), nn.Conv2d(6, 4, 3)),
    "roll": lambda x: torch.roll(x, (2, -5), (2, 3)),
    "linear layer of maps": nn.Linear(SIZE, 4),
    "linear layer of tokens": Tokens(nn.Linear(6, 4)),
    "linear layer of moved tokens": Tokens(Moved(nn.Linear(6, 4))),
    "linear layer of weights and biases that are computed": Tokens(Computed()),
    "product of maps": lambda x: x @ x.transpose(-1, -2),
    "attention": Tokens(Attention()),
    "attention with a mask": Tokens(Attention(torch.linspace(-1, 1, 81).reshape(9, 9))),
    "attention with a closed mask": Tokens(Attention(torch.ones(9, 9).tril(-1) > 0)),
    "attention of another scale": Tokens(Attention(scale=0.3)),
    "attention of one head": lambda x: F.scaled_dot_product_attention(x[:, 0], x[:, 1], x[:, 2]),
    "attention of torch's": Tokens(MultiHead()),
    "unit vectors": lambda x: F.normalize(x, dim=1),
    "lengths": lambda x: torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) * x,
    "scale and shift in one operator": nn.Sequential(Scaled(), nn.Conv2d(6, 4, 3)),
    "log-sum-exp pool": lambda x: torch.logsumexp(x, (2, 3)),
    "log-sum-exp pool that keeps its axes": lambda x: torch.logsumexp(x, 1, keepdim=True),
    "circular padding": lambda x: F.pad(x, (1, 1, 2, 2), mode="circular"),
    "gated linear unit": lambda x: F.glu(x, 1),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, size=(17, 9), mode="nearest-exact"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x[:, :4], 2),
    "patches": lambda x: F.unfold(x, 3),
    "patches put together": lambda x: F.fold(F.unfold(x, 3) ** 2, (SIZE, SIZE), 3),
    "log-softmax": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.LogSoftmax(1)),
}


def both(module: nn.Module) -> tuple[Network, Network, Tensor]:
    """The network of a module's program, that of the program decomposed, and images."""
    module = module.eval().double()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1 and bool((tensor == tensor[0]).all()):
                tensor.uniform_(0.5, 1.5)  # or no mistake in them would show
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    stored = io.BytesIO()  # which leaves defaults out and names every result
    torch.export.save(program.run_decompositions(), stored)
    stored.seek(0)
    return from_exported(program), from_exported(torch.export.load(stored)), x


def agree(plain: Network, decomposed: Network, x: Tensor) -> None:
    """The same answers, folds, rules and relevance."""
    torch.testing.assert_close(decomposed(x), plain(x), rtol=1e-12, atol=1e-12)
    fused = [fuse(network) for network in (plain, decomposed)]
    rows = [[(row.op, row.outcome) for row in found.report.rows] for found in fused]
    assert rows[1] == rows[0]
    explainers = [lrp.Explainer(found.network, composite="auto", dtype=torch.float64) for found in fused]
    assert explainers[1].reason == explainers[0].reason
    results = [explainer.explain(x, 1) for explainer in explainers]
    scale = float(results[0].relevance.abs().max())
    torch.testing.assert_close(results[1].relevance, results[0].relevance, rtol=0, atol=1e-9 * scale)
    ledger = results[1].ledger
    assert ledger is not None
    assert float(ledger.error.max()) < 1e-9


@pytest.mark.parametrize("name", [*ACTIVATIONS, *LAYERS])
def test_a_decomposed_network_is_explained_like_the_network(name: str) -> None:
    torch.manual_seed(0)
    agree(*both(Around({**ACTIVATIONS, **LAYERS}[name])))


@pytest.mark.parametrize(
    "kernel", ["_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"]
)
def test_a_processors_own_attention_is_attention(kernel: str) -> None:
    """As programs have it that older exporters decomposed."""
    own = getattr(torch.ops.aten, kernel)

    def parts(x: Tensor) -> list[Tensor]:
        return [x[:, 2 * i : 2 * i + 2] for i in range(3)]

    networks, x = [], torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    for attend in (
        lambda x: own(*parts(x), scale=0.4)[0],
        lambda x: F.scaled_dot_product_attention(*parts(x), scale=0.4),
    ):
        torch.manual_seed(0)
        module = Around(attend).eval().double()
        networks.append(from_exported(torch.export.export(module, (x,), dynamic_shapes=({0: Dim.AUTO},))))
    assert "scaled_dot_product_attention" in {layer.op for layer in networks[0].layers()}
    agree(networks[1], networks[0], x)


def test_results_that_only_training_reads_are_no_reason_to_guess() -> None:
    """Where a norm's statistics are read as well, the operator stays what it is."""

    def statistics(x: Tensor) -> Tensor:
        y, mean, _ = torch.ops.aten.native_layer_norm(x, [SIZE], None, None, 1e-5)
        return y + mean

    x = torch.randn(2, 3, SIZE, SIZE)
    program = torch.export.export(Around(statistics).eval(), (x,), dynamic_shapes=({0: Dim.AUTO},))
    network = from_exported(program)
    torch.testing.assert_close(network(x), program.module()(x))
    assert not any(layer.op == "layer_norm" for layer in network.layers())
