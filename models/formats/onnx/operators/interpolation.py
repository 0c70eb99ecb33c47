"""Interpolation along one axis as a matrix, for every mode of Resize: which input pixels make an output pixel.

The formulas are those of the ONNX specification. Where it and ONNX Runtime differ (aligned corners under a scale that
is no ratio of the two sizes), the runtime's are taken, since that is what a file is held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion.errors import UnsupportedOperator

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Axis:
    """One axis: sizes before and after, the scale that the file gives, and the part of the input that is cropped.

    Computes in float32, as ONNX Runtime does: on it depends which of two equally near pixels is taken.
    """

    before: int
    after: int
    scale: Any
    start: Any = 0.0
    end: Any = 1.0

    def sources(self, coordinates: str) -> list[float]:
        """Where each output pixel comes from, in pixels of the input."""
        if coordinates not in _COORDINATES:
            raise UnsupportedOperator(f"ai.onnx::Resize with {coordinates}", "")
        single = replace(
            self, scale=np.float32(self.scale), start=np.float32(self.start), end=np.float32(self.end)
        )
        return [float(_COORDINATES[coordinates](single, np.float32(i))) for i in range(self.after)]


def _aligned(axis: Axis, i: Any) -> Any:
    return i * (axis.before - 1) / (axis.after - 1) if axis.after > 1 else 0.0


def _half_pixel(axis: Axis, i: Any) -> Any:
    return (i + 0.5) / axis.scale - 0.5


def _symmetric(axis: Axis, i: Any) -> Any:
    """The middle of the input at the middle of the output, also where the size was rounded."""
    offset = axis.before / 2 * (1 - axis.after / (axis.scale * axis.before))
    return offset + _half_pixel(axis, i)


def _cropped(axis: Axis, i: Any) -> Any:
    last = axis.before - 1
    if axis.after == 1:
        return (axis.start + axis.end) * last / 2
    return axis.start * last + i * (axis.end - axis.start) * last / (axis.after - 1)


_COORDINATES: dict[str, Callable[[Axis, Any], Any]] = {
    "asymmetric": lambda axis, i: i / axis.scale,
    "align_corners": _aligned,
    "half_pixel": _half_pixel,
    "pytorch_half_pixel": lambda axis, i: _half_pixel(axis, i) if axis.after > 1 else 0.0,
    "half_pixel_symmetric": _symmetric,
    "tf_half_pixel_for_nn": lambda axis, i: (i + 0.5) / axis.scale,
    "tf_crop_and_resize": _cropped,
}


def _tent(distance: Array) -> Array:
    weights: Array = np.maximum(1 - np.abs(distance), 0)
    return weights


def _cubic(a: float) -> Callable[[Array], Array]:
    def weight(distance: Array) -> Array:
        x: Array = np.abs(distance)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return weight


def matrix(
    axis: Axis, coordinates: str, mode: str, coefficient: float, antialias: bool, exclude_outside: bool
) -> Array:
    """Weights [after, before] of one axis, in float32; `mode` is "linear" or "cubic", `coefficient` the cubic one's."""
    kernel, radius = (_tent, 1) if mode == "linear" else (_cubic(coefficient), 2)
    stretch = min(axis.scale, 1.0) if antialias else 1.0
    weights = np.zeros((axis.after, axis.before))
    for i, source in enumerate(axis.sources(coordinates)):
        reach = radius / stretch
        pixels = np.arange(math.floor(source - reach), math.ceil(source + reach) + 1)
        share = kernel((pixels - source) * stretch)
        if exclude_outside:
            share = np.where((pixels >= 0) & (pixels < axis.before), share, 0.0)
        if antialias or exclude_outside:
            share = share / share.sum()
        np.add.at(weights[i], np.clip(pixels, 0, axis.before - 1), share)
    return weights.astype(np.float32)


def outside(axis: Axis, coordinates: str) -> Array:
    """Which output pixels come from beyond the input, [after]."""
    return np.array([not 0 <= source <= axis.before - 1 for source in axis.sources(coordinates)])


_ROUND: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda v: math.ceil(v - 0.5),
    "round_prefer_ceil": lambda v: math.floor(v + 0.5),
}


def nearest(axis: Axis, coordinates: str, rounding: str) -> list[int]:
    """The input pixel that each output pixel takes."""
    return [min(max(_ROUND[rounding](source), 0), axis.before - 1) for source in axis.sources(coordinates)]
