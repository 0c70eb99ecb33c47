"""From the bytes of an ONNX file to a flat list of nodes, refusing what is damaged or hostile on the way.

Nothing here resolves a path: the file is parsed from bytes, and data that it keeps elsewhere is refused.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from fusion.errors import BadFile, ClearfoldError, NonFiniteWeights, UnsupportedOperator
from fusion.network import is_finite
from models.formats.onnx.registry import Body, Node
from models.formats.onnx.values import widened

_OLDEST_OPSET = 7
MOST_NODES = 50_000
_STANDARD = ("", "ai.onnx")
# What ONNX Runtime's optimizer leaves in a file.
_FUSED = ("com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Input:
    """A graph input as the file declares it: a size is None where it is symbolic or missing."""

    name: str
    dtype: ir.DataType | None
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class OnnxFile:
    """What the importer needs of a file; weights in float32."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, Tensor]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str]
    widened: tuple[str, ...]


def parse(data: bytes, name: str) -> OnnxFile:
    """Read a file's bytes; `name` is for messages only."""
    return flatten(decode(data, name), name)


def flatten(proto: onnx.ModelProto, name: str) -> OnnxFile:
    """The network of a decoded file, with weights of its own, so that the decoded file can go."""
    _check(proto, name)
    try:
        model = ir.from_proto(proto)
        InlinePass()(model)
        return _flat(model, name)
    except ClearfoldError:
        raise
    except Exception as error:  # damaged fields surface anywhere, as anything
        raise BadFile(f"{name} is not a readable ONNX file: {_line(error)}. Export it again.") from error


def decode(data: bytes, name: str) -> onnx.ModelProto:
    """The file's bytes as protobuf; the data of its tensors is copied."""
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(data)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise BadFile(
            f"{name} is not a readable ONNX file: it is damaged, truncated or of another format. "
            "Export it again."
        ) from error
    if not proto.ir_version or not proto.opset_import or not proto.graph.node:
        raise BadFile(f"{name} is not a readable ONNX file: it holds no network. Export it again.")
    return proto


def _check(proto: onnx.ModelProto, name: str) -> None:
    opsets = {o.domain: o.version for o in proto.opset_import}
    version = opsets.get("", opsets.get("ai.onnx", 0))
    if version < _OLDEST_OPSET:
        raise BadFile(
            f"{name} uses ONNX opset {version}; opsets from {_OLDEST_OPSET} on are read. "
            "Export it with a newer one."
        )
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise BadFile(
            f"{name} uses ONNX opset {version}; opsets up to {newest} are read. Export it with an older one."
        )
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise BadFile(
                f"{name} keeps weights ('{tensor.name}') in another file. Save it as a single file "
                "(torch.onnx.export with external_data=False, or onnx.save with save_as_external_data=False)."
            )
    _check_calls(proto, name)


def _graphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """Every graph nested in the attributes of these nodes, at any depth."""
    todo = list(nodes)
    while todo:
        for attribute in todo.pop().attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield graph
                todo.extend(graph.node)


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    listed = list(nodes)
    yield from listed
    for graph in _graphs(listed):
        yield from graph.node


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in the file: initializers and attributes, in the graph, its subgraphs and functions."""
    bodies = [list(proto.graph.node), *(list(f.node) for f in proto.functions)]
    training = [graph for t in proto.training_info for graph in (t.initialization, t.algorithm)]
    bodies += [list(graph.node) for graph in training]
    graphs = [proto.graph, *training, *(g for body in bodies for g in _graphs(body))]
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    attributes = [a for body in bodies for node in _all_nodes(body) for a in node.attribute]
    attributes += [a for function in proto.functions for a in function.attribute_proto]
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (
            *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
            *attribute.sparse_tensors,
        ):
            yield from (sparse.values, sparse.indices)


_Key = tuple[str, str, str]


def _key(node: onnx.NodeProto) -> _Key:
    return ("" if node.domain in _STANDARD else node.domain, node.op_type, getattr(node, "overload", ""))


def _check_calls(proto: onnx.ModelProto, name: str) -> None:
    """Refuse unknown domains, functions that call themselves, and calls that multiply without end."""
    functions = {
        ("" if f.domain in _STANDARD else f.domain, f.name, getattr(f, "overload", "")): f
        for f in proto.functions
    }
    calls: dict[_Key, list[_Key]] = {
        key: [_key(n) for n in _all_nodes(f.node)] for key, f in functions.items()
    }
    for node in (n for body in (proto.graph, *proto.functions) for n in _all_nodes(body.node)):
        if node.domain not in (*_STANDARD, *_FUSED) and _key(node) not in functions:
            raise UnsupportedOperator(
                f"{node.domain}::{node.op_type}",
                node.name,
                "Only operators of the ONNX standard and of ONNX Runtime's optimizer are read; "
                "export without custom ones.",
            )
    try:
        order = list(
            graphlib.TopologicalSorter(
                {k: [c for c in v if c in functions] for k, v in calls.items()}
            ).static_order()
        )
    except graphlib.CycleError as error:
        raise BadFile(
            f"{name} has a function that calls itself ({error.args[1][0][1]}). "
            "The file is damaged or hostile."
        ) from error
    size: dict[_Key, int] = {}
    for key in order:
        size[key] = sum(size.get(call, 1) for call in calls[key])
    total = sum(size.get(_key(node), 1) for node in _all_nodes(proto.graph.node))
    if total > MOST_NODES:
        raise BadFile(
            f"{name} has {total} nodes, more than the {MOST_NODES} that are read. "
            "The file is damaged or hostile."
        )


def _flat(model: ir.Model, name: str) -> OnnxFile:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    graph = model.graph
    kinds: set[str] = set()
    weights = _weights(graph, name, kinds)
    nodes = tuple(_node(n, opset, name, kinds) for n in graph)
    inputs = tuple(
        Input(v.name or "", v.dtype, _shape(v)) for v in graph.inputs if v.name not in graph.initializers
    )
    outputs = tuple(v.name or "" for v in graph.outputs)
    return OnnxFile(nodes, weights, inputs, outputs, dict(model.metadata_props), tuple(sorted(kinds)))


def _weights(graph: ir.Graph, name: str, kinds: set[str]) -> dict[str, Tensor]:
    weights = {
        key: _tensor(value.const_value, key, name, kinds)
        for key, value in graph.initializers.items()
        if value.const_value is not None
    }
    bad = [key for key, weight in weights.items() if _is_bad(weight)]
    if bad:
        raise NonFiniteWeights(bad)
    return weights


def _body(graph: ir.Graph, opset: int, name: str, kinds: set[str]) -> Body:
    """A graph inside a node."""
    weights = _weights(graph, name, kinds)
    inputs, outputs = (tuple(v.name or "" for v in values) for values in (graph.inputs, graph.outputs))
    nodes = tuple(_node(n, opset, name, kinds) for n in graph)
    made = {*inputs, *weights, *(output for node in nodes for output in node.outputs)}
    read = dict.fromkeys([*(i for node in nodes for i in node.inputs if i), *outputs])
    return Body(nodes, inputs, outputs, tuple(value for value in read if value not in made), weights)


def function_body(function: onnx.FunctionProto, call: onnx.NodeProto) -> Body:
    """A function's body with the attributes of a call filled in."""
    function.domain = "definition"
    made = {name for node in function.node for name in node.output}.union(function.input)
    outputs = [name for name in function.output if name in made]  # a body may lack those that the call omits
    given = [*call.input, *[""] * (len(function.input) - len(call.input))]
    node = onnx.NodeProto(
        op_type=function.name,
        domain=function.domain,
        input=[name if value else "" for name, value in zip(function.input, given, strict=True)],
        output=outputs,
    )
    node.attribute.extend(call.attribute)
    declared = list(function.output)
    del function.output[:]
    function.output.extend(outputs)
    untyped = onnx.helper.make_empty_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], function.name, list(map(untyped, function.input)), list(map(untyped, outputs))
    )
    imports = [*function.opset_import, onnx.helper.make_opsetid(function.domain, 1)]
    model = ir.from_proto(onnx.helper.make_model(graph, functions=[function], opset_imports=imports))
    InlinePass()(model)
    opset = next(o.version for o in function.opset_import if o.domain in _STANDARD)
    body = _body(model.graph, opset, function.name, set())
    return replace(body, outputs=tuple(name if name in made else "" for name in declared))


def _shape(value: ir.Value) -> tuple[int | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) and d > 0 else None for d in value.shape)


def _tensor(tensor: ir.TensorProtocol, key: str, name: str, kinds: set[str]) -> Tensor:
    """A file's tensor, with floats in float32; `kinds` gathers the other float types met."""
    try:
        array = np.asarray(tensor.numpy())
        if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
            kinds.add(tensor.dtype.name.lower().replace("double", "float64"))
            array = array.astype(np.float32)
        return widened(torch.from_numpy(np.array(array)))
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadFile(
            f"{name} is not a readable ONNX file: the data of '{key}' {_line(error)}. Export it again."
        ) from error


def _is_bad(weight: Tensor) -> bool:
    """NaN or infinity, except for an attention mask of nothing but zeros and minus infinities."""
    if not weight.is_floating_point() or is_finite(weight):
        return False
    return not bool(((weight == 0) | torch.isneginf(weight)).all()) or weight.numel() == 1


def _node(node: ir.Node, opset: int, name: str, kinds: set[str]) -> Node:
    attributes: dict[str, Any] = {}
    for key, attribute in node.attributes.items():
        if not isinstance(attribute, ir.Attr):
            continue
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            # NumPy, not torch: a torch tensor's entries cannot be looked at while a graph is being captured.
            value = _tensor(value, key, name, kinds).numpy()
        elif attribute.type == ir.AttributeType.GRAPH:
            value = _body(value, opset, name, kinds)
        attributes[key] = value
    bodies = [value for value in attributes.values() if isinstance(value, Body)]
    captures = dict.fromkeys(capture for body in bodies for capture in body.captures)
    return Node(
        op=node.op_type,
        inputs=(*("" if v is None else v.name or "" for v in node.inputs), *captures),
        outputs=tuple(v.name or "" for v in node.outputs),
        attributes=attributes,
        domain="" if node.domain in _STANDARD else node.domain,
        opset=opset,
        name=node.name or "",
        scopes=_scopes(node.metadata_props.get(_SCOPES, "")),
    )


def _scopes(text: str) -> tuple[str, ...]:
    """The module path that torch's exporter left with a node, outermost first; empty if it did not."""
    try:
        scopes = ast.literal_eval(text) if text and len(text) < 10_000 else ()
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ()
    return tuple(s for s in scopes if isinstance(s, str)) if isinstance(scopes, list | tuple) else ()


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return next(
        (line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
