"""Which places of an output count: a box, a mask, or where a channel wins over all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fusion.errors import BadTarget

WINS: Literal["wins"] = "wins"


@dataclass(frozen=True)
class Box:
    """Rows top to bottom - 1 and columns left to right - 1 of the network's input, or of the output itself.

    In pixels of the input, a place of the output counts where the box touches the part of the image that it stands for
    (an output of h rows divides the image into h parts of one height).
    """

    top: int
    left: int
    bottom: int
    right: int
    of: Literal["input", "output"] = "input"

    def __str__(self) -> str:
        where = "pixels of the input" if self.of == "input" else "places of the output"
        return f"rows {self.top} to {self.bottom - 1} and columns {self.left} to {self.right - 1} ({where})"


# A mask is a tensor, or anything that becomes one.
Region: TypeAlias = Box | Literal["wins"] | Any


def in_box(box: Box, places: tuple[int, ...], image: tuple[int, int]) -> Tensor:
    """1 in the box and 0 elsewhere, [H, W] of the output. Raises BadTarget for a box that is empty or not inside."""
    if len(places) != 2:
        raise BadTarget(
            "A box needs an output with rows and columns: give a mask, an index or a channel here."
        )
    height, width = image if box.of == "input" else places
    if not (0 <= box.top < box.bottom <= height and 0 <= box.left < box.right <= width):
        raise BadTarget(
            f"The box [{box.top}, {box.left}, {box.bottom}, {box.right}] (top, left, bottom, right) is empty or "
            f"outside of the {box.of}, which has {height} rows and {width} columns."
        )
    rows = _span(box.top, box.bottom, height, places[0])
    columns = _span(box.left, box.right, width, places[1])
    weights = torch.zeros(places)
    weights[rows, columns] = 1
    return weights


def _span(start: int, stop: int, size: int, places: int) -> slice:
    """The places, of so many over an axis of this size, that touch [start, stop)."""
    return slice(start * places // size, -(-stop * places // size))


def in_mask(mask: Any, samples: int, places: tuple[int, ...], image: tuple[int, int]) -> Tensor:
    """The weights of a mask [*places] or [N, *places], or of one in pixels of the input [H, W] or [N, H, W], of which
    every place takes the mean of its part. Raises BadTarget."""
    try:
        found = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadTarget(
            f"The region {str(mask)[:80]!r} is none: give a Box, a mask, or 'wins' (where the channel wins)."
        ) from error
    found = found.detach().to(torch.float64)
    if not bool(found.isfinite().all()):
        raise BadTarget("The mask contains NaN or infinity. Give finite weights.")
    if tuple(found.shape) in (places, (samples, *places)):
        return found
    if len(places) == 2 and tuple(found.shape) in (image, (samples, *image)):
        return adaptive_avg_pool2d(found.reshape(1, -1, *image), places).reshape(*found.shape[:-2], *places)
    pixels = f", or {list(image)} in pixels of the input," if len(places) == 2 and places != image else ""
    raise BadTarget(
        f"The mask has shape {list(found.shape)}; the output's places are {list(places)}{pixels} with the images first "
        "where each has its own."
    )


def winners(values: Tensor) -> tuple[Tensor, Tensor]:
    """(the channel that wins at every place [N, ...], and which one does at the most places [N]) of values
    [N, channels, ...]; of a single channel, 0 where it is positive and -1 elsewhere."""
    if values.shape[1] == 1:
        winning = torch.where(values[:, 0] > 0, 0, -1)
        return winning, torch.zeros(len(values), dtype=torch.int64, device=values.device)
    winning = values.argmax(1)
    counts = torch.stack([row.bincount(minlength=values.shape[1]) for row in winning.flatten(1)])
    return winning, counts.argmax(1)


def tally(winning: Tensor) -> str:
    """Which channels win in one image, and at how many places, the most first."""
    counts = winning[winning >= 0].flatten().bincount()
    order = counts.argsort(descending=True, stable=True)[:10].tolist()
    return ", ".join(f"{i} ({int(counts[i])} places)" for i in order if counts[i]) or "none"
