"""How good heatmaps are: localization against a mask, faithfulness by flipping pixels, and how sure that is.

All metrics read heatmaps [N, H, W], relevance summed over channels, and answer one number per image [N] in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Pooling = Literal["positive", "absolute"]
_POOLING: dict[Pooling, Callable[[Tensor], Tensor]] = {
    "positive": lambda heat: heat.clamp(min=0),
    "absolute": torch.abs,
}


# --- localization ---------------------------------------------------------------------------------------------------
def mass_accuracy(heat: Tensor, mask: Tensor, pooling: Pooling = "positive") -> Tensor:
    """Relevance mass accuracy: the share of the relevance that lies in the mask (Arras et al. 2022,
    doi:10.1016/j.inffus.2021.11.008; positive relevance as there, or magnitudes).

    heat [N, H, W], mask [N, H, W] of bools -> [N] in 0..1; 0 for a map without any relevance.
    """
    mass = _POOLING[pooling](heat.double())
    total = mass.flatten(1).sum(1)
    inside = (mass * mask).flatten(1).sum(1)
    return torch.where(total > 0, inside / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def rank_accuracy(heat: Tensor, mask: Tensor, pooling: Pooling = "positive") -> Tensor:
    """Relevance rank accuracy: of the K pixels with most relevance, K the size of the mask, the share in the mask
    (Arras et al. 2022). Of pixels with equal relevance every one is as likely to be among the K, and the
    expectation is taken, so that a map of zeros scores like chance.

    heat [N, H, W], mask [N, H, W] of bools -> [N] in 0..1; 0 for an empty mask.
    """
    values, inside = _POOLING[pooling](heat.double()).flatten(1), mask.flatten(1)
    sizes = inside.sum(1)
    ordered = values.sort(1, descending=True).values
    least = ordered.gather(1, (sizes - 1).clamp(min=0)[:, None])
    above, level = values > least, values == least
    chance = (sizes - above.sum(1)).double() / level.sum(1)
    hits = (above & inside).sum(1) + chance * (level & inside).sum(1)
    return torch.where(sizes > 0, hits / sizes.clamp(min=1), 0.0)


# --- faithfulness ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flipping:
    """How pixels are flipped.

    patch: the side of the square regions, in pixels (must divide height and width). steps: how many portions all
    regions are flipped in. fill: what a flipped pixel becomes, one number or one per channel, in the network's units.
    seed: of the order among regions with equal relevance.
    """

    patch: int
    steps: int
    fill: float | tuple[float, ...] = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Flipped:
    """The target's probability [N, steps + 1], from the whole image to the empty one, with the most important regions
    flipped first (`mif`) and the least important first (`lif`)."""

    mif: Tensor
    lif: Tensor

    @property
    def gain(self) -> Tensor:
        """Symmetric relevance gain: the area between the curves, AUC(LIF) - AUC(MIF) (Bluecher et al. 2024,
        arXiv:2401.06654): [N], 0 for a random order on average."""
        return area(self.lif) - area(self.mif)


def area(curve: Tensor) -> Tensor:
    """The area under curves [N, steps + 1] over the share of flipped pixels 0..1, by trapezoids: [N]."""
    return (curve[:, 1:] + curve[:, :-1]).mean(1) / 2


def region_order(heat: Tensor, flipping: Flipping) -> Tensor:
    """Regions (row by row) with the most relevant first: [N, regions]. Ties are in an order drawn once."""
    sums = F.avg_pool2d(heat.double()[:, None], flipping.patch).flatten(1)
    shuffle = torch.randperm(sums.shape[1], generator=torch.Generator().manual_seed(flipping.seed))
    shuffle = shuffle.to(heat.device)
    return shuffle[sums[:, shuffle].argsort(dim=1, descending=True, stable=True)]


@torch.no_grad()
def flip_pixels(
    scores: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, heat: Tensor, flipping: Flipping
) -> Flipped:
    """The two curves of pixel flipping (Bach et al. 2015; Samek et al. 2017, arXiv:1509.06321).

    scores: images [N, C, H, W] -> class scores [N, K], whose softmax gives probabilities. target: class indices [N].
    heat: [N, H, W]. The least relevant first is the reverse of the most relevant first. Raises ValueError where the
    patch does not divide the image.
    """
    n, _, height, width = x.shape
    side = flipping.patch
    if height % side or width % side:
        raise ValueError(f"Patches of {side} pixels do not divide an image of {height} x {width}.")
    order = region_order(heat, flipping)
    regions = order.shape[1]
    fill = torch.as_tensor(flipping.fill, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)
    # When a region is flipped: its place in the order.
    place = torch.empty_like(order).scatter_(1, order, torch.arange(regions, device=x.device).expand(n, -1))

    def curve(places: Tensor) -> Tensor:
        grid = places.reshape(n, 1, height // side, width // side)
        when = grid.repeat_interleave(side, 2).repeat_interleave(side, 3)
        values = []
        for step in range(flipping.steps + 1):
            gone = when < round(step * regions / flipping.steps)
            probability = scores(torch.where(gone, fill, x)).double().softmax(1)
            values.append(probability.gather(1, target[:, None])[:, 0])
        return torch.stack(values, 1)

    return Flipped(curve(place), curve(regions - 1 - place))


# --- certainty ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    """A mean (or median) over images with its 95 % interval; `images` says over how many."""

    value: float
    low: float
    high: float
    images: int

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @property
    def differs_from_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """`0.512 ± 0.010`, or `0.512 [0.50, 0.53]` where the interval is not symmetric."""
        plus = "+" if sign else ""
        if not math.isfinite(self.value):
            return "-"
        up, down = self.high - self.value, self.value - self.low
        if abs(up - down) <= 1e-6 * max(abs(up), abs(down), 1e-12):
            return f"{self.value:{plus}.{digits}f} ± {up:.{digits}f}"
        return f"{self.value:{plus}.{digits}f} [{self.low:{plus}.{digits}f}, {self.high:{plus}.{digits}f}]"


_NORMAL = 1.959963984540054  # the 97.5th percentile of the standard normal distribution


def mean_estimate(values: Tensor | Sequence[float]) -> Estimate:
    """The mean over images with its normal 95 % interval, mean ± 1.96 s / sqrt(n). NaN, where it is not defined, is an
    error of the caller: ValueError."""
    t = torch.as_tensor(values, dtype=torch.float64)
    if len(t) < 2 or not bool(torch.isfinite(t).all()):
        raise ValueError("An interval needs two finite values at least.")
    mean, half = float(t.mean()), _NORMAL * float(t.std()) / math.sqrt(len(t))
    return Estimate(mean, mean - half, mean + half, len(t))


def paired_difference(ours: Tensor, theirs: Tensor) -> Estimate:
    """The mean of the differences, image by image, with its normal 95 % interval."""
    if ours.shape != theirs.shape:
        raise ValueError("Paired values come from the same images.")
    return mean_estimate(ours.double() - theirs.double())


def median_estimate(values: Tensor | Sequence[float], resamples: int = 2000, seed: int = 0) -> Estimate:
    """The median over images with its 95 % bootstrap percentile interval, for values with heavy tails."""
    array = np.asarray(torch.as_tensor(values, dtype=torch.float64))
    if len(array) < 2 or np.isnan(array).any():
        raise ValueError("An interval needs two values at least, and no NaN.")
    draws = np.random.default_rng(seed).integers(0, len(array), (resamples, len(array)))
    medians = np.median(array[draws], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Estimate(float(np.median(array)), float(low), float(high), len(array))
