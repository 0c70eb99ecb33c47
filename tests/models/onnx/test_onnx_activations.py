"""Activations written out in primitives become the operators that they are, in whatever order exporters write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import agrees, build

from fusion import capture

Save = Callable[[onnx.ModelProto], Path]
IMAGE = ("N", 3, 4, 4)

# (operator, inputs, output), the constants being numbers.
Line = tuple[str, list[Any], str]
ROOT, CUBIC = 0.7978845608028654, 0.044715

CHAINS: dict[str, tuple[str, list[Line]]] = {
    "GELU by tanh, with a power": (
        "gelu",
        [
            ("Pow", ["x", 3.0], "a"),
            ("Mul", ["a", CUBIC], "b"),
            ("Add", ["x", "b"], "c"),
            ("Mul", ["c", ROOT], "d"),
            ("Tanh", ["d"], "e"),
            ("Add", ["e", 1.0], "f"),
            ("Mul", ["x", 0.5], "g"),
            ("Mul", ["g", "f"], "y"),
        ],
    ),
    "GELU by tanh, with products": (
        "gelu",
        [
            ("Mul", [CUBIC, "x"], "a"),
            ("Mul", ["a", "x"], "b"),
            ("Add", [1.0, "b"], "c"),
            ("Mul", ["x", ROOT], "d"),
            ("Mul", ["d", "c"], "e"),
            ("Tanh", ["e"], "f"),
            ("Add", [1.0, "f"], "g"),
            ("Mul", ["x", "g"], "h"),
            ("Mul", [0.5, "h"], "y"),
        ],
    ),
    "hard swish, divided last": (
        "hardswish",
        [
            ("Add", ["x", 3.0], "a"),
            ("Clip", ["a", 0.0, 6.0], "b"),
            ("Mul", ["x", "b"], "c"),
            ("Div", ["c", 6.0], "y"),
        ],
    ),
    "hard swish, divided before": (
        "hardswish",
        [
            ("Add", ["x", 3.0], "a"),
            ("Relu", ["a"], "r"),
            ("Min", ["r", 6.0], "b"),
            ("Mul", ["b", 1 / 6], "c"),
            ("Mul", ["c", "x"], "y"),
        ],
    ),
    "hard sigmoid": (
        "hardsigmoid",
        [("Add", ["x", 3.0], "a"), ("Clip", ["a", 0.0, 6.0], "b"), ("Div", ["b", 6.0], "y")],
    ),
    "mish": ("mish", [("Softplus", ["x"], "a"), ("Tanh", ["a"], "b"), ("Mul", ["x", "b"], "y")]),
    "SiLU by an exponential": (
        "silu",
        [("Neg", ["x"], "a"), ("Exp", ["a"], "b"), ("Add", ["b", 1.0], "c"), ("Div", ["x", "c"], "y")],
    ),
    "softplus with a threshold": (
        "softplus",
        [("Softplus", ["x"], "a"), ("Greater", ["x", 20.0], "b"), ("Where", ["b", "x", "a"], "y")],
    ),
}
ALMOST: dict[str, list[Line]] = {
    "a GELU of another factor": [
        ("Div", ["x", 1.5], "a"), ("Erf", ["a"], "b"), ("Add", ["b", 1.0], "c"),
        ("Mul", ["x", "c"], "d"), ("Mul", ["d", 0.5], "y"),
    ],
    "a hard swish of other bounds": [
        ("Add", ["x", 3.0], "a"), ("Clip", ["a", 0.0, 5.0], "b"), ("Mul", ["x", "b"], "c"), ("Div", ["c", 6.0], "y"),
    ],
    "a gate of another value": [("Neg", ["x"], "z"), ("Sigmoid", ["z"], "a"), ("Mul", ["x", "a"], "y")],
}  # fmt: skip


def written(lines: list[Line]) -> onnx.ModelProto:
    weights: dict[str, np.ndarray[Any, Any]] = {}
    nodes = []
    for op, inputs, output in lines:
        names = []
        for value in inputs:
            if not isinstance(value, str):
                weights[f"c{len(weights)}"] = np.float32(value)
                value = f"c{len(weights) - 1}"
            names.append(value)
        nodes.append(helper.make_node(op, names, [output]))
    return build(nodes, IMAGE, weights, 17)


def ops(path: Path) -> list[str]:
    source = agrees(path)
    return [layer.op for layer in capture(source.module, (source.example,)).layers()]


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_the_activation_that_it_computes(save: Save, name: str) -> None:
    op, lines = CHAINS[name]
    assert ops(save(written(lines))) == [op]


@pytest.mark.parametrize("name", ALMOST)
def test_a_chain_that_computes_something_else_stays(save: Save, name: str) -> None:
    found = ops(save(written(ALMOST[name])))
    assert not {"gelu", "hardswish", "silu", "mish", "softplus", "hardsigmoid"}.intersection(found)


def test_an_activation_of_a_scaled_value_reads_the_scaled_value(save: Save) -> None:
    """2 x · sigmoid(2 x): the factor in front is no part of it."""
    lines: list[Line] = [("Mul", ["x", 2.0], "z"), ("Sigmoid", ["z"], "a"), ("Mul", ["z", "a"], "y")]
    assert ops(save(written(lines))) == ["mul", "silu"]


def test_a_value_that_others_read_too_is_still_there(save: Save) -> None:
    lines: list[Line] = [
        ("Sigmoid", ["x"], "a"), ("Mul", ["x", "a"], "s"), ("Add", ["s", "a"], "y"),
    ]  # fmt: skip
    assert sorted(ops(save(written(lines)))) == ["add", "sigmoid", "silu"]
