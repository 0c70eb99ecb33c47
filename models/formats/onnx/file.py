"""From a decoded ONNX file to a flat list of nodes; `models.scan.onnx` has refused what is hostile by then."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from fusion.errors import BadFile, NonFiniteWeights, UnsupportedOperator
from fusion.network import is_finite
from models.formats.onnx.registry import Body, Node
from models.formats.onnx.values import widened
from models.scan.functions import STANDARD
from models.scan.onnx import decode
from models.scan.signatures import lacks

# Numbers of so few bits that torch does not compute with them, and what holds all of them.
_NARROW: Mapping[ir.DataType, Any] = {
    kind: np.float32 if kind.name.startswith("FLOAT") else np.uint8 if kind.name.startswith("U") else np.int8
    for kind in ir.DataType
    if re.fullmatch(r"U?INT[24]|FLOAT[468]E\w+", kind.name)
}

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Input:
    """A graph input as the file declares it: a size is None where it is symbolic or missing."""

    name: str
    dtype: ir.DataType | None
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class OnnxFile:
    """What the importer needs of a file; weights in float32. `own` are the values that nodes of its own graph compute,
    in no function or body: those that its runtime can be asked for."""

    nodes: tuple[Node, ...]
    weights: Mapping[str, Tensor]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    metadata: Mapping[str, str]
    widened: tuple[str, ...]
    own: frozenset[str]


def parse(data: bytes, name: str) -> OnnxFile:
    """Read a file's bytes; `name` is for messages only."""
    return flatten(decode(data, name), name)


def flatten(proto: onnx.ModelProto, name: str) -> OnnxFile:
    """The network of a decoded file, with weights of its own, so that the decoded file can go."""
    own = frozenset(output for node in proto.graph.node for output in node.output if output)
    return _flat(_inlined(proto, name), name, own)


def _inlined(proto: onnx.ModelProto, name: str) -> ir.Model:
    """The network as onnx_ir has it, with functions in the place of their calls and the nodes in order."""
    try:
        model = ir.from_proto(proto)
        _keep_versions(model)
        InlinePass()(model)
        model.graph.sort()  # exporters write nodes in order, other tools need not
    except MemoryError:
        raise
    except Exception as error:  # onnx_ir meets damaged fields anywhere, and says so by any error
        raise BadFile(f"{name} is not a readable ONNX file: {_line(error)}. Export it again.") from error
    return model


def _keep_versions(model: ir.Model) -> None:
    """Note with each node of a function which version of the standard it is written in: that of the function, which may
    be another than the network's, and which is lost when the nodes take the place of a call."""
    versions = model.opset_imports
    for function in model.functions.values():
        own = _version(function.opset_imports)
        for node in function.all_nodes():
            node.version = own
        for domain, version in versions.items():  # onnx_ir puts functions of other versions in no place
            if domain in function.opset_imports:
                function.opset_imports[domain] = version


def _version(imports: Mapping[str, int]) -> int:
    """The version of the standard among imported ones, 0 where it is none of them."""
    return next((imports[domain] for domain in STANDARD if domain in imports), 0)


def _flat(model: ir.Model, name: str, own: frozenset[str]) -> OnnxFile:
    opset = _version(model.opset_imports)
    graph = model.graph
    kinds: set[str] = set()
    weights = _weights(graph, name, kinds)
    nodes = tuple(_node(n, opset, name, kinds) for n in graph)
    inputs = tuple(
        Input(v.name or "", v.dtype, _shape(v)) for v in graph.inputs if v.name not in graph.initializers
    )
    outputs = tuple(v.name or "" for v in graph.outputs)
    return OnnxFile(nodes, weights, inputs, outputs, dict(model.metadata_props), tuple(sorted(kinds)), own)


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
    opset = next(o.version for o in function.opset_import if o.domain in STANDARD)
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
        if tensor.dtype in _NARROW:
            kinds.add(tensor.dtype.name.lower())
            array = array.astype(_NARROW[tensor.dtype])
        elif tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
            kinds.add(tensor.dtype.name.lower().replace("double", "float64"))
            array = array.astype(np.float32)
        return widened(torch.from_numpy(np.array(array)))
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadFile(
            f"{name} is not a readable ONNX file: the data of '{key}' {_line(error)}. Export it again."
        ) from error


def _is_bad(weight: Tensor) -> bool:
    """NaN or infinity, except for nothing but zeros and minus infinities: an attention mask, what pools pad with."""
    if not weight.is_floating_point() or is_finite(weight):
        return False
    return not bool(((weight == 0) | torch.isneginf(weight)).all())


def _node(node: ir.Node, opset: int, name: str, kinds: set[str]) -> Node:
    opset = node.version or opset
    attributes: dict[str, Any] = {}
    for key, attribute in node.attributes.items():
        if not isinstance(attribute, ir.Attr) or attribute.is_ref():
            continue  # of a function whose call leaves it out
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR:
            # NumPy, not torch: a torch tensor's entries cannot be looked at while a graph is being captured.
            value = _tensor(value, key, name, kinds).numpy()
        elif attribute.type == ir.AttributeType.GRAPH:
            value = _body(value, opset, name, kinds)
        attributes[key] = value
    inputs = tuple("" if v is None else v.name or "" for v in node.inputs)
    missing = lacks(node.op_type, opset, inputs) if node.domain in STANDARD else ""
    if missing:  # of a function whose call leaves it out
        raise BadFile(
            f"{name} is not a readable ONNX file: the node '{node.name}' ({node.op_type}) lacks its input "
            f"{missing}. Export it again."
        )
    zero = node.inputs[2] if node.op_type == "QuantizeLinear" and len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None and zero.dtype in _NARROW:
        raise UnsupportedOperator(
            f"{node.op_type} to {zero.dtype.name.lower()}",
            node.name or inputs[0],
            "Weights may be of so few bits, what is computed from an image may not: leave its activations as they are.",
        )
    bodies = [value for value in attributes.values() if isinstance(value, Body)]
    captures = dict.fromkeys(capture for body in bodies for capture in body.captures)
    return Node(
        op=node.op_type,
        inputs=(*inputs, *captures),
        outputs=tuple(v.name or "" for v in node.outputs),
        attributes=attributes,
        domain="" if node.domain in STANDARD else node.domain,
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
