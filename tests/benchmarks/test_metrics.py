"""The metrics against cases worked out by hand, against the formulas written out, and against Quantus where it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from benchmarks.metrics import (
    Flipping,
    Pooling,
    area,
    flip_pixels,
    mass_accuracy,
    mean_estimate,
    median_estimate,
    paired_difference,
    rank_accuracy,
    region_order,
)

F64 = torch.float64
HEAT = torch.tensor([[[4.0, -8.0, 1.0], [0.0, 3.0, 0.0]]])
MASK = torch.tensor([[[True, True, False], [False, False, True]]])


def test_mass_accuracy_by_hand() -> None:
    assert mass_accuracy(HEAT, MASK).tolist() == [4 / 8]
    assert mass_accuracy(HEAT, MASK, "absolute").tolist() == [12 / 16]


def test_rank_accuracy_by_hand() -> None:
    # Three pixels: 4 (inside), 3 and 1 (outside).
    assert rank_accuracy(HEAT, MASK).tolist() == [1 / 3]
    # 8 and 4 (inside), 3 (outside).
    assert rank_accuracy(HEAT, MASK, "absolute").tolist() == [2 / 3]


def test_ties_are_shared() -> None:
    # 4 is in; the two places left go to four pixels with 1, of which one is in the mask.
    heat = torch.tensor([[[4.0, 1.0, 1.0], [1.0, 1.0, 0.0]]])
    mask = torch.tensor([[[True, True, False], [False, False, True]]])
    assert rank_accuracy(heat, mask).item() == pytest.approx((1 + 2 / 4) / 3)


def test_a_map_of_zeros_scores_like_chance_in_rank_and_nothing_in_mass() -> None:
    zeros = torch.zeros(2, 2, 3)
    masks = torch.stack([MASK[0], torch.tensor([[True, False, False], [False, False, False]])])
    torch.testing.assert_close(rank_accuracy(zeros, masks), torch.tensor([0.5, 1 / 6], dtype=F64))
    assert mass_accuracy(zeros, masks).tolist() == [0, 0]


def test_an_empty_mask_has_no_hits() -> None:
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool)
    assert rank_accuracy(HEAT, nothing).tolist() == [0]
    assert mass_accuracy(HEAT, nothing).tolist() == [0]


@pytest.mark.parametrize("pooling", ["positive", "absolute"])
def test_localization_is_its_formula(pooling: Pooling) -> None:
    heat = torch.randn(20, 7, 5, dtype=F64)
    mask = torch.rand(20, 7, 5) < 0.3
    for h, m, mass, rank in zip(
        heat.numpy(), mask.numpy(), mass_accuracy(heat, mask, pooling), rank_accuracy(heat, mask, pooling),
        strict=True,
    ):  # fmt: skip
        pooled = np.abs(h) if pooling == "absolute" else np.maximum(h, 0)
        assert mass.item() == pytest.approx(pooled[m].sum() / pooled.sum(), rel=1e-12)
        top = np.argsort(-pooled, axis=None)[: m.sum()]
        assert rank.item() == pytest.approx(m.flatten()[top].mean(), rel=1e-12)


# --- pixel flipping ------------------------------------------------------------------------------------------------
def scores(x: Tensor) -> Tensor:
    """Two classes: the weighed sum of the pixels against nothing."""
    weights = torch.tensor([[3.0, 1.0], [0.0, -2.0]], dtype=F64)
    total = (x[:, 0] * weights).sum((1, 2))
    return torch.stack([total, torch.zeros_like(total)], 1)


def test_flipping_by_hand() -> None:
    x = torch.ones(1, 1, 2, 2, dtype=F64)
    heat = torch.tensor([[[3.0, 1.0], [0.0, -2.0]]])
    flipped = flip_pixels(scores, x, torch.tensor([0]), heat, Flipping(patch=1, steps=4))
    sums = {"mif": [2, -1, -2, -2, 0], "lif": [2, 4, 4, 3, 0]}  # what is left of 3 + 1 + 0 - 2
    expected = {name: [1 / (1 + math.exp(-s)) for s in values] for name, values in sums.items()}
    assert flipped.mif[0].tolist() == pytest.approx(expected["mif"])
    assert flipped.lif[0].tolist() == pytest.approx(expected["lif"])
    areas = {name: np.trapezoid(values, dx=1 / 4) for name, values in expected.items()}
    assert flipped.gain.item() == pytest.approx(areas["lif"] - areas["mif"])
    assert flipped.gain.item() > 0.4


def test_the_gain_changes_sign_with_the_map() -> None:
    x, heat = torch.rand(4, 1, 2, 2, dtype=F64), torch.randn(4, 2, 2, dtype=F64)
    target, flipping = torch.tensor([0, 1, 0, 1]), Flipping(patch=1, steps=4)
    one, other = (flip_pixels(scores, x, target, h, flipping).gain for h in (heat, -heat))
    torch.testing.assert_close(one, -other)


def occluded(x: Tensor, heat: Tensor, side: int, share: int, fill: list[float], most: bool) -> Tensor:
    """One image with its `share` most (or least) relevant patches filled, written with loops."""
    _, height, width = x.shape
    patches = [(r, c) for r in range(0, height, side) for c in range(0, width, side)]
    patches.sort(key=lambda p: float(heat[p[0] : p[0] + side, p[1] : p[1] + side].sum()), reverse=most)
    x = x.clone()
    for r, c in patches[:share]:
        x[:, r : r + side, c : c + side] = torch.tensor(fill, dtype=x.dtype)[:, None, None]
    return x


def test_flipping_is_its_formula() -> None:
    head = torch.randn(3 * 6 * 8, 5, dtype=F64) / 5

    def linear(x: Tensor) -> Tensor:
        return x.flatten(1) @ head

    x, heat = torch.randn(3, 3, 6, 8, dtype=F64), torch.randn(3, 6, 8, dtype=F64)
    target = torch.tensor([4, 0, 2])
    fill = [0.5, -1.0, 2.0]
    flipping = Flipping(patch=2, steps=6, fill=tuple(fill))
    flipped = flip_pixels(linear, x, target, heat, flipping)
    for curves, most in ((flipped.mif, True), (flipped.lif, False)):
        for i in range(3):
            images = [occluded(x[i], heat[i], 2, 2 * step, fill, most) for step in range(7)]
            expected = linear(torch.stack(images)).softmax(1)[:, target[i]]
            torch.testing.assert_close(curves[i], expected)


def test_patches_divide_the_image() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        flip_pixels(scores, torch.ones(1, 1, 2, 2), torch.tensor([0]), torch.ones(1, 2, 2), Flipping(3, 1))


def test_equal_regions_come_in_an_order_that_favours_no_side() -> None:
    order = region_order(torch.zeros(2, 8, 8), Flipping(patch=1, steps=1))
    assert torch.equal(order[0], order[1])
    assert not torch.equal(order[0], torch.arange(64))
    assert sorted(order[0].tolist()) == list(range(64))


def test_the_area_of_a_straight_line() -> None:
    assert area(torch.tensor([[1.0, 0.5, 0.0]])).item() == pytest.approx(0.5)


# --- intervals -----------------------------------------------------------------------------------------------------
def test_an_interval_by_hand() -> None:
    estimate = mean_estimate([1.0, 2.0, 3.0, 4.0])
    assert estimate.value == 2.5
    half = 1.959963984540054 * math.sqrt(5 / 3) / 2
    assert (estimate.low, estimate.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert estimate.images == 4
    assert estimate.text(2) == "2.50 ± 1.27"


def test_a_paired_interval_ignores_what_both_share() -> None:
    base = torch.randn(100, dtype=F64) * 50
    noise = torch.randn(100, dtype=F64) * 0.1
    difference = paired_difference(base + 1 + noise, base)
    assert difference.low < 1 < difference.high
    assert difference.high - difference.low < 0.1
    assert difference.differs_from_zero


@pytest.mark.parametrize(
    ("estimate", "truth"), [(mean_estimate, 1.0), (median_estimate, math.log(2))], ids=["mean", "median"]
)
def test_95_percent_of_the_intervals_have_the_truth(estimate: Callable[..., object], truth: float) -> None:
    """Exponential values, whose mean is 1 and whose median is log 2."""
    rng = np.random.default_rng(0)
    draws: npt.NDArray[np.float64] = rng.exponential(size=(400, 200))
    found = [estimate(torch.from_numpy(values)) for values in draws]
    covered = np.mean([f.low < truth < f.high for f in found])  # type: ignore[attr-defined]
    assert 0.91 < covered < 0.98


@pytest.mark.parametrize("estimate", [mean_estimate, median_estimate])
def test_what_is_not_defined_is_refused(estimate: Callable[..., object]) -> None:
    for values in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="interval"):
            estimate(values)


# --- the field's own implementation ----------------------------------------------------------------------------------
def test_localization_is_what_quantus_says() -> None:
    quantus = pytest.importorskip("quantus")
    heat, mask = torch.rand(6, 8, 8, dtype=F64), torch.rand(6, 8, 8) < 0.3
    images = np.zeros((6, 1, 8, 8))
    settings = {"disable_warnings": True, "display_progressbar": False, "abs": False, "normalise": False}
    pairs = (
        (mass_accuracy, quantus.RelevanceMassAccuracy),
        (rank_accuracy, quantus.RelevanceRankAccuracy),
    )
    for ours, theirs in pairs:
        expected = theirs(**settings)(
            model=None, x_batch=images, y_batch=np.zeros(6, int), a_batch=heat.numpy()[:, None],
            s_batch=mask.numpy()[:, None],
        )  # fmt: skip
        np.testing.assert_allclose(ours(heat, mask).numpy(), expected, rtol=1e-9)


def test_flipping_is_what_quantus_says() -> None:
    quantus = pytest.importorskip("quantus")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    x, heat = torch.randn(4, 1, 8, 8), torch.randn(4, 8, 8)
    target = torch.tensor([0, 1, 2, 1])
    expected = quantus.PixelFlipping(
        features_in_step=4, perturb_baseline=0.25, disable_warnings=True, display_progressbar=False,
        abs=False, normalise=False, return_auc_per_sample=False,
    )(
        model=model, x_batch=x.numpy(), y_batch=target.numpy(), a_batch=heat.numpy()[:, None], softmax=True,
        device="cpu",
    )  # fmt: skip
    got = flip_pixels(model, x, target, heat, Flipping(patch=1, steps=16, fill=0.25)).mif
    # Quantus leaves the whole image out of the curve.
    np.testing.assert_allclose(got[:, 1:].numpy(), np.asarray(expected), rtol=1e-4, atol=1e-6)
