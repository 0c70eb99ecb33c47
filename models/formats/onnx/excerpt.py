"""A part of an ONNX file: what leads from its inputs to some of the values on the way."""

from __future__ import annotations

import graphlib
from collections.abc import Collection

import onnx

from models.scan.graphs import reads


def excerpt(data: bytes, outputs: Collection[str]) -> bytes:
    """The file with these values of its graph as its outputs, in this order, without what they do not need.

    So what runs the file need not know the operators behind them. The weights are held once more meanwhile.
    """
    proto = onnx.ModelProto()
    proto.ParseFromString(data)
    keep(proto.graph, outputs)
    stored: bytes = proto.SerializeToString()
    return stored


def keep(graph: onnx.GraphProto, outputs: Collection[str]) -> None:
    """The same of a decoded graph, in place."""
    needed, unneeded = set(outputs), []
    for i in reversed(_order(graph)):
        node = graph.node[i]
        if needed.intersection(node.output):
            needed.update(reads(node))
        else:
            unneeded.append(i)
    for i in sorted(unneeded, reverse=True):
        del graph.node[i]
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in needed:
            del graph.initializer[i]
    del graph.output[:]
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)


def _order(graph: onnx.GraphProto) -> list[int]:
    """The nodes' places, each behind those that it waits for: tools other than exporters write them in any order."""
    maker = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    before = {i: {maker[name] for name in reads(node) if name in maker} for i, node in enumerate(graph.node)}
    return list(graphlib.TopologicalSorter(before).static_order())
