"""ONNX's own tests run through the importer: `python -m benchmarks.conformance --json FILE [--markdown FILE]`.

Every node test that the installed `onnx` package generates, with its expected outputs and tolerances, and the nine
"light" image networks that it ships. Which tests concern image networks is decided in `onnx_scope`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from onnx import numpy_helper
from torch import Tensor

from benchmarks import documents
from benchmarks.onnx_scope import operators_of, opset_of, out_of_scope
from fusion.errors import ClearfoldError, UnsupportedOperator
from models.formats.onnx import read
from models.formats.onnx.expansion import expanded
from models.formats.onnx.file import OnnxFile, parse
from models.formats.onnx.folding import evaluate
from models.formats.onnx.images import Image
from models.formats.onnx.lowering import MICROSOFT
from models.formats.onnx.module import OnnxModule
from models.formats.onnx.plan import make
from models.formats.onnx.registry import supported
from models.formats.onnx.values import widened

PASS, DIFFERS, MISSING, REFUSED, OUT = "pass", "differs", "missing operator", "refused", "out of scope"
GOAL = 0.95

# Why the tests fail that do. They are expected to: one that passes is no longer true.
_HELD = "unsigned integers of 16 bits are held in 32, whose further bits are inverted as well"
_BITS = "the bits of a type that is held in a wider one"
_RUNTIME = "as ONNX Runtime has it, which files are held against"
KNOWN = {
    "test_bitwise_not_3d": _HELD,
    "test_bitcast_float64_to_int64": _BITS,
    "test_bitcast_int64_to_float64": _BITS,
    "test_bitcast_uint32_to_int32": _BITS,
    "test_bitcast_uint16_to_int16": _BITS,
    "test_maxunpool_export_with_output_shape": f"indices count in the output's shape, {_RUNTIME}",
    "test_resize_downsample_scales_linear_align_corners": f"corners of the rounded size, {_RUNTIME}",
    "test_resize_downsample_scales_cubic_align_corners": f"corners of the rounded size, {_RUNTIME}",
    "test_scan_sum": "Scan of opset 8 goes through every sample by itself; from opset 9 on it does not",
}

# Floats that are computed in float32 are rounded to the type of the expected outputs before they are compared. ONNX's
# own runner allows for two units in the last place of a bfloat16.
_NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_RTOL = {"bfloat16": 2**-6}


@dataclass(frozen=True)
class Case:
    """A test: a model, its inputs, what must come out, and how near."""

    name: str
    model: onnx.ModelProto
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    rtol: float
    atol: float


def node_cases() -> list[Case]:
    """The node tests of the installed `onnx`, which it makes when asked."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # casts beyond a type's range, on purpose
        found = load_model_tests(kind="node")
    return [
        Case(test.name, test.model, tuple(map(_array, inputs)), tuple(map(_array, outputs)), test.rtol, test.atol)
        for test in found
        if test.model is not None
        for inputs, outputs in test.data_sets or ()
    ]  # fmt: skip


def _array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def run(case: Case, runtime: bool = True) -> dict[str, Any]:
    """A row: the outputs as the importer's functions compute them, and whether they do it with a free batch too;
    `runtime` asks ONNX Runtime as well."""
    row: dict[str, Any] = {
        "test": case.name,
        "operator": "",
        "operators": operators_of(case.model),
        "opset": opset_of(case.model),
    }
    reason = out_of_scope(case.model, case.inputs)
    if reason is not None:
        return row | {"result": OUT, "reason": reason}
    if runtime:
        row["onnxruntime"] = by_runtime(case)
    try:
        file = parse(case.model.SerializeToString(), case.name)
        given = {
            value.name: tensor(array)
            for value, array in zip(case.model.graph.input, case.inputs, strict=True)
        }
        found = evaluate(file, given)
    except UnsupportedOperator as error:
        return row | {"result": MISSING, "reason": _line(error)}
    except Exception as error:
        return row | {"result": REFUSED, "reason": f"{type(error).__name__}: {_line(error)}"}
    for name, got, want in zip(file.outputs, found, case.outputs, strict=True):
        difference = differs(got, want, case.rtol, case.atol)
        if difference is not None:
            return row | {"result": DIFFERS, "reason": f"output '{name}': {difference}"}
    return row | {"result": PASS, "free_batch": _with_free_batch(case, file, given)}


def by_runtime(case: Case) -> str:
    """Whether ONNX Runtime passes the same test: its result, or that it refuses."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            case.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        given = {value.name: array for value, array in zip(case.model.graph.input, case.inputs, strict=True)}
        found = session.run(None, given)
        same = all(
            differs(tensor(got), want, case.rtol, case.atol) is None
            for got, want in zip(found, case.outputs, strict=True)
        )
    except Exception:  # of many kinds, mostly operators that it lacks
        return REFUSED
    return PASS if same else DIFFERS


def tensor(array: Any) -> Tensor:
    """A test's value in the type that its kind of numbers is computed in."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":  # none of NumPy's own types
        array = array.astype(np.float32)
    return widened(torch.from_numpy(np.array(array)))


def differs(got: Tensor, want: Any, rtol: float, atol: float) -> str | None:
    """How a result differs from what is expected: in shape, type, or beyond the tolerances; None where it does not."""
    want = np.asarray(want)
    kind = want.dtype.name
    if tuple(got.shape) != want.shape:
        return f"shape {tuple(got.shape)}, not {want.shape}"
    expected = tensor(want)
    if got.dtype != expected.dtype:
        return f"type {got.dtype}, not {expected.dtype}"
    if kind in _NARROW:
        got = got.to(_NARROW[kind]).to(torch.float32)
    try:
        np.testing.assert_allclose(
            got.numpy(), expected.numpy(), rtol=max(rtol, _RTOL.get(kind, 0)), atol=atol
        )
    except AssertionError as error:
        return " ".join(line.strip() for line in str(error).splitlines()[3:6])
    return None


def _with_free_batch(case: Case, file: OnnxFile, given: dict[str, Tensor]) -> str | None:
    """The same test as a network with a free batch: its first input the images, the others constants. None for tests
    whose first input is no batch of floats."""
    image = file.inputs[0].name if file.inputs else ""
    x = given.get(image)
    if x is None or not x.is_floating_point() or x.ndim < 2 or not x.numel():
        return None
    rest = {name: value for name, value in given.items() if name != image}
    network = replace(file, weights={**file.weights, **rest}, outputs=file.outputs[:1])
    try:
        plan = make(network, Image(image, x.shape[0], tuple(x.shape[1:])))
        if plan.cut is not None:
            return f"refused: {plan.cut.note}"
        with torch.no_grad():
            got = OnnxModule(plan)(x)
    except Exception as error:
        return f"refused: {_line(error)}"
    got = got[0] if plan.bare else got
    return differs(got, case.outputs[0], case.rtol, case.atol) or "same"


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def with_operators(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the operator that each tests: its only one, or, for an expanded form, the one that it expands."""
    sole = {row["test"]: row["operators"][0] for row in rows if len(row["operators"]) == 1}
    return [{**row, "operator": sole.get(row["test"].split("_expanded")[0], "several")} for row in rows]


def light_rows() -> list[dict[str, Any]]:
    """The nine light networks, read as a user's file is, against the outputs that ship with them."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return [_light_row(path) for path in sorted(folder.glob("light_*.onnx"))]


def _light_row(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"network": path.stem.removeprefix("light_")}
    stored = onnx.TensorProto()
    stored.ParseFromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
    want = numpy_helper.to_array(stored)
    try:
        source = read(path)
        # The ramp from 0 to 1 that ONNX's runner feeds its networks.
        size = source.example[0].numel()
        x = (torch.arange(size, dtype=torch.float32) / size).reshape(1, *source.example.shape[1:])
        with torch.no_grad():
            got = source.module(x)
        original = source.original(x)
    except ClearfoldError as error:
        return row | {"result": REFUSED, "reason": _line(error)}
    difference = differs(got, want, 1e-3, 1e-7)
    return row | {
        "result": PASS if difference is None else DIFFERS,
        "reason": difference or "",
        "from_runtime": float((got - original).abs().max() / original.abs().max()),
    }


def summarize(rows: Sequence[dict[str, Any]], light: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """in_scope, passed and their share, in all and per opset; what is out of scope by reason."""
    scope = [row for row in rows if row["result"] != OUT]
    batches = [row["free_batch"] for row in scope if row.get("free_batch")]
    return {
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "tests": len(rows),
        **_share(scope),
        "per_opset": {
            str(opset): _share([row for row in scope if row["opset"] == opset])
            for opset in sorted({row["opset"] for row in scope})
        },
        "out_of_scope": dict(Counter(row["reason"] for row in rows if row["result"] == OUT).most_common()),
        "operators": len(expanded() | set(supported())),
        "fused_operators": len(expanded(MICROSOFT)),
        "onnxruntime_passed": sum(row["onnxruntime"] == PASS for row in scope),
        "with_free_batch": {
            "tried": len(batches),
            "same": batches.count("same"),
            "refused": sum(b.startswith("refused") for b in batches),
            "differ": [
                row["test"]
                for row in scope
                if row.get("free_batch") not in (None, "same") and not row["free_batch"].startswith("refused")
            ],
        },
        "light": {"networks": len(light), "passed": sum(row["result"] == PASS for row in light)},
    }


def _share(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    passed = sum(row["result"] == PASS for row in rows)
    return {"in_scope": len(rows), "passed": passed, "share": passed / len(rows) if rows else None}


def markdown(document: dict[str, Any]) -> str:
    """The page for people from the JSON document."""
    summary, rows, light = document["summary"], document["rows"], document["light"]
    failed = [row for row in rows if row["result"] not in (PASS, OUT)]
    batches = summary["with_free_batch"]
    return "\n".join(
        [
            "# ONNX's own tests",
            "",
            "Made by `python -m benchmarks.conformance --json FILE --markdown docs/conformance.md`: the node tests",
            f"of onnx {summary['onnx']}, each computed by the functions that Clearfold's importer is made of and",
            "compared with the expected outputs at the test's own tolerances. Floats are computed in float32 whatever",
            "their type, and rounded to the expected type; unsigned integers of 16 bits and more are held in the next",
            "larger type and compared by value.",
            "",
            f"**{summary['passed']} of {summary['in_scope']} tests in scope pass ({summary['share']:.1%})**; "
            f"{summary['tests'] - summary['in_scope']} of {summary['tests']} are out of scope. The importer",
            f"reads {summary['operators']} operators of the standard. Each test is run a second time as a network",
            f"whose batch is free, where its first input can be a batch of floats ({batches['tried']} tests):",
            f"{batches['same']} give the same outputs, {len(batches['differ'])} others, {batches['refused']} are",
            "refused (they mix samples, or the size of their output depends on values).",
            f"Of the same tests ONNX Runtime {summary['onnxruntime']} passes {summary['onnxruntime_passed']} on a CPU. "
            f"Beside the standard's",
            f"operators, {summary['fused_operators']} of the runtime's own (com.microsoft) are read.",
            "",
            "| opset | in scope | pass | share |",
            "| ---: | ---: | ---: | ---: |",
            *(
                f"| {opset} | {found['in_scope']} | {found['passed']} | {found['share']:.1%} |"
                for opset, found in summary["per_opset"].items()
            ),
            "",
            "## What fails, and why",
            "",
            *(
                ["| test | opset | result | reason | ONNX Runtime |", "| --- | ---: | --- | --- | --- |"]
                + [
                    f"| {r['test']} | {r['opset']} | {r['result']} | {_cell(KNOWN.get(r['test'], r['reason']))} | "
                    f"{r['onnxruntime']} |"
                    for r in failed
                ]
                if failed
                else ["Nothing."]
            ),
            "",
            "## Out of scope",
            "",
            "In scope is every test whose graph holds only tensor operators of networks in use, on floats, integers",
            "and truth values (`benchmarks/onnx_scope.py`). The others:",
            "",
            "| reason | tests |",
            "| --- | ---: |",
            *(f"| {reason} | {count} |" for reason, count in summary["out_of_scope"].items()),
            "",
            "## The light networks",
            "",
            "Nine image networks whose weights are all the same number, read as a user's file is, against the outputs",
            "that ship with them (for most, all classes alike); beside, the difference from ONNX Runtime's, relative",
            "to the largest.",
            "",
            "| network | result | from ONNX Runtime |",
            "| --- | --- | ---: |",
            *(
                f"| {row['network']} | {row['result']}{' ' + _cell(row['reason']) if row['reason'] else ''} | "
                f"{row['from_runtime']:.1e} |"
                if "from_runtime" in row
                else f"| {row['network']} | {row['result']}: {_cell(row['reason'])} | |"
                for row in light
            ),
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    documents.add_outputs(parser)
    parser.add_argument(
        "--only", default="", help="node tests whose name contains this, and no light networks"
    )
    arguments = parser.parse_args()
    rows = with_operators([run(case) for case in node_cases() if arguments.only in case.name])
    light = [] if arguments.only else light_rows()
    document = {"summary": summarize(rows, light), "rows": rows, "light": light}
    for row in rows:
        if row["result"] not in (PASS, OUT):
            print(json.dumps(row))
    documents.write_json(arguments, document)
    documents.write_page(arguments, document, markdown)


if __name__ == "__main__":
    main()
