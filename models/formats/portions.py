"""Runtimes that take one number of images only, for any number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fusion.errors import ClearfoldError
from fusion.outputs import follows

Run = Callable[[Tensor], Any]


def in_portions(run: Run, batch: int) -> Run:
    """The same answers for images [N, ...] of any N, of a runtime that takes `batch` at once. The last portion is
    filled up with its last image."""

    def portions(x: Tensor) -> Any:
        answers, counts, structure = [], [], None
        for start in range(0, len(x), batch):
            part = x[start : start + batch]
            missing = batch - len(part)
            leaves, structure = pytree.tree_flatten(
                run(torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]))
            )
            answers.append(leaves)
            counts.append(len(part))
        joined = [_joined(column, counts, batch) for column in zip(*answers, strict=True)]
        assert structure is not None
        return pytree.tree_unflatten(joined, structure)

    return portions


def any_number(run: Run, batch: int) -> Run:
    """The same for a runtime that may take other numbers than `batch` as well: it is asked once."""
    portions = in_portions(run, batch)

    def whole(x: Tensor) -> Any:
        try:
            answers = run(x)
        except ClearfoldError:
            raise
        except Exception:  # whatever a network raises for a number of images that does not fit
            if len(x) == batch:
                raise
            return portions(x)
        return answers if len(x) == batch or follows(answers, len(x)) else portions(x)

    return whole


def _joined(column: Sequence[Any], counts: Sequence[int], batch: int) -> Any:
    first = column[0]
    if not isinstance(first, Tensor):
        return first
    if batch == 1 and (first.ndim == 0 or len(first) != 1):  # the axis of its one image is gone
        column = [part[None] for part in column]
    elif first.ndim == 0 or len(first) != batch:
        return first
    return torch.cat([part[:count] for part, count in zip(column, counts, strict=True)])
