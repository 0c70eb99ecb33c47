"""Folds around layers that have a bias and an addition behind them, and a report that is true for shared layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusion
from tests.fusion.test_folds import certificate_of, norm


class Added(nn.Module):
    """A layer with a bias vector, a constant in the shape of its output added behind it, and a norm around them."""

    def __init__(
        self, layer: nn.Module, size: tuple[int, ...], rank: int, channels: int, before: bool
    ) -> None:
        super().__init__()
        self.layer, self.bn, self.before = layer, norm(rank, channels, True, False, 0), before
        self.register_buffer("position", torch.randn(1, *size))

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return self.layer(self.bn(x)) + self.position  # type: ignore[no-any-return,operator]
        return self.bn(self.layer(x) + self.position)  # type: ignore[no-any-return,operator]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Added(nn.Conv2d(3, 4, 3, padding=1), (4, 6, 6), 2, 4, False), (3, 6, 6)),
        (lambda: Added(nn.Conv2d(3, 4, 3, padding=1), (4, 6, 6), 2, 3, True), (3, 6, 6)),
        (lambda: Added(nn.Linear(5, 4), (4,), 0, 4, False), (5,)),
        (lambda: Added(nn.Linear(5, 4), (4,), 0, 5, True), (5,)),
        (lambda: Added(nn.Conv2d(3, 4, 3, bias=False), (4, 4, 4), 2, 4, False), (3, 6, 6)),
        (lambda: Added(nn.Conv2d(3, 4, 3, padding=1, bias=False), (4, 6, 6), 2, 3, True), (3, 6, 6)),
    ],
)
def test_a_bias_and_an_addition_behind_it_are_both_counted_once(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    _, certificate = certificate_of(make(), torch.randn(2, *shape, dtype=torch.float64))
    assert certificate.max_relative <= 1e-12


class NormTwice(nn.Module):
    """One norm behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.bn = norm(2, 3, True, False, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.second(torch.relu(self.bn(self.first(x)))))  # type: ignore[no-any-return]


def test_each_use_of_a_shared_norm_is_reported_where_it_went() -> None:
    fused, _ = certificate_of(NormTwice(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert [(row.layer, row.into) for row in fused.report.rows] == [("bn", ("first",)), ("bn", ("second",))]


class NormReadTwice(nn.Module):
    """One norm applied twice to the input: one application folds, the other one stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), norm(2, 3, True, False, 0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(self.bn(x))) + self.bn(x)  # type: ignore[no-any-return]


def test_a_fold_is_not_reported_under_the_name_of_another_use() -> None:
    fused, _ = certificate_of(NormReadTwice(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert [(row.outcome, row.into) for row in fused.report.rows] == [("folded", ("conv",)), ("kept", ())]
    assert isinstance(fused, fusion.Fused)
