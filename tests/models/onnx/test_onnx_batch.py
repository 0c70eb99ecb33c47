"""Shapes computed in the file, and files that fix the batch: any batch size runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_files import agrees, build

Save = Callable[[onnx.ModelProto], Path]


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


def constant(name: str, value: np.ndarray[Any, Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def weight(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_a_reshape_target_computed_from_the_input_keeps_the_batch_free(save: Save) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        constant("zero", np.array(0, dtype=np.int64)),
        constant("two", np.array(2, dtype=np.int64)),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Gather", ["s", "two"], ["h"]),
        constant("axes", ints(0)),
        helper.make_node("Mul", ["h", "h"], ["hh"]),
        helper.make_node("Cast", ["hh"], ["hf"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Cast", ["hf"], ["hi"], to=onnx.TensorProto.INT64),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Unsqueeze", ["hi", "axes"], ["h1"]),
        constant("rest", ints(-1)),
        helper.make_node("Concat", ["n1", "rest", "h1"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    agrees(save(build(nodes, ("N", 3, 4, 4))))


def test_a_class_token_expanded_to_the_batch(save: Save) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["t"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Slice", ["s", "from", "to"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["target"], axis=0),
        helper.make_node("Expand", ["token", "target"], ["e"]),
        helper.make_node("Concat", ["e", "t"], ["y"], axis=1),
    ]
    weights = {
        "flat": ints(0, 3, 16),
        "from": ints(0),
        "to": ints(1),
        "rest": ints(1, 1),
        "token": weight(1, 1, 16),
    }
    agrees(save(build(nodes, ("N", 3, 4, 4), weights)))


def test_a_number_spread_over_the_images(save: Save) -> None:
    """As torch's exporter writes zeros of an activation's shape: too many to be numbers."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Expand", ["half", "s"], ["h"]),
        helper.make_node("Mul", ["x", "h"], ["y"]),
    ]
    agrees(save(build(nodes, ("N", 3, 4, 4), {"half": np.array(0.5, dtype=np.float32)})))


def test_repeats_that_follow_from_the_batch(save: Save) -> None:
    """As torch's exporter writes `repeat_interleave`: the repeats at one place among ones, by OneHot."""
    nodes = [
        helper.make_node("Reshape", ["x", "rows"], ["r"]),  # [3 N, 16]
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 3], keepdims=0),  # [N, 4]
        helper.make_node("Shape", ["r"], ["rs"], end=1),
        helper.make_node("Shape", ["m"], ["ms"], end=1),
        helper.make_node("Div", ["rs", "ms"], ["times"]),
        helper.make_node("Concat", ["one", "times"], ["values"], axis=0),
        helper.make_node("OneHot", ["first", "rank", "values"], ["hot"]),
        helper.make_node("Reshape", ["hot", "flat"], ["repeats"]),
        helper.make_node("Unsqueeze", ["m", "first"], ["u"]),
        helper.make_node("Tile", ["u", "repeats"], ["t"]),  # [N, 3, 4]
        helper.make_node("Reshape", ["t", "back"], ["y"]),
    ]
    weights = {
        "rows": ints(-1, 16),
        "one": ints(1),
        "first": ints(1),
        "rank": ints(3),
        "flat": ints(-1),
        "back": ints(0, 12),
    }
    agrees(save(build(nodes, ("N", 3, 4, 4), weights)))


@pytest.mark.parametrize("target", [(1, 48), (1, -1), (1, 3, 16), (1, 4, 3, 4), (0, 48), (-1, 48)])
def test_reshapes_of_a_fixed_batch(save: Save, target: tuple[int, ...]) -> None:
    source_model = build([helper.make_node("Reshape", ["x", "t"], ["y"])], (1, 3, 4, 4), {"t": ints(*target)})
    agrees(save(source_model))


def test_attention_with_a_fixed_batch_in_the_second_dimension(save: Save) -> None:
    """torch's multi-head attention works on [length, batch, channels] and folds heads into the batch."""
    length, channels, heads = 16, 12, 3
    nodes = [
        helper.make_node("Reshape", ["x", "tokens"], ["a"]),
        helper.make_node("Concat", ["token", "a"], ["b"], axis=2),
        helper.make_node("Transpose", ["b"], ["c"], perm=[2, 0, 1]),
        helper.make_node("Reshape", ["c", "split"], ["d"]),
        helper.make_node("Transpose", ["d"], ["e"], perm=[1, 0, 2]),
        helper.make_node("Transpose", ["d"], ["et"], perm=[1, 2, 0]),
        helper.make_node("MatMul", ["e", "et"], ["f"]),
        helper.make_node("Softmax", ["f"], ["g"], axis=-1),
        helper.make_node("MatMul", ["g", "e"], ["h"]),
        helper.make_node("Transpose", ["h"], ["i"], perm=[1, 0, 2]),
        helper.make_node("Reshape", ["i", "rows"], ["j"]),
        helper.make_node("Gemm", ["j", "w"], ["k"]),
        helper.make_node("Reshape", ["k", "back"], ["l"]),
        helper.make_node("Transpose", ["l"], ["m"], perm=[1, 0, 2]),
        helper.make_node("ReduceMean", ["m"], ["y"], axes=[1], keepdims=0),
    ]
    weights = {
        "tokens": ints(1, channels, length),
        "token": weight(1, channels, 1),
        "split": ints(length + 1, heads, channels // heads),
        "rows": ints(length + 1, channels),
        "w": weight(channels, channels),
        "back": ints(length + 1, 1, channels),
    }
    agrees(save(build(nodes, (1, channels, 4, 4), weights)))


def test_a_batch_fixed_to_more_than_one(save: Save) -> None:
    model = build([helper.make_node("Reshape", ["x", "t"], ["y"])], (4, 3, 4, 4), {"t": ints(4, 48)})
    source = agrees(save(model))
    assert source.original(torch.zeros(5, 3, 4, 4)).shape == (5, 48)


def test_an_index_into_the_flattened_tensor_that_only_rearranges_is_a_reshape(save: Save) -> None:
    """torch's exporter writes `as_strided` so."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3]),
        helper.make_node("Reshape", ["m", "flat"], ["f"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Range", ["zero", "n", "one"], ["r"]),
        helper.make_node("Mul", ["r", "stride"], ["q"]),
        helper.make_node("Unsqueeze", ["q", "axes"], ["u"]),
        helper.make_node("Add", ["u", "columns"], ["i"]),
        helper.make_node("Gather", ["f", "i"], ["y"]),
    ]
    weights = {
        "flat": ints(-1),
        "zero": np.array(0, dtype=np.int64),
        "one": np.array(1, dtype=np.int64),
        "stride": np.array(3, dtype=np.int64),
        "axes": ints(1, 2, 3),
        "columns": np.arange(3).reshape(1, 3, 1, 1),
    }
    source = agrees(save(build(nodes, ("N", 3, 4, 4), weights)))
    assert [name for name, _ in source.module.named_modules() if "gather" in name] == []


def test_an_index_of_many_steps_is_computed_step_by_step(save: Save) -> None:
    """Each step reads the one before it twice: by way of every path there would be 2^40 of them."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2, 3]),
        helper.make_node("Reshape", ["m", "flat"], ["f"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Range", ["zero", "n", "one"], ["r0"]),
        *(helper.make_node("Max", [f"r{k}", f"r{k}"], [f"r{k + 1}"]) for k in range(40)),
        helper.make_node("Gather", ["f", "r40"], ["g"]),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    weights = {"flat": ints(-1), "zero": np.array(0, dtype=np.int64), "one": np.array(1, dtype=np.int64)}
    source = agrees(save(build(nodes, ("N", 3, 4, 4), weights)))
    assert [name for name, _ in source.module.named_modules() if "gather" in name] == []


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("op", ["Add", "Where"])
def test_a_mask_with_a_row_for_each_window(save: Save, batch: int, op: str) -> None:
    """As exporters fold that of shifted windows: [windows, 1, tokens] for one image."""
    mask = np.tile(weight(4, 1, 16), (batch, 1, 1))
    masked = {
        "Add": [helper.make_node("Add", ["w", "mask"], ["m"])],
        "Where": [
            helper.make_node("Greater", ["mask", "zero"], ["kept"]),
            helper.make_node("Where", ["kept", "w", "mask"], ["m"]),
        ],
    }
    nodes = [
        helper.make_node("Reshape", ["x", "grid"], ["g"]),
        helper.make_node("Transpose", ["g"], ["t"], perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", ["t", "windows"], ["w"]),
        *masked[op],
        helper.make_node("Softmax", ["m"], ["s"], axis=-1),
        helper.make_node("Reshape", ["s", "back"], ["y"]),
    ]
    weights = {
        "mask": mask,
        "zero": np.float32(0),
        "grid": ints(batch, 3, 2, 4, 2, 4),
        "windows": ints(-1, 3, 16),
        "back": ints(batch, 2, 2, 3, 4, 4),
    }
    agrees(save(build(nodes, (batch, 3, 8, 8), weights)))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_table_with_a_row_for_each_image(save: Save, batch: int) -> None:
    position = np.tile(weight(1, 3, 4, 4), (batch, 1, 1, 1))
    agrees(save(build([helper.make_node("Add", ["x", "p"], ["y"])], (batch, 3, 4, 4), {"p": position})))


@pytest.mark.parametrize(("axes", "sizes"), [(None, (1, 3, 8, 6)), ([0, 2, 3], (1, 8, 6)), ([2, 3], (8, 6))])
def test_a_resize_to_sizes_of_one_image(save: Save, axes: list[int] | None, sizes: tuple[int, ...]) -> None:
    given = {} if axes is None else {"axes": axes}
    node = helper.make_node("Resize", ["x", "", "", "to"], ["y"], mode="linear", **given)
    agrees(save(build([node], (1, 3, 4, 4), {"to": ints(*sizes)}, opset=18)))
