"""Folds: exact in float64 for every shape, stride, padding, group, sign and zero scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusion
from tests.nets import FAMILIES, bottleneck, family

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, int, int, int]:
    """A linear layer with its rank, input channels and output channels."""
    rank = draw(st.integers(0, 3))
    bias = draw(st.booleans())
    if rank == 0:
        inputs, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        return nn.Linear(inputs, outputs, bias=bias), 0, inputs, outputs
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    stride = draw(st.integers(1, 2))
    options: dict[str, Any] = {
        "stride": stride,
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": bias,
    }
    transposed = draw(st.booleans())
    if transposed:
        options["output_padding"] = draw(st.integers(0, stride - 1))
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[rank]
    return kind(inputs, outputs, draw(st.integers(1, 3)), **options), rank, inputs, outputs


def norm(rank: int, channels: int, affine: bool, zero: bool, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layer = NORMS[rank](channels, affine=affine)
    layer.running_mean = torch.randn(channels, generator=generator)
    layer.running_var = torch.rand(channels, generator=generator) + 0.1
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.randn(channels, generator=generator))  # signs of both kinds
            layer.bias.copy_(torch.randn(channels, generator=generator))
            if zero:
                layer.weight[0] = 0.0
    return layer


def certificate_of(module: nn.Module, x: Tensor) -> tuple[fusion.Fused, fusion.Certificate]:
    module = module.double().eval()
    fused = fusion.fuse(fusion.capture(module, (x,)))
    return fused, fusion.certify(module, fused.network, [x])


SETTINGS = settings(max_examples=25, deadline=None)


@SETTINGS
@given(layer=layers(), affine=st.booleans(), zero=st.booleans(), seed=st.integers(0, 99))
def test_a_norm_behind_a_linear_layer_folds_exactly(
    layer: tuple[nn.Module, int, int, int], affine: bool, zero: bool, seed: int
) -> None:
    linear, rank, inputs, outputs = layer
    torch.manual_seed(seed)
    x = torch.randn(3, inputs, *[7] * rank, dtype=torch.float64)
    fused, certificate = certificate_of(nn.Sequential(linear, norm(rank, outputs, affine, zero, seed)), x)
    assert [row.outcome for row in fused.report.rows] == ["folded"]
    assert fused.report.rows[0].into == ("0",)
    assert "batch_norm" not in {info.op for info in fused.network.layers()}
    assert certificate.max_relative <= 1e-12


@SETTINGS
@given(layer=layers(), affine=st.booleans(), zero=st.booleans(), seed=st.integers(0, 99))
def test_a_norm_in_front_of_a_linear_layer_folds_exactly(
    layer: tuple[nn.Module, int, int, int], affine: bool, zero: bool, seed: int
) -> None:
    linear, rank, inputs, _ = layer
    torch.manual_seed(seed)
    x = torch.randn(3, inputs, *[7] * rank, dtype=torch.float64)
    fused, certificate = certificate_of(nn.Sequential(norm(rank, inputs, affine, zero, seed), linear), x)
    assert [(row.outcome, row.into) for row in fused.report.rows] == [("folded", ("1",))]
    assert "batch_norm" not in {info.op for info in fused.network.layers()}
    assert certificate.max_relative <= 1e-12


@SETTINGS
@given(layer=layers(), seed=st.integers(0, 99))
def test_norms_on_both_sides_and_in_a_row_fold_exactly(
    layer: tuple[nn.Module, int, int, int], seed: int
) -> None:
    linear, rank, inputs, outputs = layer
    torch.manual_seed(seed)
    x = torch.randn(3, inputs, *[7] * rank, dtype=torch.float64)
    around = [norm(rank, c, True, False, seed + i) for i, c in enumerate((inputs, inputs, outputs, outputs))]
    fused, certificate = certificate_of(nn.Sequential(around[0], around[1], linear, around[2], around[3]), x)
    assert [(row.outcome, row.into) for row in fused.report.rows] == [("folded", ("2",))] * 4
    assert certificate.max_relative <= 1e-12


class Shared(nn.Module):
    """One convolution used twice, with a norm behind its first use only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), norm(2, 3, True, False, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.bn(self.conv(x))))  # type: ignore[no-any-return]


def test_weights_that_two_places_share_are_not_changed_for_the_other() -> None:
    _, certificate = certificate_of(Shared(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert certificate.max_relative <= 1e-12


class TwoReaders(nn.Module):
    """Two layers read one norm; a third reads the convolution in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), norm(2, 4, True, True, 0)
        self.left, self.right, self.side = (
            nn.Conv2d(4, 2, 3, padding=1),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        return self.left(z) + self.right(z).tanh() + self.side(y)  # type: ignore[no-any-return]


def test_a_norm_with_several_readers_folds_into_all_of_them() -> None:
    fused, certificate = certificate_of(TwoReaders(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert fused.report.rows[0].into == ("left", "right")
    assert certificate.max_relative <= 1e-12


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.bn, self.fc = nn.MaxPool2d(2), norm(2, 3, True, False, 0), nn.Linear(27, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.nn.functional.gelu(self.bn(self.pool(x))).flatten(1))  # type: ignore[no-any-return]


def test_what_cannot_fold_stays_with_a_reason() -> None:
    fused, certificate = certificate_of(Kept(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    (row,) = fused.report.rows
    assert (row.layer, row.outcome) == ("bn", "kept")
    assert "gelu" in row.reason
    assert certificate.max_absolute == 0


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm2d(3, track_running_stats=False), "statistics of the batch"),
        (nn.GroupNorm(1, 3, affine=False), "come from the input"),
        (nn.LayerNorm([3, 4, 4], elementwise_affine=False), "come from the input"),
        (nn.InstanceNorm2d(3), "come from the input"),
    ],
)
def test_norms_that_are_no_constant_map_stay_with_their_reason(layer: nn.Module, words: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Flatten(), nn.Linear(48, 2))
    fused, _ = certificate_of(module, torch.randn(3, 3, 4, 4, dtype=torch.float64))
    assert [row.outcome for row in fused.report.rows] == ["kept"]
    assert words in fused.report.rows[0].reason


def test_an_instance_norm_with_running_statistics_is_a_batch_norm() -> None:
    layer = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    layer.running_mean, layer.running_var = torch.randn(4), torch.rand(4) + 0.5
    fused, certificate = certificate_of(
        nn.Sequential(nn.Conv2d(3, 4, 3), layer), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    )
    assert fused.report.rows[0].outcome == "folded"
    assert certificate.max_relative <= 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_certificates_of_real_architectures(name: str) -> None:
    """In float32 of a network whose own rounding allows it, and in float64."""
    module = family(name, conditioned=True)
    network = fusion.capture(module, (torch.randn(1, 3, 64, 64),))
    x = torch.randn(8, 3, 64, 64)
    single = fusion.certify(module, fusion.fuse(network).network, [x])
    assert single.max_relative <= 1e-5
    in_double = fusion.fuse(network.to(dtype=torch.float64)).network
    double = fusion.certify(module.double(), in_double, [x.double()])
    assert double.max_relative <= 1e-12
    assert single.inputs == double.inputs == 8


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_network_is_as_near_to_the_truth_as_its_original(name: str) -> None:
    """Random weights make deep networks chaotic: in float32 ResNeXt-50 and GoogLeNet are up to 4e-5 from their own
    answer in float64. The fused network must not add to that."""
    module = family(name)
    fused = fusion.fuse(fusion.capture(module, (torch.randn(1, 3, 64, 64),))).network
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        original = module(x)
    module.double()
    own = fusion.certify(lambda x: module(x.double()), lambda _: original, [x]).max_relative
    single = fusion.certify(lambda x: module(x.double()), fused, [x]).max_relative
    assert single <= max(1e-5, 1.5 * own)


def test_the_built_in_network() -> None:
    from models.zoo.network import load_builtin

    module = load_builtin()
    network = fusion.capture(module, (torch.randn(1, 3, 128, 128),))
    fused = fusion.fuse(network)
    assert {row.outcome for row in fused.report.rows} == {"folded"}
    assert fusion.certify(module, fused.network, [torch.randn(8, 3, 128, 128)]).max_relative <= 1e-5


def test_every_norm_of_a_real_architecture_is_in_the_report() -> None:
    module = family("densenet121")
    rows = fusion.fuse(fusion.capture(module, (torch.randn(1, 3, 64, 64),))).report.rows
    names = {name for name, layer in module.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert {row.layer for row in rows} == names
    assert all(row.into for row in rows if row.outcome == "folded")
    assert all(row.reason for row in rows if row.outcome == "kept")


def test_the_network_given_to_fuse_stays_as_it_is() -> None:
    network = fusion.capture(bottleneck(), (torch.randn(1, 3, 16, 16),))
    before = {name: t.clone() for name, t in network.constants.items()}
    text = str(network.graph)
    fusion.fuse(network)
    assert str(network.graph) == text
    assert all(torch.equal(network.constants[name], t) for name, t in before.items())


def test_a_certificate_does_not_take_nan_for_agreement() -> None:
    certificate = fusion.certify(lambda x: x, lambda x: x * float("nan"), [torch.ones(1, 3)])
    assert certificate.max_absolute == float("inf")
