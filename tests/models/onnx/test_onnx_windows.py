"""Windows and pools of shapes that no network has are refused by the layer's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import build

from fusion.errors import BadFile
from models.formats.onnx import read

Save = Callable[[onnx.ModelProto], Path]
IMAGE = ("N", 3, 8, 8)
WEIGHT = {"w": np.ones((2, 3, 3, 3), dtype=np.float32)}


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [1]},
        {"strides": [0, 1]},
        {"dilations": [1, 1, 1]},
        {"dilations": [-1, 1]},
        {"pads": [1, 1]},
        {"pads": [2**62, 0, 2**62, 0]},
    ],
)
def test_a_convolution_whose_window_does_not_fit(save: Save, attributes: dict[str, Any]) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="/stem/Conv", **attributes)
    with pytest.raises(BadFile, match=r"Layer 'stem' .*slides a window that does not fit"):
        read(save(build([node], IMAGE, WEIGHT)))


def test_a_pool_of_another_rank(save: Save) -> None:
    node = helper.make_node("MaxPool", ["x"], ["y"], name="/pool/MaxPool", kernel_shape=[2, 2, 2])
    with pytest.raises(BadFile, match=r"Layer 'pool' .*3 dimensions over 2"):
        read(save(build([node], IMAGE)))


def test_a_global_pool_without_space(save: Save) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("GlobalAveragePool", ["f"], ["y"], name="/pool/GlobalAveragePool"),
    ]
    with pytest.raises(BadFile, match=r"Layer 'pool' .*2 dimensions"):
        read(save(build(nodes, IMAGE)))


def test_images_of_more_pixels_than_are_read(save: Save) -> None:
    with pytest.raises(BadFile, match="more than 4096 pixels a side"):
        read(save(build([helper.make_node("Relu", ["x"], ["y"])], ("N", 3, 2**40, 8))))
