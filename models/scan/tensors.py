"""The tensors of a decoded ONNX file: all of their data is in it, and it is as much as they declare."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from fusion.errors import BadFile
from models.scan.graphs import bodies, graphs_within, nodes_within

_MOST_DIMENSIONS = 32  # NumPy's own bound, before 2.0

# The field that a tensor's elements are in where they are not raw bytes (onnx.proto); others are in int32_data.
_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}
_KINDS = frozenset(int(kind) for kind in ir.DataType)
_COMPLEX = (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)


def check_tensors(proto: onnx.ModelProto, name: str) -> None:
    """Refuse data that is missing, and kinds of numbers that ONNX does not have; data in other files has been taken in
    by then (`models.scan.external`)."""
    for tensor in tensors(proto):
        _check_data(tensor, name)


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in the file: initializers and attributes, in the graph, its subgraphs and functions."""
    graphs = [proto.graph]
    graphs += [graph for t in proto.training_info for graph in (t.initialization, t.algorithm)]
    graphs += [graph for nodes in bodies(proto) for graph in graphs_within(nodes)]
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for nodes in bodies(proto):
        for node in nodes_within(nodes):
            for attribute in node.attribute:
                yield from _of_attribute(attribute)
    for function in proto.functions:
        for attribute in function.attribute_proto:
            yield from _of_attribute(attribute)


def check_types(proto: onnx.ModelProto, name: str) -> None:
    """Refuse values that are declared to be of kinds of numbers that ONNX does not have."""
    graphs = [proto.graph, *(graph for nodes in bodies(proto) for graph in graphs_within(nodes))]
    declared = [v for graph in graphs for v in (*graph.input, *graph.output, *graph.value_info)]
    declared += [value for function in proto.functions for value in function.value_info]
    for value in declared:
        kind = value.type
        while kind.HasField("sequence_type") or kind.HasField("optional_type"):
            field = "sequence_type" if kind.HasField("sequence_type") else "optional_type"
            kind = getattr(kind, field).elem_type
        for tensor in (kind.tensor_type, kind.sparse_tensor_type):
            if tensor.elem_type not in _KINDS:
                raise BadFile(
                    f"{name} is not a readable ONNX file: '{value.name}' is of an element type "
                    f"({tensor.elem_type}) that ONNX does not have. Export it again."
                )


def _of_attribute(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    one = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for sparse in (*one, *attribute.sparse_tensors):
        yield from (sparse.values, sparse.indices)


def declared_bytes(tensor: onnx.TensorProto, name: str) -> int:
    """How many raw bytes a tensor's shape and kind of numbers take. Raises BadFile where it can have none."""
    kind, elements = _declared(tensor, name)
    if kind == ir.DataType.STRING:
        raise broken(tensor, "keeps text as raw bytes", name)
    return -(-elements * kind.bitwidth // 8)


def _declared(tensor: onnx.TensorProto, name: str) -> tuple[ir.DataType, int]:
    """The kind and the number of a tensor's elements."""
    kind = ir.DataType(tensor.data_type if tensor.data_type in _KINDS else 0)
    if kind == ir.DataType.UNDEFINED:
        raise broken(tensor, f"is of an element type ({tensor.data_type}) that ONNX does not have", name)
    dims = tuple(tensor.dims)
    if len(dims) > _MOST_DIMENSIONS or min(dims, default=0) < 0:
        raise broken(tensor, f"has the shape {list(dims[:8])}, which no tensor has", name)
    return kind, math.prod(dims)


def _check_data(tensor: onnx.TensorProto, name: str) -> None:
    kind, elements = _declared(tensor, name)
    if tensor.HasField("raw_data"):
        unit, needed, held = "bytes", declared_bytes(tensor, name), len(tensor.raw_data)
    else:
        unit, needed = "values", _values(kind, elements)
        held = len(getattr(tensor, _FIELDS.get(kind, "int32_data")))
    if needed != held:
        raise broken(tensor, f"declares {needed:,} {unit} and holds {held:,}", name)


def _values(kind: ir.DataType, elements: int) -> int:
    """How many values stand for so many elements outside of raw bytes: the smallest types share one."""
    if kind in _COMPLEX:
        return 2 * elements
    if kind == ir.DataType.STRING or kind.bitwidth >= 8:
        return elements
    return -(-elements // (8 // kind.bitwidth))


def broken(tensor: onnx.TensorProto, what: str, name: str) -> BadFile:
    """The error for a tensor that no tool can have written on purpose."""
    return BadFile(
        f"{name} is not a readable ONNX file: the tensor '{tensor.name}' {what}. "
        "The file is truncated, damaged or hostile: export it again."
    )
