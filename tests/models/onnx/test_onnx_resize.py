"""Resize in all of its modes, against ONNX Runtime on random images."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import agrees, build

Save = Callable[[onnx.ModelProto], Path]
IMAGE = ("N", 2, 6, 5)
SCALES = {"up": (1.5, 2.2), "down": (0.6, 0.7), "mixed": (0.5, 3.0)}
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")


def resized(
    attributes: dict[str, Any],
    scales: tuple[float, ...] | None = None,
    sizes: tuple[int, ...] | None = None,
    roi: tuple[float, ...] = (),
    opset: int = 19,
) -> onnx.ModelProto:
    weights: dict[str, np.ndarray[Any, Any]] = {"roi": np.array(roi, dtype=np.float32)}
    if scales is not None:
        weights["scales"] = np.array(scales, dtype=np.float32)
    if sizes is not None:
        weights["sizes"] = np.array(sizes, dtype=np.int64)
    inputs = ["x", "roi", "scales" if scales is not None else "", "sizes" if sizes is not None else ""]
    return build([helper.make_node("Resize", inputs, ["y"], **attributes)], IMAGE, weights, opset)


@pytest.mark.parametrize(
    ("mode", "coordinates", "scale"),
    [*itertools.product(("nearest", "linear", "cubic"), COORDINATES, SCALES)],
)
def test_by_scales(save: Save, mode: str, coordinates: str, scale: str) -> None:
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
    agrees(save(resized(attributes, scales=(1, 1, *SCALES[scale]))))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("sizes", [(9, 7), (3, 11)])
def test_by_sizes(save: Save, mode: str, sizes: tuple[int, int]) -> None:
    """Of the last two axes alone, as newer exporters write it."""
    agrees(save(resized({"mode": mode, "axes": [2, 3]}, sizes=sizes)))


@pytest.mark.parametrize("rounding", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric"])
def test_nearest_pixels(save: Save, rounding: str, coordinates: str) -> None:
    attributes = {"nearest_mode": rounding, "coordinate_transformation_mode": coordinates}
    agrees(save(resized(attributes, scales=(1, 1, 1.7, 0.5))))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("exclude", [0, 1])
def test_with_antialias(save: Save, mode: str, exclude: int) -> None:
    attributes = {"mode": mode, "antialias": 1, "exclude_outside": exclude, "axes": [2, 3]}
    agrees(save(resized(attributes, scales=(0.6, 0.5))))
    agrees(save(resized(attributes, sizes=(4, 7))))


def test_without_what_is_outside(save: Save) -> None:
    attributes = {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}
    agrees(save(resized(attributes, scales=(1, 1, 1.5, 0.8))))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_of_a_part(save: Save, mode: str) -> None:
    attributes = {
        "mode": mode,
        "axes": [2, 3],
        "coordinate_transformation_mode": "tf_crop_and_resize",
        "extrapolation_value": 3.0,
    }
    agrees(save(resized(attributes, sizes=(4, 4), roi=(0.2, 0.3, 0.9, 1.4))))


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_that_keeps_the_aspect_ratio(save: Save, policy: str) -> None:
    attributes = {"mode": "linear", "keep_aspect_ratio_policy": policy, "axes": [2, 3]}
    agrees(save(resized(attributes, sizes=(8, 9))))


def test_of_channels(save: Save) -> None:
    agrees(save(resized({"mode": "nearest"}, scales=(1, 2, 1, 2))))
