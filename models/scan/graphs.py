"""The graphs of a decoded ONNX file, those inside nodes and functions too: walked, counted, and free of circles."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator, Sequence

import onnx

from fusion.errors import BadFile

# Of a network, its loops unrolled and its functions put in the place of their calls.
MOST_NODES = 50_000


def graphs_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    """Every graph nested in the attributes of these nodes, at any depth."""
    todo = list(nodes)
    while todo:
        for attribute in todo.pop().attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield graph
                todo.extend(graph.node)


def nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes and those of every graph nested in them."""
    listed = list(nodes)
    yield from listed
    for graph in graphs_within(listed):
        yield from graph.node


def bodies(proto: onnx.ModelProto) -> Iterator[Sequence[onnx.NodeProto]]:
    """The nodes of each graph that stands in no other: the network's, its functions', those for training."""
    yield proto.graph.node
    for function in proto.functions:
        yield function.node
    for training in proto.training_info:
        yield training.initialization.node
        yield training.algorithm.node


def check_size(proto: onnx.ModelProto, name: str) -> None:
    """Refuse more nodes than are read, before anything is made of each."""
    todo, total = list(bodies(proto)), 0
    while todo:
        nodes = todo.pop()
        total += len(nodes)
        if total > MOST_NODES:
            raise too_many(f"more than {MOST_NODES:,}", name)
        todo.extend(
            graph.node
            for node in nodes
            for attribute in node.attribute
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
        )


def too_many(nodes: str, name: str) -> BadFile:
    return BadFile(
        f"{name} has {nodes} nodes; up to {MOST_NODES:,} are read, functions written out. "
        "The file is damaged or hostile."
    )


def check_order(proto: onnx.ModelProto, name: str) -> None:
    """Refuse values that two nodes compute, and nodes that wait for their own result."""
    for body in bodies(proto):
        for nodes in (body, *(graph.node for graph in graphs_within(body))):
            _check_order(nodes, name)


def _check_order(nodes: Sequence[onnx.NodeProto], name: str) -> None:
    maker: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for output in filter(None, node.output):
            if maker.setdefault(output, i) != i:
                raise BadFile(
                    f"{name} is not a readable ONNX file: two nodes compute '{output}'. Export it again."
                )
    before = {i: {maker[value] for value in reads(node) if value in maker} for i, node in enumerate(nodes)}
    if all(j < i for i, made in before.items() for j in made):
        return
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError as error:
        node = nodes[error.args[1][0]]
        raise BadFile(
            f"{name} has nodes that wait for each other in a circle ({node.op_type} '{node.name}'), so it "
            "cannot run. The file is damaged or hostile."
        ) from error


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names of the values that a node reads, those that graphs inside it read from around it too."""
    yield from node.input
    for graph in graphs_within([node]):
        own = {value.name for value in graph.input} | {output for n in graph.node for output in n.output}
        yield from (value for n in graph.node for value in n.input if value not in own)
        yield from (value.name for value in graph.output if value.name not in own)
