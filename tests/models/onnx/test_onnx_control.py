"""Branches and loops whose course is known become the nodes that they run; others are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import agrees, build

from fusion.errors import BadFile, UnsupportedOperator
from models.formats.onnx import read
from models.formats.onnx.registry import supported

Save = Callable[[onnx.ModelProto], Path]
IMAGE = ("N", 3, 4, 4)


def graph(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[tuple[str, int]],
    inputs: Sequence[tuple[str, int, Any]] = (),
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
) -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes),
        "inner",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )


def scaled(factor: float) -> onnx.GraphProto:
    """A branch that multiplies the image around it."""
    weights = {"factor": np.float32(factor)}
    return graph(
        [helper.make_node("Mul", ["x", "factor"], ["scaled"])],
        [("scaled", TensorProto.FLOAT)],
        weights=weights,
    )


@pytest.mark.parametrize("condition", [True, False])
def test_a_branch_with_a_constant_condition(save: Save, condition: bool) -> None:
    node = helper.make_node("If", ["c"], ["y"], then_branch=scaled(2), else_branch=scaled(-1))
    agrees(save(build([node], IMAGE, {"c": np.array(condition)})))


def test_a_branch_that_hands_on_a_value_around_it(save: Save) -> None:
    whole = graph([], [("x", TensorProto.FLOAT)])
    node = helper.make_node("If", ["c"], ["z"], then_branch=scaled(2), else_branch=whole)
    model = build([node, helper.make_node("Relu", ["z"], ["y"])], IMAGE, {"c": np.array(False)})
    source = read(save(model))  # ONNX Runtime wants a node in every branch
    assert float(source.module(source.example - 1).abs().max()) == 0


def test_a_branch_that_depends_on_a_size(save: Save) -> None:
    """torch's exporter writes a squeeze so."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=1, end=2),
        helper.make_node("Equal", ["s", "three"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=scaled(3), else_branch=scaled(5)),
    ]
    agrees(save(build(nodes, IMAGE, {"three": np.array([3])})))


def test_branches_within_branches(save: Save) -> None:
    inner = helper.make_node("If", ["d"], ["both"], then_branch=scaled(2), else_branch=scaled(-1))
    outer = graph([inner], [("both", TensorProto.FLOAT)])
    node = helper.make_node("If", ["c"], ["y"], then_branch=outer, else_branch=scaled(7))
    agrees(save(build([node], IMAGE, {"c": np.array(True), "d": np.array(False)})))


def test_branches_whose_values_have_the_same_names(save: Save) -> None:
    """Exporters count anew in every branch."""
    inner = helper.make_node("If", ["d"], ["result"], then_branch=scaled(2), else_branch=scaled(-1))
    lines = [
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        inner,
        helper.make_node("Add", ["result", "scaled"], ["sum"]),
    ]
    outer = graph(lines, [("sum", TensorProto.FLOAT)], weights={"factor": np.float32(10)})
    node = helper.make_node("If", ["c"], ["y"], then_branch=outer, else_branch=scaled(7))
    source = read(save(build([node], IMAGE, {"c": np.array(True), "d": np.array(False)})))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(source.module(x), 9 * x)


def test_a_branch_that_depends_on_pixels_is_refused(save: Save) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=scaled(2), else_branch=scaled(3)),
    ]
    with pytest.raises(UnsupportedOperator, match=r"ai\.onnx::If .* depends on pixel values"):
        read(save(build(nodes, IMAGE, {"zero": np.float32(0)})))


BODY_INPUTS = [("i", TensorProto.INT64, []), ("on", TensorProto.BOOL, []), ("value", TensorProto.FLOAT, None)]


def loop(
    nodes: Sequence[onnx.NodeProto], scanned: bool = False, **weights: np.ndarray[Any, Any]
) -> onnx.GraphProto:
    """A body over (i, on, value) -> (go, next), and what is kept of every iteration."""
    outputs = [("go", TensorProto.BOOL), ("next", TensorProto.FLOAT)]
    return graph(nodes, [*outputs, ("kept", TensorProto.FLOAT)] if scanned else outputs, BODY_INPUTS, weights)


GO = helper.make_node("Identity", ["on"], ["go"])


def test_a_loop_of_known_length(save: Save) -> None:
    """With the image around it, and the number of the iteration."""
    body = loop(
        [
            GO,
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x", "f"], ["m"]),
            helper.make_node("Add", ["value", "m"], ["s"]),
            helper.make_node("Relu", ["s"], ["next"]),
            helper.make_node("ReduceMean", ["next"], ["kept"], axes=[2, 3], keepdims=0),
        ],
        scanned=True,
    )
    nodes = [
        helper.make_node("Loop", ["trips", "true", "x"], ["last", "means"], body=body),
        helper.make_node("Transpose", ["means"], ["turned"], perm=[1, 2, 0]),
        helper.make_node("MatMul", ["turned", "w"], ["y"]),
    ]
    weights = {
        "trips": np.array(3),
        "true": np.array(True),
        "w": np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32),
    }
    agrees(save(build(nodes, IMAGE, weights, 13)))


def test_a_loop_that_ends_itself(save: Save) -> None:
    body = loop(
        [
            helper.make_node("Less", ["i", "two"], ["go"]),
            helper.make_node("Mul", ["value", "half"], ["next"]),
        ],
        two=np.array(2),
        half=np.float32(0.5),
    )
    node = helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)
    agrees(save(build([node], IMAGE, {"true": np.array(True)}, 13)))


def test_a_loop_without_end_is_refused(save: Save) -> None:
    body = loop([GO, helper.make_node("Relu", ["value"], ["next"])])
    node = helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)
    with pytest.raises(BadFile, match="unroll to more than 50000 nodes"):
        read(save(build([node], IMAGE, {"true": np.array(True)}, 13)))


def test_a_loop_that_ends_on_pixels_is_refused(save: Save) -> None:
    body = loop(
        [
            helper.make_node("ReduceMax", ["value"], ["m"], keepdims=0),
            helper.make_node("Greater", ["m", "one"], ["go"]),
            helper.make_node("Mul", ["value", "half"], ["next"]),
        ],
        one=np.float32(1),
        half=np.float32(0.5),
    )
    node = helper.make_node("Loop", ["trips", "true", "x"], ["y"], body=body)
    with pytest.raises(UnsupportedOperator, match=r"::Loop .* depends on pixel values"):
        read(save(build([node], IMAGE, {"trips": np.array(9), "true": np.array(True)}, 13)))


@pytest.mark.parametrize("direction", [0, 1])
def test_a_scan_over_columns(save: Save, direction: int) -> None:
    """A recurrence from left to right, or from right to left."""
    shapes = [("state", TensorProto.FLOAT, ["N", 3, 4]), ("column", TensorProto.FLOAT, ["N", 3, 4])]
    body = graph(
        [
            helper.make_node("Add", ["state", "column"], ["s"]),
            helper.make_node("Tanh", ["s"], ["following"]),
            helper.make_node("Identity", ["following"], ["left"]),
        ],
        [("following", TensorProto.FLOAT), ("left", TensorProto.FLOAT)],
        shapes,
    )
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["start"], axes=[3], keepdims=0),
        helper.make_node(
            "Scan", ["start", "x"], ["end", "y"], body=body, num_scan_inputs=1, scan_input_axes=[3],
            scan_input_directions=[direction], scan_output_axes=[3], scan_output_directions=[direction],
        ),
    ]  # fmt: skip
    agrees(save(build(nodes, IMAGE, {}, 13)))


def test_an_operator_that_the_standard_defines_by_others(save: Save) -> None:
    """Causal convolution has no function here: its definition is read in its place."""
    assert "CausalConvWithState" not in supported()
    nodes = [
        helper.make_node("Reshape", ["x", "rows"], ["r"]),
        helper.make_node("CausalConvWithState", ["r", "w"], ["c", "state"]),
        helper.make_node("Reshape", ["c", "back"], ["y"]),
    ]
    weights = {
        "rows": np.array([0, 3, 16]),
        "back": np.array([0, 3, 4, 4]),
        "w": np.random.default_rng(0).standard_normal((3, 1, 2)).astype(np.float32),
    }
    source = read(save(build(nodes, IMAGE, weights, 27)))
    x = np.random.default_rng(1).standard_normal((2, 3, 16)).astype(np.float32)
    got = source.module(torch.from_numpy(x).reshape(2, 3, 4, 4)).reshape(2, 3, 16)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0)))
    want = padded[..., :-1] * weights["w"][None, :, :, 0] + padded[..., 1:] * weights["w"][None, :, :, 1]
    torch.testing.assert_close(got, torch.from_numpy(want))
