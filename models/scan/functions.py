"""The functions of a decoded ONNX file: whether they end, how deep they call each other, how much they come to.

1.8 kB of functions that each call the next one twice stand for 2^26 nodes, and a chain of 3,000 is more than ONNX
Runtime's stack takes: nothing may put functions in the place of their calls before they are counted here.
"""

from __future__ import annotations

import graphlib
from collections.abc import Mapping

import onnx

from fusion.errors import BadFile
from models.scan.graphs import MOST_NODES, nodes_within, too_many

STANDARD = ("", "ai.onnx")
# Exporters follow a network's modules, which are a dozen deep; ONNX Runtime 1.31 crashes from about 2,500 on.
MOST_CALLS = 100

_Key = tuple[str, str, str]


def check_functions(proto: onnx.ModelProto, name: str) -> None:
    """Refuse functions that call themselves, and calls that are too deep or multiply."""
    calls = _calls(proto, name)
    size: dict[_Key, int] = {}
    depth: dict[_Key, int] = {}
    for key in _order(calls, name):
        size[key] = sum(size.get(call, 1) for call in calls[key])
        depth[key] = 1 + max((depth.get(call, 0) for call in calls[key]), default=0)
        if depth[key] > MOST_CALLS:
            raise BadFile(
                f"{name} has functions that call each other more than {MOST_CALLS} deep ({key[1]}). "
                "Export the network without functions."
            )
    total = sum(size.get(_key(node), 1) for node in nodes_within(proto.graph.node))
    if total > MOST_NODES:
        raise too_many(str(total), name)


def _key(node: onnx.NodeProto) -> _Key:
    return (_domain(node.domain), node.op_type, getattr(node, "overload", ""))


def _domain(name: str) -> str:
    return "" if name in STANDARD else name


def _calls(proto: onnx.ModelProto, name: str) -> Mapping[_Key, list[_Key]]:
    """What each function is made of."""
    calls: dict[_Key, list[_Key]] = {}
    for function in proto.functions:
        key = (_domain(function.domain), function.name, getattr(function, "overload", ""))
        if key in calls:
            raise BadFile(
                f"{name} is not a readable ONNX file: it has two functions '{function.name}'. Export it again."
            )
        made = {*function.input, *(output for node in function.node for output in node.output)}
        missing = next((output for output in function.output if output not in made), None)
        if missing is not None:
            raise BadFile(
                f"{name} is not a readable ONNX file: nothing computes the output '{missing}' of the function "
                f"'{function.name}'. Export it again."
            )
        calls[key] = [_key(node) for node in nodes_within(function.node)]
    return calls


def _order(calls: Mapping[_Key, list[_Key]], name: str) -> tuple[_Key, ...]:
    """The functions, each after those that it calls."""
    graph = {key: [call for call in called if call in calls] for key, called in calls.items()}
    try:
        return tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise BadFile(
            f"{name} has a function that calls itself ({error.args[1][0][1]}). "
            "The file is damaged or hostile."
        ) from error
