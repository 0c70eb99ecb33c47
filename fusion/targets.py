"""Target shapes that were written down for one batch size: where in them the batch is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence


def expanded(wanted: Sequence[int], sizes: Sequence[int], axis: int, declared: int) -> int | None:
    """The dimension of an expansion's target that holds the batch, `declared` in it; None where the target follows the
    batch by itself or cannot. `sizes` are those of the tensor for one sample, `axis` the one that the batch is in."""
    place = axis + len(wanted) - len(sizes)
    return place if place >= 0 and wanted[place] == sizes[axis] * declared else None


def reshaped(
    wanted: Sequence[int], sizes: Sequence[int], axis: int, declared: int, *, zero_copies: bool = False
) -> tuple[list[int], list[int]] | None:
    """A reshape's target with all of its sizes, and the dimensions that could hold the batch, the likeliest first; None
    as for `expanded`. zero_copies: a size of 0 is the tensor's own, as in ONNX."""
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
    if not total or math.prod(full) != total:
        return None
    places = list(dict.fromkeys(_places(full, sizes, axis, declared)))
    if not places or wanted[places[0]] in (-1, 0):
        return None  # the target already follows
    return full, [place for place in places if wanted[place] not in (-1, 0)]


def _places(wanted: Sequence[int], sizes: Sequence[int], axis: int, declared: int) -> Iterator[int]:
    """The target's dimensions that could take the batch: memory order says between which sizes it goes, then
    neighbours decide.

    With the batch at the outer end of its dimension, as many elements lie before it as in the dimensions
    before; at the inner end, that dimension's own factor comes on top.
    """
    outer = math.prod(sizes[:axis])
    starts = (outer, outer * sizes[axis])
    prefixes = list(itertools.accumulate(wanted, lambda a, b: a * b, initial=1))
    for start in starts:  # a dimension of its own
        yield from (i for i, size in enumerate(wanted) if prefixes[i] == start and size == declared)
    for start in (
        starts if declared == 1 else ()
    ):  # one image: its factor may be in the dimension before as well
        for i in (i for i in range(len(wanted)) if prefixes[i] == start):
            # Features stay whole: before them, the batch joins the dimension before ([L, N, C] to [L*N, C]), else what
            # follows ([L, N, C] to [L, N*heads, C/heads]).
            whole = i == len(wanted) - 1 or list(wanted[i:]) == list(sizes[axis + 1 :])
            yield from ((i - 1, i) if whole else (i, i - 1)) if i else (i,)
    for start in starts:  # the dimension that its factor lies in
        for i in range(len(wanted)):
            if start % prefixes[i] == 0 and prefixes[i + 1] % (start * declared) == 0:
                yield i
