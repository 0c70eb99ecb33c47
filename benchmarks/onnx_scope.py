"""Which of ONNX's own tests concern a library for image networks: the rule, as tables with their reasons.

In scope is every test whose graph, inner graphs included, holds only what none of these tables names: tensor operators
in use, on floats, integers and truth values. An operator's expanded form (its definition by others) is judged by the
operators that it consists of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

OLDEST_OPSET = 7

DOMAINS = {
    "ai.onnx.ml": "classical machine learning: tree ensembles, encoders, feature tables",
    "ai.onnx.preview": "a preview of operators that are not in the standard",
    "ai.onnx.preview.training": "a step of training",
}

_REASONS: dict[str, str] = {
    "a loss for training": "SoftmaxCrossEntropyLoss NegativeLogLikelihoodLoss",
    "random numbers": "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike",
    "audio signals": "BlackmanWindow HammingWindow HannWindow DFT STFT MelWeightMatrix",
    "text": "RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer",
    "decodes image files": "ImageDecoder",
    "sequences": (
        "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength "
        "SequenceMap SplitToSequence"
    ),
    "optional values": "Optional OptionalGetElement OptionalHasElement",
}
OPERATORS = {op: reason for reason, ops in _REASONS.items() for op in ops.split()}

TYPES: dict[int, str] = {
    TensorProto.STRING: "text",
    TensorProto.COMPLEX64: "complex numbers",
    TensorProto.COMPLEX128: "complex numbers",
} | {
    getattr(TensorProto, name): "a float of 8 bits or fewer, in use for language models"
    for name in (
        "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0", "FLOAT4E2M1", "FLOAT6E2M3",
        "FLOAT6E3M2",
    )
    if hasattr(TensorProto, name)
} | {
    getattr(TensorProto, name): "an integer of 4 bits or fewer, in use for language models"
    for name in ("UINT4", "INT4", "UINT2", "INT2")
    if hasattr(TensorProto, name)
}  # fmt: skip

TRAINING = "an operator in training mode"


def out_of_scope(model: onnx.ModelProto, inputs: Iterable[Any] = ()) -> str | None:
    """Why a test is none for this importer; None where it is one. inputs: the values of the graph's inputs."""
    nodes = list(_nodes(model.graph))
    opset = opset_of(model)
    reasons = [
        *(DOMAINS.get(n.domain, f"the domain {n.domain}") for n in nodes if n.domain not in ("", "ai.onnx")),
        *(OPERATORS[n.op_type] for n in nodes if n.op_type in OPERATORS),
        *(reason for value in _values(model.graph) if (reason := _of_type(value.type)) is not None),
        *(TYPES[kind] for kind in _kinds(nodes) if kind in TYPES),
        *(TYPES[tensor.data_type] for tensor in model.graph.initializer if tensor.data_type in TYPES),
        *([TRAINING] if _trains(model.graph, list(inputs)) else []),
        *([f"opset {opset}, older than {OLDEST_OPSET}"] if opset < OLDEST_OPSET else []),
    ]
    return reasons[0] if reasons else None


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model is written in; 0 where it imports none."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def operators_of(model: onnx.ModelProto) -> list[str]:
    """The operators of a graph and the graphs inside it."""
    return sorted({node.op_type for node in _nodes(model.graph)})


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for found in _graphs(graph):
        yield from found.node


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    for found in _graphs(graph):
        yield from (*found.input, *found.output)


def _of_type(kind: onnx.TypeProto) -> str | None:
    if kind.HasField("sequence_type"):
        return "sequences"
    if kind.HasField("optional_type"):
        return "optional values"
    return TYPES.get(kind.tensor_type.elem_type)


def _kinds(nodes: list[onnx.NodeProto]) -> Iterator[int]:
    """The element types that attributes name or hold."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "output_dtype"):
                yield attribute.i
            if attribute.HasField("t"):
                yield attribute.t.data_type


def _trains(graph: onnx.GraphProto, inputs: list[Any]) -> bool:
    given = dict(zip((i.name for i in graph.input), inputs, strict=False))
    return any(
        (
            node.op_type == "BatchNormalization"
            and any(a.name == "training_mode" and a.i for a in node.attribute)
        )
        or (
            node.op_type == "Dropout"
            and len(node.input) > 2
            and bool(np.any(given.get(node.input[2], False)))
        )
        for node in graph.node
    )
