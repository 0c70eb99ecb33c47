"""Quantized tensors as the floats that they stand for.

Integers carry no relevance, so no layer may see any. What a script quantizes stays a float, rounded as the integers
would be. Where it quantizes by the range of whatever image it sees (dynamic quantization), the float is taken as it
is: its rounding would depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RANGES = {torch.quint8: (0, 255), torch.qint8: (-128, 127), torch.qint32: (-(2**31), 2**31 - 1)}


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor as floats: multiples of `scale`, at most so many that the integers around `zero` fit `dtype`.
    Without a scale, what was quantized by its own range."""

    value: Tensor
    scale: Any
    zero: Any
    dtype: torch.dtype
    axis: int | None = None

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def device(self) -> torch.device:
        return self.value.device

    def dim(self) -> int:
        return self.value.dim()

    def numel(self) -> int:
        return self.value.numel()

    def is_floating_point(self) -> bool:
        return False

    def is_complex(self) -> bool:
        return False

    def rounded(self, value: Tensor) -> Quantized:
        """Other floats, rounded to what this tensor's integers can stand for."""
        return quantize(value, self.scale, self.zero, self.dtype, self.axis)

    def moved(self, value: Tensor) -> Quantized:
        """Other floats of which each is one that this tensor's integers stand for."""
        return Quantized(value, self.scale, self.zero, self.dtype, self.axis)


def quantize(x: Tensor, scale: Any, zero: Any, dtype: torch.dtype, axis: int | None = None) -> Quantized:
    """Quantized and back again. The zero point shifts the range, not the steps, which are the same integers then, and
    no constant is added on the way: all relevance of x' is that of x."""
    if scale is None:
        return Quantized(x, scale, zero, dtype, axis)
    low, high = RANGES[dtype]
    size, middle = _along(scale, x, axis), _along(zero, x, axis)
    steps = torch.clamp(torch.round(x / size), low - middle, high - middle)
    return Quantized(steps * size, scale, zero, dtype, axis)


def _along(given: Any, x: Tensor, axis: int | None) -> Any:
    if not isinstance(given, Tensor):
        return given
    given = given.to(x.dtype)
    return (
        given.reshape(()) if axis is None else given.reshape([-1 if i == axis else 1 for i in range(x.dim())])
    )


def from_tensor(x: Tensor) -> Quantized:
    """A tensor that torch holds as integers."""
    if x.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return Quantized(x.dequantize(), x.q_scale(), x.q_zero_point(), x.dtype)
    scales, zeros = x.q_per_channel_scales(), x.q_per_channel_zero_points()
    return Quantized(x.dequantize(), scales, zeros, x.dtype, x.q_per_channel_axis())


def plain(value: Any) -> Any:
    """The floats of a quantized tensor; other values as they are."""
    return value.value if isinstance(value, Quantized) else value
