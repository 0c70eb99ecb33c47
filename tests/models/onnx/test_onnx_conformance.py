"""ONNX's own node tests: those in scope pass, except those that are known to fail, which do."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from benchmarks.conformance import (
    DIFFERS,
    GOAL,
    KNOWN,
    MISSING,
    OUT,
    PASS,
    Case,
    differs,
    light_rows,
    markdown,
    node_cases,
    run,
    summarize,
    with_operators,
)
from benchmarks.onnx_scope import OPERATORS, TYPES, out_of_scope
from models.formats.onnx import lowerings, operators  # noqa: F401  (they fill the registries)
from models.formats.onnx.expansion import expanded
from models.formats.onnx.lowering import MICROSOFT
from models.formats.onnx.registry import _OPERATORS, supported


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return with_operators([run(case, runtime=False) for case in node_cases()])


def test_every_test_in_scope_passes_but_those_that_are_known_to_fail(rows: list[dict[str, Any]]) -> None:
    failed = {row["test"]: row["reason"] for row in rows if row["result"] not in (PASS, OUT)}
    unexpected = {test: reason for test, reason in failed.items() if test not in KNOWN}
    assert unexpected == {}
    assert set(KNOWN) - set(failed) == set(), "listed as failing, but passes: take it off the list"


def test_the_share_is_that_of_the_goal(rows: list[dict[str, Any]]) -> None:
    scope = [row for row in rows if row["result"] != OUT]
    assert len(scope) >= 1400
    assert sum(row["result"] == PASS for row in scope) >= GOAL * len(scope)
    assert len(expanded() | set(supported())) >= 150
    assert {"FusedMatMul", "SkipLayerNormalization", "BiasGelu", "Attention"} <= expanded(MICROSOFT)


def test_with_a_free_batch_the_outputs_are_the_same_or_the_test_is_refused(
    rows: list[dict[str, Any]],
) -> None:
    found = {row["test"]: row["free_batch"] for row in rows if row.get("free_batch")}
    wrong = {test: said for test, said in found.items() if said != "same" and not said.startswith("refused")}
    assert wrong == {}
    assert sum(said == "same" for said in found.values()) >= 700


def test_the_summary_counts_rows(rows: list[dict[str, Any]]) -> None:
    document = {"rows": [{**row, "onnxruntime": PASS} for row in rows], "light": []}
    document["summary"] = summarize(document["rows"], [])
    summary = document["summary"]
    assert summary["in_scope"] + sum(summary["out_of_scope"].values()) == len(rows)
    assert summary["in_scope"] == sum(found["in_scope"] for found in summary["per_opset"].values())
    assert summary["passed"] == sum(row["result"] == PASS for row in rows)
    page = markdown(document)
    assert all(test in page for test in KNOWN)


def relu(expected: np.ndarray[Any, Any], op: str = "Relu") -> Case:
    x = np.array([[-1, 2]], dtype=np.float32)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2)) for name in "xy"]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Case("relu", model, (x,), (expected,), 1e-3, 1e-7)


def test_a_row_says_what_differs() -> None:
    right = np.array([[0, 2]], dtype=np.float32)
    assert run(relu(right))["result"] == PASS
    assert run(relu(right))["free_batch"] == "same"
    assert run(relu(right))["onnxruntime"] == PASS
    for wrong, said in ((right + 1, "Mismatch"), (right[0], "shape"), (right.astype(np.int64), "type")):
        row = run(relu(wrong))
        assert row["result"] == DIFFERS
        assert said in row["reason"]
    assert run(relu(right, "Blur"))["result"] == MISSING


@pytest.mark.parametrize(("kind", "step"), [(np.float16, 2**-10), (np.float64, None)])
def test_floats_are_compared_in_the_expected_type(kind: Any, step: float | None) -> None:
    want = np.array([1.0, 3.0], dtype=kind)
    assert differs(torch.tensor([1.0, 3.0 + 1e-6]), want, 1e-3, 0) is None
    assert differs(torch.tensor([1.0, 3.01]), want, 1e-3, 0) is not None


def test_what_is_out_of_scope_has_a_reason_from_the_tables(rows: list[dict[str, Any]]) -> None:
    assert out_of_scope(relu(np.zeros((1, 2))).model) is None
    assert out_of_scope(relu(np.zeros((1, 2)), "DFT").model) == OPERATORS["DFT"]
    reasons = {row["reason"] for row in rows if row["result"] == OUT}
    assert {OPERATORS["DFT"], TYPES[TensorProto.STRING], "sequences"} <= reasons


# Attributes that change nothing here, or whose other values are refused elsewhere, and why.
_IGNORED = {
    "Cast": {"saturate", "round_mode"},  # of floats of eight bits, which are not read
    "CastLike": {"saturate", "round_mode"},
    "QuantizeLinear": {"saturate", "precision"},  # the same; and computed in float32
    "DequantizeLinear": {"output_dtype"},  # every float is float32
    "BatchNormalization": {"momentum"},  # of training
    "Dropout": {"ratio", "seed", "is_test"},
    "LayerNormalization": {"stash_type"},  # computed in float32
    "RMSNormalization": {"stash_type"},
    "GroupNormalization": {"stash_type"},
    "Attention": {
        "softmax_precision",
        # with these it is read by its definition
        "softcap", "left_window_size", "right_window_size", "qk_matmul_output_mode",
    },
    "ConvInteger": {"group"},  # read by the convolution that it calls
    "TopK": {"sorted"},  # where any order will do, the sorted one does
    "Range": {"stash_type"},
    "RNN": {"hidden_size", "output_sequence"},  # the weights say it
    "GRU": {"hidden_size", "output_sequence"},
    "LSTM": {"hidden_size", "output_sequence"},
    "Constant": {"sparse_value", "value_string", "value_strings"},  # refused
}  # fmt: skip


def _attributes_read() -> dict[str, set[str]]:
    """The attributes that each module of operators asks its nodes for."""
    import models.formats.onnx.operators as package

    found: dict[str, set[str]] = {}
    for name in package.__all__:
        module = getattr(package, name)
        tree = ast.parse(inspect.getsource(module))
        found[module.__name__] = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    return found


def test_no_attribute_of_the_standard_is_passed_over() -> None:
    """Of every operator with a function here, at every version that opset 7 and later have, each attribute is asked for
    by name in the module of the function."""
    read = _attributes_read()
    window = {"auto_pad", "dilations", "kernel_shape", "pads", "strides"}  # read by one function for all
    schemas: Any = onnx.defs.get_all_schemas_with_history()
    by_name: dict[str, list[Any]] = {}
    for schema in schemas:
        if not schema.domain:
            by_name.setdefault(schema.name, []).append(schema)
    passed_over = set()
    for name in supported():
        functions = _OPERATORS["", name]
        known = window.union(*(read[version.run.__module__] for version in functions))
        known |= _IGNORED.get(name, set())
        history = sorted(by_name.get(name, []), key=lambda schema: schema.since_version)
        if not history:  # an operator that the runtime writes in the name of the standard
            continue
        newer = [schema.since_version for schema in history[1:]] + [1000]
        for schema, following in zip(history, newer, strict=True):
            if following > 7 and not schema.deprecated:
                passed_over |= {
                    (name, attribute) for attribute in schema.attributes if attribute not in known
                }
    assert sorted(passed_over) == []


@pytest.mark.slow
def test_the_light_networks() -> None:
    found = light_rows()
    assert len(found) == 9
    assert [row for row in found if row["result"] != PASS] == []
