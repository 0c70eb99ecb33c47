"""Rules that must not be mistaken: which values can be negative, which layers read the input, whose bounds hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusion
import lrp
from lrp.signs import non_negative
from tests.fusion.test_review_capture import Forward

F64 = torch.float64


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.add(x.relu(), x.abs(), alpha=-1),
        lambda m, x: torch.add(x.relu(), 2.0, alpha=-1),
        lambda m, x: torch.clamp_max(x.relu(), -1.0),
        lambda m, x: F.softplus(x, beta=-1),
        lambda m, x: x.relu() - 1,
        lambda m, x: x.relu() * -1,
        lambda m, x: F.prelu(x, torch.tensor([0.5])),
        lambda m, x: torch.cat([x.relu(), torch.full_like(x, -1.0)], 1),
    ],
)
def test_what_can_be_negative_is_not_called_non_negative(
    function: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    network = fusion.capture(Forward(function), (torch.randn(2, 4),))
    assert float(network(torch.randn(9, 4)).min()) < 0
    assert network.output_values[0] not in non_negative(network)


def test_a_difference_is_explained_alike_however_it_is_written() -> None:
    torch.manual_seed(0)
    parts = {
        "a": nn.Conv2d(3, 4, 3),
        "b": nn.Conv2d(3, 4, 3),
        "c": nn.Conv2d(4, 4, 3),
        "fc": nn.Linear(16, 3),
    }
    written = [
        lambda m, x: m.fc(m.c(m.a(x).relu() - m.b(x).relu()).flatten(1)),
        lambda m, x: m.fc(m.c(torch.add(m.a(x).relu(), m.b(x).relu(), alpha=-1)).flatten(1)),
    ]
    x = torch.randn(2, 3, 6, 6, dtype=F64)
    one, other = (lrp.explain(Forward(f, **parts).double(), x, 1, dtype=F64).relevance for f in written)
    torch.testing.assert_close(one, other)


def test_a_scaled_difference_from_a_number() -> None:
    conv, fc = nn.Conv2d(3, 4, 3), nn.Linear(16, 3)
    written = [
        lambda m, x: m.fc((1 - 2 * m.conv(x)).flatten(1)),
        lambda m, x: m.fc(torch.rsub(m.conv(x), 1.0, alpha=2.0).flatten(1)),
    ]
    x = torch.randn(2, 3, 4, 4, dtype=F64)
    one, other = (
        lrp.explain(Forward(f, conv=conv, fc=fc).double(), x, 1, dtype=F64).relevance for f in written
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * m.scale,
        lambda m, x: m.scale * x,
        lambda m, x: m.scale + x,
        lambda m, x: m.scale - x,
        lambda m, x: 1 - x,
        lambda m, x: -x,
        lambda m, x: (2 * x - 1) / 0.5,
        lambda m, x: x[:, :1].expand(-1, 3, -1, -1),
        lambda m, x: x[:, :1].repeat(1, 3, 1, 1),
    ],
)
@pytest.mark.parametrize("composite", ["EpsilonPlusFlat", "EpsilonGammaBox"])
def test_the_first_layer_is_found_behind_a_normalization_however_it_is_written(
    function: Callable[[nn.Module, Tensor], Tensor], composite: str
) -> None:
    module = nn.Sequential(
        Forward(function, scale=torch.randn(1, 3, 1, 1)), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    x = torch.randn(2, 3, 4, 4, dtype=F64)
    explainer = lrp.Explainer(module.double(), example=x, composite=composite, device="cpu", dtype=F64)
    assert explainer.table()[0][2].startswith(("Flat", "ZBox"))
    explainer.explain(x)


def test_a_square_is_no_shift_of_the_input() -> None:
    module = nn.Sequential(Forward(lambda m, x: x * x), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    explainer = lrp.Explainer(module, example=torch.randn(2, 3, 4, 4), composite="EpsilonGammaBox")
    assert explainer.table()[0][2].startswith("Gamma")


def test_two_first_layers_have_bounds_of_their_own() -> None:
    module = Forward(
        lambda m, x: m.fc((m.a(x) + m.b(-x)).flatten(1)),  # type: ignore[operator]
        a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), fc=nn.Linear(16, 3),
    ).double()  # fmt: skip
    x = torch.randn(2, 3, 4, 4, dtype=F64)
    narrow, wide = lrp.ZBox(-1.0, 1.0), lrp.ZBox(-5.0, 9.0)
    maps = [
        lrp.explain(module, x, 0, composite="EpsilonPlus", rules={"a": narrow, "b": b}, dtype=F64).relevance
        for b in (narrow, wide)
    ]
    assert not torch.allclose(*maps)


def test_a_softmax_over_parts_of_the_scores_is_no_final_softmax() -> None:
    module = Forward(lambda m, x: m.fc(x).reshape(-1, 3).softmax(1).reshape(-1, 6), fc=nn.Linear(4, 6))  # type: ignore[operator]
    x = torch.randn(2, 4)
    answer = lrp.Explainer(module, example=x).explain(x)
    torch.testing.assert_close(answer.output, module(x).detach())
