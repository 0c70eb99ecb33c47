"""Window arithmetic shared by convolutions and pools: where the padding goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fusion.errors import BadFile
from models.formats.onnx.registry import Node

_DIMENSIONS = 3  # that torch has windows of
_MOST = 2**31 - 1  # what a size can be in ONNX Runtime


@dataclass(frozen=True)
class Window:
    """A sliding window, one entry per spatial dimension; `begin` and `end` are the padding on each side."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        return self.begin == self.end

    @property
    def extent(self) -> tuple[int, ...]:
        """What the dilated kernel covers."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


def dimensions(node: Node, x: Tensor) -> int:
    """How many dimensions of [batch, channels, ...] are spatial."""
    if not 0 < x.ndim - 2 <= _DIMENSIONS:
        raise _unfit(node, f"its input has {x.ndim} dimensions, two of them batch and channels")
    return x.ndim - 2


def window(node: Node, kernel: Sequence[int], sizes: Sequence[int]) -> Window:
    """The window of a node over an input of these spatial sizes."""
    rank = len(kernel)
    stride = tuple(node.get("strides") or (1,) * rank)
    dilation = tuple(node.get("dilations") or (1,) * rank)
    mode = node.get("auto_pad", "NOTSET")
    pads = node.get("pads") or (0,) * (2 * rank)
    if not 0 < rank <= _DIMENSIONS or not rank == len(sizes) == len(stride) == len(dilation) == len(pads) / 2:
        raise _unfit(
            node, f"{rank} dimensions over {len(sizes)}, with {len(stride)} strides and {len(pads)} pads"
        )
    if min(*kernel, *stride, *dilation) < 1 or max(*kernel, *stride, *dilation, *map(abs, pads)) > _MOST:
        raise _unfit(
            node, f"kernel {tuple(kernel)}, strides {stride}, dilations {dilation} and pads {tuple(pads)}"
        )
    begin, end = tuple(pads[:rank]), tuple(pads[rank:])
    if mode == "VALID":
        begin = end = (0,) * rank
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
        ]
        small, large = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        begin, end = (small, large) if mode == "SAME_UPPER" else (large, small)
    return Window(tuple(kernel), stride, dilation, begin, end)


def _unfit(node: Node, what: str) -> BadFile:
    return BadFile(
        f"Layer '{node.called}' ({node.title}) slides a window that does not fit: {what}. Export it again."
    )


def pad(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad (or, with negative amounts, crop) the last dimensions; torch counts them from the last."""
    amounts = [side for b, e in reversed(list(zip(begin, end, strict=True))) for side in (b, e)]
    return F.pad(x, amounts, value=value) if any(amounts) else x
