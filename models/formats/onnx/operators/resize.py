"""Resizing images and feature maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.errors import UnsupportedOperator
from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value, allocation, ints

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@operator("Upsample", since=7)
def upsample_7(node: Node, x: Tensor) -> Tensor:
    return _resize(node, x, _scaled(x, node.get("scales")), node.get("scales"), "asymmetric", "floor")


@operator("Upsample", since=9, static=(1,))
@operator("Resize", since=10, static=(1,))
def upsample_9(node: Node, x: Tensor, scales: Value) -> Tensor:
    factors = _floats(node, scales)
    return _resize(node, x, _scaled(x, factors), factors, "asymmetric", "floor")


@operator("Resize", since=11, static=(1, 2, 3))
def resize(
    node: Node, x: Tensor, roi: Value | None = None, scales: Value | None = None, sizes: Value | None = None
) -> Tensor:
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch" or node.get("exclude_outside", 0):
        raise UnsupportedOperator(
            f"{node.title} with keep_aspect_ratio_policy or exclude_outside", node.layer
        )
    axes = [a % x.ndim for a in node.get("axes") or range(x.ndim)]
    wanted: list[Any] = list(x.shape)
    factors = [1.0] * x.ndim
    if sizes is not None and not (not isinstance(sizes, Tensor) and sizes.size == 0):
        for axis, n in zip(axes, ints(sizes, "The sizes of Resize"), strict=True):
            if axis > 1:
                wanted[axis], factors[axis] = n, n / x.shape[axis]
    else:
        assert scales is not None
        for axis, factor in zip(axes, _floats(node, scales), strict=True):
            wanted[axis], factors[axis] = (
                (math.floor(x.shape[axis] * factor) if factor != 1 else x.shape[axis]),
                factor,
            )
    mode = node.get("coordinate_transformation_mode", "half_pixel")
    return _resize(node, x, wanted, factors, mode, node.get("nearest_mode", "round_prefer_floor"))


def _floats(node: Node, scales: Value) -> list[float]:
    if isinstance(scales, Tensor):
        raise UnsupportedOperator(f"{node.title} with scales that depend on pixels", node.layer)
    return [float(s) for s in scales.reshape(-1).tolist()]


def _scaled(x: Tensor, factors: list[float]) -> list[Any]:
    return [s if f == 1 else math.floor(s * f) for s, f in zip(x.shape, factors, strict=True)]


def _resize(
    node: Node, x: Tensor, sizes: list[Any], factors: list[float], coordinates: str, rounding: str
) -> Tensor:
    if factors[0] != 1 or factors[1] != 1:
        raise UnsupportedOperator(f"{node.title} of channels", node.layer)
    wanted = [int(s) for s in allocation(sizes[2:], node.layer)]
    if wanted == list(x.shape[2:]) and all(f == 1 for f in factors):
        return x
    mode, antialias = node.get("mode", "nearest"), bool(node.get("antialias", 0))
    if mode == "nearest":
        return _nearest(node, x, wanted, factors[2:], coordinates, rounding)
    # With one output pixel, pytorch_half_pixel differs from half_pixel; torch itself does the latter.
    exact = all(
        math.isclose(n / s, f, rel_tol=1e-6) for n, s, f in zip(wanted, x.shape[2:], factors[2:], strict=True)
    )
    same = coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and min(wanted) > 1)
    aligned = coordinates == "align_corners"
    cubic = mode == "cubic" and len(wanted) == 2 and math.isclose(node.get("cubic_coeff_a", -0.75), -0.75)
    if antialias or not exact or not (same or aligned) or not (mode == "linear" or cubic):
        raise UnsupportedOperator(f"{node.title} with mode {mode} and {coordinates}", node.layer)
    kind = "bicubic" if cubic else _LINEAR[len(wanted)]
    return F.interpolate(x, size=wanted, mode=kind, align_corners=aligned)


_ROUND = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda v: math.ceil(v - 0.5),
    "round_prefer_ceil": lambda v: math.floor(v + 0.5),
}


def _nearest(
    node: Node, x: Tensor, wanted: list[int], factors: list[float], coordinates: str, rounding: str
) -> Tensor:
    """torch's own kernel where it picks the same pixels, else one index_select per axis."""
    picks = [
        [min(max(_ROUND[rounding](_source(node, i, n, m, f, coordinates)), 0), n - 1) for i in range(m)]
        for n, m, f in zip(x.shape[2:], wanted, factors, strict=True)
    ]
    if all(p == [i * n // len(p) for i in range(len(p))] for p, n in zip(picks, x.shape[2:], strict=True)):
        return F.interpolate(x, size=wanted, mode="nearest")
    for axis, pick in enumerate(picks, start=2):
        x = x.index_select(axis, torch.tensor(pick, dtype=torch.int64, device=x.device))
    return x


def _source(node: Node, i: int, before: int, after: int, factor: float, coordinates: str) -> float:
    """Where the output pixel comes from, as the ONNX specification defines it."""
    if coordinates == "asymmetric":
        return i / factor
    if coordinates == "align_corners":
        return i * (before - 1) / (after - 1) if after > 1 else 0.0
    if coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and after > 1):
        return (i + 0.5) / factor - 0.5
    if coordinates == "pytorch_half_pixel":
        return 0.0
    raise UnsupportedOperator(f"{node.title} with {coordinates}", node.layer)
