"""Files for one image that take its batch axis off run for any batch, whatever they do to the single image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import agrees, array, build, ints

from fusion.errors import BadFile
from models.formats.onnx import read

Save = Callable[[onnx.ModelProto], Path]
node = helper.make_node

# From `b` [3, 4, 6], one image without its batch axis, to `y`.
CASES: dict[str, Sequence[onnx.NodeProto]] = {
    "a constant of the same rank": [node("Sub", ["b", "mean"], ["y"])],
    "a constant of fewer dimensions": [node("Mul", ["b", "row"], ["y"])],
    "a constant of more dimensions": [node("Add", ["b", "big"], ["y"])],
    "a value of fewer dimensions": [
        node("ReduceMean", ["b"], ["m"], axes=[0, 1], keepdims=0),
        node("Sub", ["b", "m"], ["y"]),
    ],
    "a value that has its batch": [node("Add", ["b", "x"], ["y"])],
    "a choice": [node("Greater", ["b", "mean"], ["c"]), node("Where", ["c", "b", "row"], ["y"])],
    "the batch put back": [node("Unsqueeze", ["b", "front"], ["u"]), node("Conv", ["u", "w"], ["y"])],
    "the batch put back from behind": [node("Unsqueeze", ["b", "fourth"], ["u"]), node("Conv", ["u", "w"], ["y"])],
    "an axis more": [node("Unsqueeze", ["b", "second"], ["y"])],
    "axes at both ends": [node("Unsqueeze", ["b", "ends"], ["y"])],
    "an axis less": [
        node("ReduceMax", ["b"], ["m"], axes=[1], keepdims=1),
        node("Squeeze", ["m", "second"], ["y"]),
    ],
    "all single axes less": [node("ReduceMax", ["b"], ["m"], axes=[1]), node("Squeeze", ["m"], ["y"])],
    "stacked": [
        node("Unsqueeze", ["b", "front"], ["u"]),
        node("Concat", ["u"], ["v"], axis=0),
        node("Conv", ["v", "w"], ["y"]),
    ],
    "joined with a constant": [node("Concat", ["b", "mean4"], ["y"], axis=1)],
    "softmax over the first": [node("Softmax", ["b"], ["y"], axis=0)],
    "the sum of all": [node("ReduceSum", ["b"], ["s"], keepdims=0), node("Mul", ["b", "s"], ["y"])],
    "a sum along the last": [node("ReduceSum", ["b", "last"], ["y"], keepdims=0)],
    "turned": [node("Transpose", ["b"], ["t"]), node("MatMul", ["t", "square"], ["y"])],
    "turned in an order": [node("Transpose", ["b"], ["y"], perm=[1, 0, 2])],
    "flat": [node("Flatten", ["b"], ["f"], axis=1), node("MatMul", ["f", "flat"], ["y"])],
    "in another shape": [node("Reshape", ["b", "shape"], ["y"])],
    "in the shape of another": [
        node("Transpose", ["b"], ["t"], perm=[1, 0, 2]),
        node("Shape", ["t"], ["s"]),
        node("Reshape", ["b", "s"], ["y"]),
    ],
    "in parts": [node("Split", ["b", "parts"], ["p", "q"], axis=2), node("Mul", ["p", "q"], ["y"])],
    "a slice": [node("Slice", ["b", "one", "three", "second"], ["y"])],
    "a slice without axes": [node("Slice", ["b", "one", "three"], ["y"])],
    "one of them": [node("Gather", ["b", "index"], ["y"], axis=1)],
    "one of the first": [node("Gather", ["b", "index"], ["y"])],
    "padded": [node("Pad", ["b", "pads"], ["y"])],
    "repeated": [node("Tile", ["b", "times"], ["y"])],
    "wider": [node("ReduceMean", ["b"], ["m"], axes=[0]), node("Expand", ["m", "full"], ["y"])],
    "the largest": [
        node("Reshape", ["b", "rows"], ["r"]),
        node("TopK", ["r", "two"], ["y", "i"], axis=0),
    ],
    "what the largest are of": [
        node("Reshape", ["b", "rows"], ["r"]),
        node("ReduceMax", ["r"], ["m"], axes=[1], keepdims=0),
        node("TopK", ["m", "two"], ["v", "i"]),
        node("Gather", ["r", "i"], ["y"]),
    ],
    "what the largest are of, one by one": [
        node("Reshape", ["b", "rows"], ["r"]),
        node("TopK", ["r", "two"], ["v", "i"], axis=0),
        node("GatherElements", ["r", "i"], ["y"], axis=0),
    ],
    "places of the largest": [
        node("Reshape", ["b", "rows"], ["r"]),
        node("ReduceMax", ["r"], ["m"], axes=[1], keepdims=0),
        node("TopK", ["m", "two"], ["v", "i"]),
        node("Unsqueeze", ["i", "second"], ["j"]),
        node("GatherND", ["r", "j"], ["y"]),
    ],
    "constants at the places of the largest": [
        node("ReduceMax", ["b"], ["m"], axes=[1, 2], keepdims=0),
        node("TopK", ["m", "two"], ["v", "i"]),
        node("Gather", ["anchors", "i"], ["a"]),
        node("Unsqueeze", ["v", "second"], ["c"]),
        node("Mul", ["a", "c"], ["y"]),
    ],
    "the number of the best": [
        node("ArgMax", ["b"], ["a"], axis=0),
        node("Cast", ["a"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["b", "f"], ["y"]),
    ],
    "products of both": [node("Transpose", ["b"], ["t"], perm=[0, 2, 1]), node("MatMul", ["b", "t"], ["y"])],
}  # fmt: skip
WEIGHTS = {
    "mean": array(3, 1, 1), "row": array(6), "big": array(2, 3, 4, 6), "mean4": array(3, 2, 6), "w": array(2, 3, 2, 2),
    "square": array(3, 5), "flat": array(24, 2), "anchors": array(3, 4), "front": ints(0), "fourth": ints(-4),
    "second": ints(1), "ends": ints(0, 4), "last": ints(2), "shape": ints(0, -1, 3), "parts": ints(3, 3),
    "one": ints(1), "three": ints(3), "index": ints(2, 0), "pads": ints(0, 1, 0, 0, 2, 1), "times": ints(1, 2, 1),
    "full": ints(3, 4, 6), "rows": ints(-1, 6), "two": ints(2),
}  # fmt: skip
OFF: dict[str, list[onnx.NodeProto]] = {
    "squeezed": [node("Squeeze", ["x", "front"], ["b"])],
    "picked": [node("Gather", ["x", "zero"], ["b"])],
    "split": [node("Split", ["x", "whole"], ["s"], axis=0), node("Squeeze", ["s", "front"], ["b"])],
    "sliced": [node("Slice", ["x", "front", "whole", "front"], ["s"]), node("Squeeze", ["s", "front"], ["b"])],
}  # fmt: skip


def one_image(nodes: Sequence[onnx.NodeProto], off: str = "squeezed") -> onnx.ModelProto:
    weights = {**WEIGHTS, "zero": np.array(0), "whole": ints(1)}
    return build([*OFF[off], *nodes], (1, 3, 4, 6), weights)


@pytest.mark.parametrize("name", CASES)
def test_operators_without_the_batch(save: Save, name: str) -> None:
    source = agrees(save(one_image(CASES[name])))
    assert source.module(source.example).shape[0] == 2


@pytest.mark.parametrize("off", OFF)
def test_ways_to_take_it_off(save: Save, off: str) -> None:
    agrees(save(one_image(CASES["the batch put back"], off)))


def test_what_is_not_read_so_is_refused(save: Save) -> None:
    nodes = [node("LayerNormalization", ["b", "row"], ["y"], axis=0)]
    with pytest.raises(BadFile, match=r"without its batch dimension.*dynamic batch dimension"):
        read(save(one_image(nodes)))


def test_indices_that_count_images_are_refused(save: Save) -> None:
    """They are those of the first image, and would pick it for all."""
    nodes = [node("GatherND", ["x", "places"], ["y"])]
    with pytest.raises(BadFile, match="count the images of a batch"):
        read(save(build(nodes, (1, 3, 4, 6), {"places": ints(0, 1, 0, 2).reshape(2, 2)})))
