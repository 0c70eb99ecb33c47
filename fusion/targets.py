"""Target shapes that were written down for one batch size: where in them the batch is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def expanded(wanted: Sequence[int], sizes: Sequence[int], axis: int, declared: int) -> int | None:
    """The dimension of an expansion's target that holds the batch, `declared` in it; None where the target follows the
    batch by itself or cannot. `sizes` are those of the tensor for one sample, `axis` the one that the batch is in."""
    place = axis + len(wanted) - len(sizes)
    return place if place >= 0 and wanted[place] == sizes[axis] * declared else None


def reshaped(
    wanted: Sequence[int], sizes: Sequence[int], axis: int, declared: int, *, zero_copies: bool = False
) -> tuple[list[int], int] | None:
    """A reshape's target with all of its sizes, and the dimension that holds the batch; None as for `expanded`.

    Memory order says between which sizes it goes, then neighbours decide. zero_copies: a size of 0 is the tensor's
    own, as in ONNX.
    """
    full = list(wanted)
    for i, size in enumerate(full):
        if size == 0 and zero_copies and i < len(sizes):
            full[i] = sizes[i] * (declared if i == axis else 1)
    total = math.prod(sizes) * declared
    if -1 in full:
        others = -math.prod(full)
        if not others or total % others:
            return None
        full[full.index(-1)] = total // others
    if math.prod(full) != total:
        return None
    place = _place(full, sizes, axis, declared)
    if place is None or wanted[place] in (-1, 0):
        return None  # the target already follows
    return full, place


def _place(wanted: Sequence[int], sizes: Sequence[int], axis: int, declared: int) -> int | None:
    """The target's dimension that takes the batch.

    With the batch at the outer end of its dimension, as many elements lie before it as in the dimensions
    before; at the inner end, that dimension's own factor comes on top.
    """
    outer = math.prod(sizes[:axis])
    starts = (outer, outer * sizes[axis])
    prefixes = list(itertools.accumulate(wanted, lambda a, b: a * b, initial=1))
    for start in starts:  # a dimension of its own
        for i, size in enumerate(wanted):
            if prefixes[i] == start and size == declared:
                return i
    if declared == 1:
        return _joined(wanted, prefixes, starts, sizes[axis + 1 :])
    for start in starts:  # the dimension that its factor lies in
        for i in range(len(wanted)):
            if start % prefixes[i] == 0 and prefixes[i + 1] % (start * declared) == 0:
                return i
    return None


def _joined(
    wanted: Sequence[int], prefixes: Sequence[int], starts: Sequence[int], behind: Sequence[int]
) -> int | None:
    """The same for a batch of one, whose factor could lie in the dimension before a place or in the one behind it."""
    for start in starts:
        for i in range(len(wanted)):
            if prefixes[i] == start:
                # Features stay whole: before them, the batch joins the dimension before ([L, N, C] to [L*N, C]).
                whole = i == len(wanted) - 1 or list(wanted[i:]) == list(behind)
                return i - 1 if i and whole else i  # else what follows ([L, N, C] to [L, N*heads, C/heads])
    return None
