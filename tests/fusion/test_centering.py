"""LayerNorm's centering goes into everything that writes what it reads, or stays with the reason."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusion
import lrp
from fusion.network import op_name


def normalization(*shape: int, affine: bool = True) -> nn.LayerNorm:
    layer = nn.LayerNorm(shape, elementwise_affine=affine)
    if affine:
        nn.init.normal_(layer.weight, 1.0, 0.3)
        nn.init.normal_(layer.bias, 0.0, 0.3)
    return layer


class Block(nn.Module):
    """A pre-norm transformer block, with LayerScale."""

    def __init__(self, width: int, heads: int, *, affine: bool, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = normalization(width, affine=affine), normalization(width, affine=affine)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.up, self.down = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width, bias=bias)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.scale * self.out(y.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Patches, a class token, position embeddings, blocks, a last norm and a head."""

    def __init__(
        self, width: int, heads: int = 2, depth: int = 2, *, affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4, bias=bias)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*[Block(width, heads, affine=affine, bias=bias) for _ in range(depth)])
        self.norm, self.head = normalization(width, affine=affine), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


def fused_and_difference(module: nn.Module, x: Tensor) -> tuple[fusion.Fused, float]:
    module = module.double().eval()
    fused = fusion.fuse(fusion.capture(module, (x.double(),)), certified=True)
    return fused, fusion.certify(module, fused.network, [x.double()]).max_relative


def operators(network: fusion.Network) -> list[str]:
    return [op_name(node) for node in network.calls()]


@settings(max_examples=8, deadline=None)
@given(
    width=st.sampled_from([2, 4, 6, 10]),
    depth=st.integers(1, 3),
    affine=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_transformers_layer_norms_become_rms_norms(
    width: int, depth: int, affine: bool, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    fused, difference = fused_and_difference(
        Transformer(width, 2, depth, affine=affine, bias=bias), torch.randn(3, 3, 8, 8)
    )
    assert difference <= 1e-12
    assert fused.report.certificate is not None
    assert fused.report.certificate <= 1e-12
    assert "layer_norm" not in operators(fused.network)
    assert operators(fused.network).count("rms_norm") == 2 * depth + 1
    assert {row.outcome for row in fused.report.rows} == {"partly"}
    writers = {"patches", *(f"blocks.{i}.{name}" for i in range(depth) for name in ("out", "down"))}
    assert all(writers <= set(row.into) for row in fused.report.rows)


def test_everything_on_the_stream_is_centred() -> None:
    module = Transformer(6).double().eval()
    network = fusion.fuse(fusion.capture(module, (torch.randn(1, 3, 8, 8).double(),))).network
    x = torch.randn(3, 3, 8, 8).double()
    values: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Watch(network.module).run(x)
    read = [node.args[0] for node in network.calls() if op_name(node) == "rms_norm"]
    assert len(read) == 5
    for node in read:
        value = values[node.name]  # type: ignore[union-attr]
        assert float(value.mean(-1).abs().max()) <= 1e-13 * float(value.abs().max())


class ChannelsLast(nn.Module):
    """ConvNeXt's stem: a norm over the channels behind a convolution, in another layout."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 2, stride=2, groups=groups), normalization(6)
        self.head = nn.Conv2d(6, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(y).flatten(1)  # type: ignore[no-any-return]


def test_behind_a_permutation_and_a_convolution() -> None:
    fused, difference = fused_and_difference(ChannelsLast(), torch.randn(2, 3, 8, 8))
    assert difference <= 1e-12
    (row,) = fused.report.rows
    assert (row.outcome, set(row.into)) == ("partly", {"conv", "head"})
    assert "root mean square" in row.reason


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.ConvTranspose1d(3, 6, 3), normalization(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


def test_behind_a_transposed_convolution() -> None:
    fused, difference = fused_and_difference(Transposed(), torch.randn(2, 3, 5))
    assert difference <= 1e-12
    assert operators(fused.network).count("rms_norm") == 1


class Stream(nn.Module):
    """A stream with one norm, and something else done with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.write, self.norm, self.read = nn.Linear(4, 6), normalization(6), nn.Linear(6, 5)
        self.other, self.wide = nn.Linear(6, 5), nn.LayerNorm((3, 6))
        self.joined, self.after = normalization(18), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        if self.kind == "gelu writes":
            x = torch.nn.functional.gelu(x)
        y = self.read(self.norm(x)).mean(1)
        match self.kind:
            case "linear reads":
                return y + self.other(x).mean(1)
            case "output shows":
                return torch.cat([y, x.mean(1)], -1)
            case "several axes":
                return y + self.other(self.wide(x)).mean(1)
            case "merging reads":  # like Swin's patch merging: one mean for three tokens
                return y + self.after(self.joined(x.flatten(1)))  # type: ignore[no-any-return]
            case "scaled sum":
                return y + self.other(self.norm(x + x.amax(-1, keepdim=True))).mean(1)
        return y


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("linear reads", "'other' (linear) reads its mean too"),
        ("output shows", "reads its mean too"),
        ("several axes", "normalizes over several axes"),
        ("merging reads", "reads its mean too"),
        ("gelu writes", "(gelu) writes it"),
        ("scaled sum", "adds the same number to all values"),
    ],
)
def test_a_mean_that_somebody_needs_stays(kind: str, words: str) -> None:
    fused, difference = fused_and_difference(Stream(kind), torch.randn(2, 3, 4))
    assert difference <= 1e-12
    assert "rms_norm" not in operators(fused.network)
    assert any("its centering stays" in row.reason and words in row.reason for row in fused.report.rows)


def test_grouped_layers_are_not_mixed() -> None:
    fused, _ = fused_and_difference(ChannelsLast(groups=3), torch.randn(2, 3, 8, 8))
    assert "'conv' writes it in groups" in fused.report.rows[0].reason


def test_a_norm_that_keeps_its_own_scale() -> None:
    """Behind the last norm is the output: scale and shift stay, the centering goes all the same."""
    module = nn.Sequential(nn.Linear(4, 6), normalization(6))
    fused, difference = fused_and_difference(module, torch.randn(5, 4))
    assert difference <= 1e-12
    (row,) = fused.report.rows
    assert row.into == ("0",)
    assert "its scale and shift stay: the network's output shows it" in row.reason
    assert operators(fused.network) == ["linear", "rms_norm", "add"]


@pytest.mark.parametrize("composite", ["EpsilonPlus", "EpsilonPlusFlat"])
def test_relevance_is_accounted_for(composite: str) -> None:
    network = fusion.capture(Transformer(6).double().eval(), (torch.randn(1, 3, 8, 8).double(),))
    answer = lrp.Explainer(network, composite=composite, dtype=torch.float64).explain(torch.randn(2, 3, 8, 8))
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) <= 1e-10
    assert bool((answer.relevance.abs().sum((1, 2, 3)) > 0).all())


def test_lrp0_through_a_root_mean_square_is_the_gradient_with_the_statistics_held() -> None:
    """Written out: R = x * d/dx of the network whose norms divide by a constant."""
    module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.RMSNorm(6), nn.Linear(6, 3, bias=False)).double()
    nn.init.normal_(module[1].weight)
    x = torch.randn(3, 4, dtype=torch.float64)
    first, gamma, last = module[0].weight, module[1].weight, module[2].weight
    rms = ((x @ first.T).square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
    want = x * ((last[1] * gamma / rms) @ first)
    network = fusion.capture(module, (x,))
    composite = lrp.composites.build("EpsilonPlus").override({"*": lrp.rules.LRP0()})
    got = lrp.Explainer(network, composite=composite, dtype=torch.float64).explain(x, 1).relevance
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-12)


class TokensFirst(nn.Module):
    """torchvision's and torch's own attention computes in [tokens, batch, channels]."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, width), normalization(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)
        self.after, self.head = normalization(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.after(x)).mean(1)  # type: ignore[no-any-return]


@settings(max_examples=6, deadline=None)
@given(tokens=st.sampled_from([2, 7, 65, 197]), seed=st.integers(0, 100))
def test_a_batch_that_is_not_the_first_axis(tokens: int, seed: int) -> None:
    """The shift is the same for all tokens, however a matrix product rounds each of them."""
    torch.manual_seed(seed)
    fused, difference = fused_and_difference(TokensFirst(), torch.randn(3, tokens, 4))
    assert difference <= 1e-12
    assert {row.outcome for row in fused.report.rows} == {"partly"}
    assert operators(fused.network).count("rms_norm") == 2
    assert not any("bias_map" in name for name in fused.network.constants)
