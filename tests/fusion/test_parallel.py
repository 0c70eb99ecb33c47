"""Parallel: layers that read the same values and are added become one; what only looks like that is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion
import lrp
from fusion.network import op_name
from fusion.passes import Merge, Obstacle, carry_out_certified, plan_parallel
from fusion.report import Merged
from tests.fusion.test_folds import certificate_of, norm


def layers_of(fused: fusion.Fused) -> list[str]:
    return [info.layer for info in fused.network.layers() if info.op.startswith(("conv", "linear"))]


class Beside(nn.Module):
    """Layers beside each other between two activations, their answers added."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        total = self.layers[0](x)
        for layer in self.layers[1:]:
            total = layer(x) + total
        return total.tanh()  # type: ignore[no-any-return]


# Two layers, and the one of them that has a place for the other (of two alike, the one on the left of the sum).
PAIRS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...], str]] = {
    "linear": (nn.Linear(6, 4), nn.Linear(6, 4, bias=False), (6,), "layers.1"),
    "one bias": (nn.Conv1d(6, 4, 3, bias=False), nn.Conv1d(6, 4, 3), (6, 9), "layers.1"),
    "one tap": (nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1), (6, 7, 7), "layers.1"),
    "strided": (
        nn.Conv2d(6, 4, 3, padding=1, stride=2, groups=2),
        nn.Conv2d(6, 4, 1, stride=2, groups=2),
        (6, 7, 8),
        "layers.0",
    ),
    "dilated": (
        nn.Conv2d(6, 4, 5, padding=4, dilation=2),
        nn.Conv2d(6, 4, 3, padding=2, dilation=2),
        (6, 9, 9),
        "layers.0",
    ),
    "named padding": (
        nn.Conv2d(6, 4, 3, padding="same"),
        nn.Conv2d(6, 4, 1, padding="valid"),
        (6, 7, 7),
        "layers.0",
    ),
    "over three axes": (
        nn.Conv3d(6, 4, 3, padding=1),
        nn.Conv3d(6, 4, (1, 3, 1), padding=(0, 1, 0)),
        (6, 4, 5, 6),
        "layers.0",
    ),
    "transposed": (
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        (6, 5, 5),
        "layers.1",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_layers_of_the_same_values_become_one(name: str) -> None:
    first, second, shape, kept = PAIRS[name]
    fused, certificate = certificate_of(Beside(first, second), torch.randn(2, *shape, dtype=torch.float64))
    assert layers_of(fused) == [kept]
    assert {m.into for m in fused.report.merged} == {kept}
    assert certificate.max_relative <= 1e-12


def test_a_kernel_takes_in_smaller_ones_wherever_they_look() -> None:
    """An asymmetric convolution block (Ding et al. 2019, arXiv:1908.03930), and a tap that is not in the middle."""
    layers = [
        nn.Conv2d(3, 4, (1, 3), padding=(0, 1)),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, (3, 1), padding=(1, 0)),
    ]
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    fused, certificate = certificate_of(Beside(*layers), x)
    assert layers_of(fused) == ["layers.1"]
    assert set(fused.report.merged) == {Merged("layers.0", "layers.1"), Merged("layers.2", "layers.1")}
    assert certificate.max_relative <= 1e-12

    upper = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    lower = nn.Conv2d(3, 4, (2, 2), padding=1, stride=2)
    fused, certificate = certificate_of(Beside(upper, lower), x)
    assert layers_of(fused) == ["layers.0"]
    assert certificate.max_relative <= 1e-12


class Around(nn.Module):
    """What layers make of the same values, added, and the values themselves; a norm behind."""

    def __init__(self, rank: int, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.behind = nn.ModuleList(layers), norm(rank, 4, True, False, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        total = self.layers[0](x)
        for layer in self.layers[1:]:
            total = total + layer(x)
        return self.behind(total + x).tanh()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layer", "other", "rank"),
    [
        (nn.Linear(4, 4), nn.Linear(4, 4), 0),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1, groups=4), 2),
        (nn.Conv1d(4, 4, 5, padding=4, dilation=2, groups=2), nn.Conv1d(4, 4, 1, groups=2), 1),
    ],
)
def test_a_block_takes_in_the_values_themselves(layer: nn.Module, other: nn.Module, rank: int) -> None:
    """RepViT's block: a layer with a norm, another one, and the values; the sum is one layer, so the norm behind it
    folds too."""
    module = Around(rank, nn.Sequential(layer, norm(rank, 4, True, True, 0)), other)
    fused, certificate = certificate_of(module, torch.randn(3, 4, *[5] * rank, dtype=torch.float64))
    assert {info.op for info in fused.network.layers()} <= {"tanh", "conv1d", "conv2d", "linear"}
    assert [row.into for row in fused.report.rows] == [("layers.0.0",)] * 2
    assert [m.into for m in fused.report.merged] == ["layers.0.0"] * 2
    assert certificate.max_relative <= 1e-12


def test_values_beside_one_layer_are_a_skip_connection() -> None:
    module = Around(2, nn.Conv2d(4, 4, 3, padding=1))
    fused, _ = certificate_of(module, torch.randn(3, 4, 5, 5, dtype=torch.float64))
    assert fused.report.merged == ()
    assert "add" in {info.op for info in fused.network.layers()}


APART: dict[str, tuple[nn.Module, nn.Module]] = {
    "groups": (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    "dilation": (nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1)),
    "kernels across": (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), nn.Conv2d(4, 4, (3, 1), padding=(1, 0))),
    "between taps": (nn.Conv2d(4, 4, 2, padding=1, dilation=2), nn.Conv2d(4, 4, 1)),
    "kinds": (nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
    "transposed": (nn.ConvTranspose2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 1)),
}


@pytest.mark.parametrize("name", APART)
def test_layers_without_a_common_place_stay_apart(name: str) -> None:
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    fused, certificate = certificate_of(Beside(*APART[name]), x)
    assert layers_of(fused) == ["layers.0", "layers.1"]
    assert fused.report.merged == ()
    assert certificate.max_absolute == 0


class Read(nn.Module):
    """Two layers that could be one, but for what the sum says or what else reads them."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        a, b = self.first(x), self.second(x)
        if self.why == "an answer read again":
            return (a + b).tanh() + b.sin()
        if self.why == "other values":
            return (a + self.second(x.sin())).tanh()  # type: ignore[no-any-return]
        return torch.add(a, b, alpha=2).tanh()


@pytest.mark.parametrize("why", ["an answer read again", "other values", "a multiple"])
def test_what_is_read_elsewhere_or_reads_something_else_stays(why: str) -> None:
    fused, _ = certificate_of(Read(why), torch.randn(3, 4, dtype=torch.float64))
    assert fused.report.merged == ()


class Branches(nn.Module):
    """MobileOne's block: two convolutions, one of a single tap, and the values, each normalized, all added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 3)
        options: dict[str, Any] = {"groups": 4, "bias": False}
        self.wide = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, **options) for _ in range(2))
        self.scale = nn.Conv2d(4, 4, 1, **options)
        self.norms = nn.ModuleList(norm(2, 4, True, False, seed) for seed in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        first, second, scale, skip = self.norms
        total = (skip(x) + scale(self.scale(x))) + first(self.wide[0](x)) + second(self.wide[1](x))
        return self.head(total.relu().mean((2, 3)))  # type: ignore[no-any-return]

    def written(self) -> nn.Module:
        """The same with one convolution in the place of the block."""
        conv = nn.Conv2d(4, 4, 3, padding=1, groups=4).double()
        conv.weight.data.zero_()
        conv.bias.data.zero_()  # type: ignore[union-attr]
        one = torch.ones(4, 1, 1, 1, dtype=torch.float64)
        taps = [nn.functional.pad(t, (1, 1, 1, 1)) for t in (self.scale.weight.data, one)]
        for bn, kernel in zip(self.norms, [*(c.weight.data for c in self.wide), *taps], strict=True):  # type: ignore[misc]
            s = bn.weight.data / (bn.running_var + bn.eps).sqrt()  # type: ignore[operator,union-attr]
            conv.weight.data += s[:, None, None, None] * kernel  # type: ignore[index]
            conv.bias.data += bn.bias.data - s * bn.running_mean  # type: ignore[operator,union-attr]
        behind = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.head]
        return nn.Sequential(self.stem, nn.ReLU(), conv, *behind).eval()


@pytest.mark.parametrize("composite", ["EpsilonPlusFlat", "EpsilonPlusFlatSteady", "GammaPlusFlat"])
def test_an_explanation_does_not_depend_on_how_a_layer_is_spelled(composite: str) -> None:
    module = Branches().double().eval()
    x = torch.randn(2, 3, 11, 11, dtype=torch.float64)
    spelled, written = (
        lrp.Explainer(m, composite=composite, dtype=torch.float64, device="cpu", example=x).explain(x, 1)
        for m in (module, module.written())
    )
    assert float((spelled.output - written.output).abs().max()) <= 1e-12
    gap = (spelled.relevance - written.relevance).abs().max()
    assert float(gap / written.relevance.abs().max()) <= 1e-10


def test_a_report_tells_and_measures_what_was_merged() -> None:
    network = fusion.capture(Branches().double().eval(), (torch.randn(2, 3, 11, 11, dtype=torch.float64),))
    report = fusion.fuse(network, certified=True).report
    assert report.certificate is not None
    assert report.certificate <= 1e-13
    # The plain norm of the values goes into the layer beside it as before.
    (into,) = {m.into for m in report.merged}
    assert {m.layer for m in report.merged} | {into} == {"wide.0", "wide.1", "scale"}
    assert all(row.into == (into,) for row in report.rows)
    assert {"layer": "scale", "into": into} in report.to_json()["merged"]
    assert f"merged  {into}" in str(report)


def merge_of(network: fusion.Network) -> Merge:
    return plan_parallel(network, next(n for n in network.calls() if op_name(n) == "add"))


def test_a_merge_has_a_certificate_that_finds_errors_out() -> None:
    module = Beside(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)).double().eval()
    network = fusion.capture(module, (torch.randn(2, 4, 5, 5, dtype=torch.float64),))
    right = network.copy()
    assert carry_out_certified(right, merge_of(right)) <= 1e-14
    right.graph.lint()

    wrong = network.copy()
    plan = merge_of(wrong)

    def spoil() -> None:
        wrong.constants["layers.0.bias"] = wrong.constants["layers.0.bias"] + 1

    spoiled = Merge(
        (*plan.edits, spoil), plan.into, (), plan.region, plan.unchanged, gone="", taker=plan.taker
    )
    assert carry_out_certified(wrong, spoiled) > 1e-3


def test_what_is_no_sum_has_no_merge() -> None:
    network = fusion.capture(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval(), (torch.randn(2, 4),))
    for node in network.calls():
        with pytest.raises(Obstacle):
            plan_parallel(network, node)
