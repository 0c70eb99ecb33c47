"""Numbers as integers times a scale: q = clamp(round(x / scale) + zero), x' = (q - zero) scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor

from fusion.errors import UnsupportedOperator
from models.formats.onnx.operators.convolution import conv
from models.formats.onnx.registry import OWN, Node, operator
from models.formats.onnx.values import dtype

# The integers that a quantized tensor may hold, by the type that they are held in: int32 holds those of uint16.
RANGES = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.int32: (0, 2**16 - 1),
}


@operator("QuantizeLinear", since=10)
def quantize(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    given = dtype(node.get("output_dtype")) if node.get("output_dtype", 0) else torch.uint8
    kind = zero.dtype if zero is not None else given
    if kind not in RANGES:
        raise UnsupportedOperator(f"{node.title} to {kind}", node.called)
    steps = torch.round(x / along(node, scale, x))
    steps = steps if zero is None else steps + along(node, zero, x)
    return steps.clamp(*RANGES[kind]).to(kind)


@operator("DequantizeLinear", since=10)
def dequantize(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    _constant(node, x)
    if x.is_floating_point():  # of eight bits or fewer
        return x * along(node, scale, x)
    exact = x.to(torch.int32)
    centred = exact if zero is None else exact - along(node, zero, x).to(torch.int32)
    return centred.to(torch.float32) * along(node, scale, x)


@operator("FakeQuantize", domain=OWN, scalars=True)
def fake_quantize(node: Node, x: Tensor, scale: Any, zero: Any = None) -> Tensor:
    """Quantized and back again, as a float throughout; `range` is what the integers may be.

    The zero point shifts the range, not the steps, which are the same integers then, and no constant is added on the
    way: all relevance of x' is that of x.
    """
    low, high = node.get("range")
    size = along(node, scale, x) if isinstance(scale, Tensor) else scale
    steps = torch.round(x / size)
    middle = along(node, zero, x).to(torch.float32) if isinstance(zero, Tensor) else zero or 0
    return torch.clamp(steps, low - middle, high - middle) * size


def along(node: Node, given: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point as it broadcasts against x: one for all, per entry of an axis, or per block of it."""
    axis, block = node.get("axis", 1), node.get("block_size", 0)
    if block and not _is_single(given):
        return given.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return _along(given, x, axis)


def _along(given: Tensor, x: Tensor, axis: int) -> Tensor:
    if _is_single(given):
        return given.reshape(())
    if given.ndim == 1:
        return given.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    return given


def _is_single(given: Tensor) -> bool:
    return given.numel() == 1 and given.ndim <= 1


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize(node: Node, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the range of the tensor at hand, zero included; then the scale and the zero point."""
    if _has_batch(x):
        raise UnsupportedOperator(
            f"{node.title} over the batch", node.called, "Quantize the network with fixed scales (QDQ)."
        )
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    steps = (torch.round(x / scale) + zero).clamp(0, 255)
    return steps.to(torch.uint8), scale, zero.to(torch.uint8)


@operator("ConvInteger", since=10)
def conv_integer(
    node: Node, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None
) -> Tensor:
    """In float64, which holds every sum of products of eight-bit integers that fits into int32."""
    _constant(node, x)
    return conv(node, _centred(x, x_zero), _centred(weight, w_zero, axis=0)).to(torch.int32)


@operator("MatMulInteger", since=10)
def matmul_integer(
    node: Node, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    _constant(node, a)
    return torch.matmul(_centred(a, a_zero, axis=-2), _centred(b, b_zero, axis=-1)).to(torch.int32)


def _has_batch(x: Tensor) -> bool:
    return any(isinstance(size, SymInt) for size in x.shape)


def _constant(node: Node, x: Tensor) -> None:
    """Refuse integers that are computed from the image, of which no relevance would come back."""
    if _has_batch(x):
        raise UnsupportedOperator(
            f"{node.title} of integers that are not quantized by the same scale and zero point",
            node.called,
            "Quantize the network with pairs of QuantizeLinear and DequantizeLinear (QDQ).",
        )


def _centred(x: Tensor, zero: Tensor | None, axis: int = 0) -> Tensor:
    if zero is None:
        return x.to(torch.float64)
    return x.to(torch.float64) - _along(zero, x, axis).to(torch.float64)
