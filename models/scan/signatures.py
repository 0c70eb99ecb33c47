"""The nodes of a decoded ONNX file against the standard's own table: the inputs, outputs and attributes that they take.

What is read from a node behind this is there and is of the kind that it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import onnx

from fusion.errors import BadFile
from models.scan.functions import STANDARD
from models.scan.graphs import nodes_within

_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single
_MOST = 2**31 - 1  # stands for any number
# Kinds of attributes that are there or not, and the fields that hold them; a number that is not there is zero.
_HELD = {"TENSOR": "t", "SPARSE_TENSOR": "sparse_tensor", "GRAPH": "g"}


def check_signatures(proto: onnx.ModelProto, name: str) -> None:
    """Refuse nodes of the standard that it does not have in this form, and nodes without a result."""
    _check(proto.graph.node, {o.domain: o.version for o in proto.opset_import}, name)
    for function in proto.functions:
        _check(function.node, {o.domain: o.version for o in function.opset_import}, name)


def lacks(op: str, version: int, inputs: Sequence[str]) -> str:
    """The input that an operator of the standard needs and that a node leaves out, empty where there is none."""
    schema = _schema(op, version)
    needed = schema.inputs[: schema.min_input] if schema is not None else ()
    given = (*inputs, *[""] * len(needed))
    return next(
        (p.name for p, value in zip(needed, given, strict=False) if not value and p.option == _SINGLE), ""
    )


def _check(nodes: Iterable[onnx.NodeProto], opsets: Mapping[str, int], name: str) -> None:
    version = max((opsets[domain] for domain in STANDARD if domain in opsets), default=0)
    for node in nodes_within(nodes):
        if not any(node.output):
            raise _refused(node, "has no output", name)
        untyped = next((a.name for a in node.attribute if not a.type), None)
        if untyped is not None:
            raise _refused(node, f"has an attribute '{untyped}' of no kind", name)
        schema = _schema(node.op_type, version) if node.domain in STANDARD else None
        if schema is None:
            continue  # an operator that is not known is refused where it is needed
        _check_count(node, "inputs", len(node.input), schema.min_input, schema.max_input, name)
        _check_count(node, "outputs", len(node.output), schema.min_output, schema.max_output, name)
        lacking = lacks(node.op_type, version, node.input)
        if lacking:
            raise _refused(node, f"lacks its input {lacking}", name)
        _check_attributes(node, schema, name)
        if node.op_type in _BODIES:
            _BODIES[node.op_type](node, {a.name: a for a in node.attribute}, name)


def _schema(op: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return None


def _check_count(node: onnx.NodeProto, what: str, given: int, least: int, most: int, name: str) -> None:
    if least <= given <= most:
        return
    wanted = f"{least}" if least == most else f"{least} or more" if most >= _MOST else f"{least} to {most}"
    raise _refused(node, f"has {given} {what} and takes {wanted}", name)


def _check_attributes(node: onnx.NodeProto, schema: onnx.defs.OpSchema, name: str) -> None:
    given = {attribute.name: attribute for attribute in node.attribute}
    if len(given) < len(node.attribute):
        raise _refused(node, "has an attribute twice", name)
    for key, declared in schema.attributes.items():
        if key not in given:
            if declared.required:
                raise _refused(node, f"lacks its attribute '{key}'", name)
            continue
        kind = _kind(declared)
        if not _is_a(given[key], kind):
            raise _refused(node, f"has an attribute '{key}' that is no {kind}", name)


def _kind(declared: Any) -> str:  # onnx's stubs lack what its enumerations stand for
    return str(onnx.AttributeProto.AttributeType.Name(declared.type.value))


def _is_a(attribute: onnx.AttributeProto, kind: str) -> bool:
    """Whether an attribute is of a kind, and holds what has no default."""
    if onnx.AttributeProto.AttributeType.Name(attribute.type) != kind:
        return False
    return kind not in _HELD or bool(attribute.ref_attr_name) or attribute.HasField(_HELD[kind])


def _check_branches(node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto], name: str) -> None:
    for key in ("then_branch", "else_branch"):
        branch = attributes[key].g
        if branch.input or len(branch.output) < len(node.output):
            raise _refused(node, f"has a {key} that does not give what the node does", name)


def _check_loop(node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto], name: str) -> None:
    """The body takes the iteration, the condition and what is carried on; it gives the condition, that, and more."""
    body, carried = attributes["body"].g, len(node.input) - 2
    fits = len(body.input) == carried + 2 and len(body.output) > carried
    if not fits or len(node.output) >= len(body.output):
        raise _refused(node, "has a body that does not take and give what the loop does", name)


def _check_scan(node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto], name: str) -> None:
    """The body takes and gives the state and slices; a list about slices has an entry for each."""
    body, scanned = attributes["body"].g, attributes["num_scan_inputs"].i
    if not 0 < scanned <= len(body.input) or len(body.output) < max(
        len(node.output), len(body.input) - scanned
    ):
        raise _refused(node, "has a body that does not take and give what the scan does", name)
    stacked = len(body.output) - len(body.input) + scanned
    for key, count in (
        *((f"scan_input_{what}", scanned) for what in ("axes", "directions")),
        *((f"scan_output_{what}", stacked) for what in ("axes", "directions")),
    ):
        if key in attributes and len(attributes[key].ints) != count:
            raise _refused(node, f"has {len(attributes[key].ints)} '{key}' and needs {count}", name)


_BODIES: dict[str, Callable[[onnx.NodeProto, Mapping[str, onnx.AttributeProto], str], None]] = {
    "If": _check_branches,
    "Loop": _check_loop,
    "Scan": _check_scan,
}


def _refused(node: onnx.NodeProto, what: str, name: str) -> BadFile:
    title = node.name or next(filter(None, node.output), "")
    return BadFile(
        f"{name} is not a readable ONNX file: the node '{title}' ({node.op_type}) {what}. Export it again."
    )
