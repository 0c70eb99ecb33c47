"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from models.formats.onnx.operators.padding import pad, window
from models.formats.onnx.registry import Node, operator

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@operator("Conv")
def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Padding stays inside the convolution wherever both sides get the same."""
    w = window(node, weight.shape[2:], x.shape[2:])
    padding = w.begin
    if not w.symmetric:
        x, padding = pad(x, w.begin, w.end), (0,) * len(w.kernel)
    run = _CONV[len(w.kernel)]
    return run(
        x, weight, bias, stride=w.stride, padding=padding, dilation=w.dilation, groups=node.get("group", 1)
    )


@operator("ConvTranspose")
def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Uneven padding, and an explicit output shape, crop the unpadded result."""
    sizes = tuple(x.shape[2:])
    w = window(node, weight.shape[2:], sizes)
    extra = tuple(node.get("output_padding") or (0,) * len(sizes))
    full = [(n - 1) * s + e + o for n, s, e, o in zip(sizes, w.stride, w.extent, extra, strict=True)]
    begin, end = w.begin, w.end
    mode = node.get("auto_pad", "NOTSET")
    wanted = node.get("output_shape")
    if wanted is None and mode.startswith("SAME"):
        wanted = [n * s for n, s in zip(sizes, w.stride, strict=True)]
    if wanted is not None:
        totals = [f - t for f, t in zip(full, wanted[-len(sizes) :], strict=True)]
        half, rest = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        begin, end = (half, rest) if mode == "SAME_UPPER" else (rest, half)
    run = _CONV_TRANSPOSE[len(sizes)]
    inside = begin if begin == end and min(begin) >= 0 else (0,) * len(sizes)
    y = run(
        x,
        weight,
        bias,
        stride=w.stride,
        padding=inside,
        output_padding=extra,
        groups=node.get("group", 1),
        dilation=w.dilation,
    )
    return y if begin == end == inside else pad(y, [-b for b in begin], [-e for e in end])
