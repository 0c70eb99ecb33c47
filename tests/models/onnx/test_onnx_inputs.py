"""Inputs beside the image: what it decides alone is explained, and flags are false."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import agrees, array, build

from fusion.errors import BadFile
from models.formats.onnx import read

Save = Callable[[onnx.ModelProto], Path]
IMAGE = ("N", 3, 4, 4)


def beside(
    nodes: Sequence[onnx.NodeProto],
    others: Sequence[tuple[str, int, Sequence[int | str]]],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """A network of the image `x` and others, with scores of the image `y` and `outputs`."""
    scores = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["y"], axes=[2, 3], keepdims=0),
    ]
    model = build([*scores, *nodes], IMAGE, {"w": array(5, 3, 3, 3), "words": array(9, 5)})
    model.graph.input.extend(helper.make_tensor_value_info(*other) for other in others)
    del model.graph.output[:]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs
    )
    return model


def text() -> list[onnx.NodeProto]:
    """An encoder of words, and how well they describe the image."""
    return [
        helper.make_node("Gather", ["words", "ids"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded"], ["t"], axes=[1], keepdims=0),
        helper.make_node("Mul", ["t", "y"], ["match"]),
    ]


WORDS = ("ids", TensorProto.INT64, ("N", "length"))


def test_outputs_that_depend_on_words_are_left_out(save: Save) -> None:
    source = agrees(save(beside(text(), [WORDS], ["match", "t", "y"])))
    assert source.output_names == ("y",)
    assert any("'ids'" in note and "match, t" in note for note in source.notes)


def test_nothing_is_left_without_the_words(save: Save) -> None:
    with pytest.raises(BadFile, match="depends on 'ids' as well as on the image 'x'"):
        read(save(beside(text(), [WORDS], ["match"])))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_flag_is_false(save: Save, shape: Sequence[int]) -> None:
    """As TensorFlow's "training" or "keras_learning_phase"."""

    def branch(op: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(f"of {op}", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["y"], [f"of {op}"])], op, [], [result])

    node = helper.make_node("If", ["training"], ["z"], then_branch=branch("Neg"), else_branch=branch("Tanh"))
    source = agrees(save(beside([node], [("training", TensorProto.BOOL, shape)], ["z"])))
    assert any("set to false: 'training'" in note for note in source.notes)
    x = torch.randn(2, 3, 4, 4)
    assert float(source.module(x).min()) >= 0


def test_two_images_are_too_many(save: Save) -> None:
    node = helper.make_node("Sub", ["x", "reference"], ["y2"])
    with pytest.raises(BadFile, match=r"declares 2: 'x' FLOAT \?x3x4x4, 'reference' FLOAT"):
        read(save(beside([node], [("reference", TensorProto.FLOAT, IMAGE)], ["y", "y2"])))


def test_an_input_that_nothing_reads_is_no_image(save: Save) -> None:
    """As converters leave constants of the normalization that they folded."""
    agrees(save(beside([], [("normalization/Sqrt/x:0", TensorProto.FLOAT, (1, 1, 1, 3))], ["y"])))


def test_a_constant_that_the_file_lacks_is_named(save: Save) -> None:
    """As Keras leaves the mean of a normalization for an input."""
    node = helper.make_node("Sub", ["y", "normalization/Sub/y:0"], ["z"])
    with pytest.raises(BadFile, match="depends on 'normalization/Sub/y:0' as well as on the image 'x'"):
        read(save(beside([node], [("normalization/Sub/y:0", TensorProto.FLOAT, (1, 1, 1, 3))], ["z"])))
