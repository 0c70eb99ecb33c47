"""The nodes of a decoded ONNX file against the standard's own table: the inputs, outputs and attributes that they take.

What is read from a node behind this is there and is of the kind that it has to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from fusion.errors import BadFile
from models.scan.functions import STANDARD
from models.scan.graphs import nodes_within

_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single
_MOST = 2**31 - 1  # stands for any number


def check_signatures(proto: onnx.ModelProto, name: str) -> None:
    """Refuse nodes of the standard that it does not have in this form, and nodes without a result."""
    _check(proto.graph.node, {o.domain: o.version for o in proto.opset_import}, name)
    for function in proto.functions:
        _check(function.node, {o.domain: o.version for o in function.opset_import}, name)


def _check(nodes: Iterable[onnx.NodeProto], opsets: Mapping[str, int], name: str) -> None:
    version = max((opsets[domain] for domain in STANDARD if domain in opsets), default=0)
    for node in nodes_within(nodes):
        if not any(node.output):
            raise _refused(node, "has no output", name)
        if node.domain not in STANDARD:
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, version, "")
        except onnx.defs.SchemaError:
            continue  # an operator that is not known is refused where it is needed
        _check_count(node, "inputs", len(node.input), schema.min_input, schema.max_input, name)
        _check_count(node, "outputs", len(node.output), schema.min_output, schema.max_output, name)
        for parameter, given in zip(schema.inputs, node.input, strict=False):
            if not given and parameter.option == _SINGLE:
                raise _refused(node, f"lacks its input {parameter.name}", name)
        _check_attributes(node, schema, name)


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
        kind = onnx.AttributeProto.AttributeType.Name(declared.type.value)
        attribute = given[key]
        if attribute.type != declared.type.value and (attribute.type or not _holds(attribute, kind)):
            raise _refused(node, f"has an attribute '{key}' that is no {kind}", name)


def _holds(attribute: onnx.AttributeProto, kind: str) -> bool:
    """Whether an attribute of no stated type, as the oldest exporters wrote them, holds what it should."""
    field = {"FLOAT": "f", "INT": "i", "STRING": "s", "TENSOR": "t", "GRAPH": "g"}.get(kind)
    return attribute.HasField(field) if field else bool(getattr(attribute, kind.lower(), ()))


def _refused(node: onnx.NodeProto, what: str, name: str) -> BadFile:
    title = node.name or next(filter(None, node.output), "")
    return BadFile(
        f"{name} is not a readable ONNX file: the node '{title}' ({node.op_type}) {what}. Export it again."
    )
