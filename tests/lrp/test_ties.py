"""Choices near a tie: shares by formula, no jump where the winner turns, nothing lost from the ledger."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lrp
from lrp.composites import Composite
from lrp.graft import spread
from lrp.ties import lead, shared

F64 = torch.float64
WIDTH = 0.1
PLAIN = Composite("plain", convolution=lrp.LRP0(), linear=lrp.LRP0())
TIED = replace(PLAIN, name="tied", tie_width=WIDTH)
WHERE = (0, 1)  # samples along the first axis


class Choosing(nn.Module):
    """A linear layer, a choice among its answers, and a linear layer, without biases."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Linear(24, 24, bias=False)
        self.register_buffer("bound", 0.3 * torch.randn(24))
        self.last = nn.Linear({"amax": 6, "amin": 1}.get(kind, 24), 3, bias=False)
        self.bound: Tensor

    def chosen(self, a: Tensor) -> Tensor:
        if self.kind == "amax":
            return a.reshape(-1, 4, 6).amax(1)
        if self.kind == "amin":
            return a.reshape(-1, 4, 6).amin((1, 2), keepdim=True).flatten(1)
        return torch.maximum(a, self.bound) if self.kind == "maximum" else torch.minimum(self.bound, a)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.chosen(self.first(x.flatten(1))))  # type: ignore[no-any-return]


def multipliers(net: Choosing, a: Tensor) -> Tensor:
    """[N, 24, outputs of the choice]: the part of each value that the choice hands relevance to, by the formulas."""
    width = WIDTH * a.square().mean(1, keepdim=True).sqrt()
    if net.kind in ("amax", "amin"):
        side = 1 if net.kind == "amax" else -1
        tokens = a.reshape(-1, 4, 6)
        axes = 1 if net.kind == "amax" else (1, 2)
        powers = (side * tokens / width[:, :, None]).exp()
        weights = (powers / powers.sum(axes, keepdim=True)).reshape(-1, 24, 1)
        if net.kind == "amin":
            return weights
        return weights * torch.eye(6, dtype=F64).repeat(4, 1)
    gap = a - net.bound if net.kind == "maximum" else net.bound - a
    return torch.diag_embed((gap / width).clamp(0, 1))


@pytest.mark.parametrize("kind", ["maximum", "minimum", "amax", "amin"])
def test_shares_by_formula(kind: str) -> None:
    net, x = Choosing(kind).double().eval(), torch.randn(3, 3, 4, 2, dtype=F64)
    answer = lrp.Explainer(net, composite=TIED, dtype=F64, device="cpu", example=x).explain(x, 1)
    a = x.flatten(1) @ net.first.weight.T
    g = (multipliers(net, a) @ net.last.weight[1]) @ net.first.weight
    want = (x.flatten(1) * g).reshape(x.shape)
    assert float((answer.relevance - want).abs().max()) <= 1e-12 * float(want.abs().max())
    assert torch.allclose(answer.output, net(x))
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) <= 1e-12


@pytest.mark.parametrize("kind", ["maximum", "minimum", "amax", "amin"])
def test_without_a_width_the_winner_takes_all(kind: str) -> None:
    net, x = Choosing(kind).double().eval(), torch.randn(3, 3, 4, 2, dtype=F64)
    got = lrp.Explainer(net, composite=PLAIN, dtype=F64, device="cpu", example=x).explain(x, 1).relevance
    (gradient,) = torch.autograd.grad(net(x.requires_grad_())[:, 1].sum(), x)
    want = (x * gradient).detach()
    assert float((got - want).abs().max()) <= 1e-12 * float(want.abs().max())


@pytest.mark.parametrize("composite", [PLAIN, TIED], ids=["winner", "tied"])
@pytest.mark.parametrize("kind", ["maximum", "amax"])
def test_relevance_jumps_where_the_winner_turns_unless_ties_have_a_width(
    kind: str, composite: Composite
) -> None:
    net = Choosing(kind).double().eval()
    x = torch.randn(1, 3, 4, 2, dtype=F64)
    a = (x.flatten(1) @ net.first.weight.T)[0]
    # Along a direction that moves one value only: to where it is as large as what it is compared with.
    direction = torch.linalg.inv(net.first.weight.detach())[:, 7]
    rival = net.bound[7] if kind == "maximum" else a.reshape(4, 6)[[0, 2, 3], 1].max()
    to = rival - a[7]
    direction = direction * to / (net.first.weight @ direction)[7]
    explainer = lrp.Explainer(net, composite=composite, dtype=F64, device="cpu", example=x)
    maps = []
    for side in (-1e-9, 1e-9):
        step = (x.flatten(1) + (1 + side) * direction).reshape(x.shape)
        maps.append(explainer.explain(step.detach(), 1).relevance)
    jump = float((maps[1] - maps[0]).abs().max() / maps[0].abs().max())
    assert (jump > 1e-3) if composite is PLAIN else (jump < 1e-6)


def test_a_clear_winner_takes_all_and_equals_share_alike() -> None:
    x = torch.tensor([[1.0, 5.0, -2.0], [2.0, 2.0, -9.0]], dtype=F64)
    carried = shared(x.requires_grad_(), [1], 1.0, 0.01, x, WHERE)
    (gradient,) = torch.autograd.grad(carried.sum(), x)
    assert torch.allclose(gradient, torch.tensor([[0.0, 1, 0], [0.5, 0.5, 0]], dtype=F64))
    assert torch.allclose(carried[:, 0], torch.tensor([5.0, 2], dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zeros_masks_and_infinite_values_are_finite(dtype: torch.dtype) -> None:
    nothing = torch.zeros(2, 4, dtype=dtype)
    assert bool((lead(nothing, nothing[0], 1.0, WIDTH, nothing, WHERE) == 0).all())
    masked = torch.full((2, 4), -torch.inf, dtype=dtype)
    masked[1, 2] = 3.0
    for x in (nothing, masked):
        leaf = x.clone().requires_grad_()
        carried = shared(leaf, [1], 1.0, WIDTH, x, WHERE)
        (gradient,) = torch.autograd.grad(carried.sum(), leaf)
        assert bool(carried.isfinite().all())
        assert bool(gradient.isfinite().all())
    assert float(carried[1]) == 3.0
    assert torch.equal(gradient[1].double(), torch.tensor([0.0, 0, 1, 0], dtype=F64))


def test_spread_is_each_samples_own() -> None:
    x = torch.randn(2 * 3, 5, dtype=F64)  # three windows of each of two samples, samples slower
    got = spread(x, torch.zeros(2), WHERE)
    want = x.reshape(2, -1).square().mean(1).sqrt().repeat_interleave(3)[:, None]
    assert torch.allclose(got, want)


def test_a_table_of_a_composite_says_so() -> None:
    assert "ties within 0.1" in str(TIED)
    assert "ties" not in str(PLAIN)
