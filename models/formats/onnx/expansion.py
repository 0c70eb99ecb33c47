"""Nodes that stand for other nodes: branches and loops whose course is known, operators that ONNX defines by others.

An expansion looks at one node and returns the nodes that take its place, or None where what decides is not known
(yet): a condition or a trip count that is no constant. Loops unroll one iteration at a time, so that what one iteration
computes can end the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusion.errors import BadFile, UnsupportedOperator
from models.formats.onnx.definitions import defined, definition
from models.formats.onnx.patterns import Known
from models.formats.onnx.registry import OWN, Body, Node, find
from models.scan.graphs import MOST_NODES

# Looks a value up by its name: a tensor (which may lack storage), numbers, or None where nothing is known of it.
Look = Callable[[str], Any]
Expansion = Callable[[Node, dict[str, Known], Look], list[Node] | None]
_EXPANSIONS: dict[tuple[str, str], Expansion] = {}


class Worklist:
    """Nodes in order; those that take a node's place come next. Refuses loops without end."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = deque(nodes)
        self._count = len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        while self._nodes:
            yield self._nodes.popleft()

    def put(self, nodes: Sequence[Node]) -> None:
        self._count += len(nodes)
        if self._count > MOST_NODES:
            raise BadFile(
                f"The file's loops unroll to more than {MOST_NODES} nodes. The file is damaged or hostile."
            )
        self._nodes.extendleft(reversed(nodes))


def expand(node: Node, known: dict[str, Known], look: Look) -> list[Node] | None:
    """The nodes in place of this one, None where it stands for itself; their constants are added to `known`."""
    expansion = _EXPANSIONS.get((node.domain, node.op))
    if expansion is not None:
        return expansion(node, known, look)
    return None if node.domain or find(node) is not None else _by_definition(node, known, look)


def _by_definition(node: Node, known: dict[str, Known], look: Look) -> list[Node] | None:
    body = definition(node, look)
    return None if body is None else inlined(node, body, node.place, node.inputs, node.outputs, known)


def expansion(op: str, domain: str = "") -> Callable[[Expansion], Expansion]:
    def register(function: Expansion) -> Expansion:
        _EXPANSIONS[domain, op] = function
        return function

    return register


def expanded(domain: str = "") -> frozenset[str]:
    """The operators that are read as others: branches, loops, lowerings, and what the standard defines by others."""
    own = {op for place, op in _EXPANSIONS if place == domain}
    return frozenset(own if domain else own | defined())


def why_not(node: Node) -> str:
    """The advice where a node that stands for others could not be expanded; empty for others."""
    if (node.domain, node.op) not in _EXPANSIONS:
        return ""
    return (
        "Its course depends on pixel values or on the batch size, so the network has no fixed graph. "
        "Export it with constant conditions, or name an output in front of it."
    )


def inlined(
    node: Node,
    body: Body,
    place: str,
    arguments: Sequence[str],
    results: Sequence[str],
    known: dict[str, Known],
) -> list[Node]:
    """The nodes of a body of `node` with their values renamed: inputs to `arguments`, outputs to `results`, the rest
    below `place`."""
    names = {"": ""} | node.captures | dict(zip(body.inputs, arguments, strict=False))
    names |= dict.fromkeys(body.inputs[len(arguments) :], "")
    made = {name for n in body.nodes for name in n.outputs}
    passed: list[tuple[str, str]] = []
    for inner, outer in zip(body.outputs, results, strict=False):
        if outer and inner in made and inner not in names:
            names[inner] = outer
        elif outer and inner:
            passed.append((inner, outer))

    def name(inner: str) -> str:
        return names.setdefault(inner, f"{place}/{inner}")

    for key, tensor in body.weights.items():
        known[name(key)] = Known(tensor, key)
    nodes = [
        replace(
            n,
            inputs=tuple(map(name, n.inputs)),
            outputs=tuple(map(name, n.outputs)),
            depth=node.depth + 1,
        )
        for n in body.nodes
    ]
    opset = body.nodes[0].opset if body.nodes else 1
    return nodes + [
        Node("Identity", (name(inner),), (outer,), opset=opset, name=outer) for inner, outer in passed
    ]


def _true(tensor: Tensor) -> bool:
    return bool(tensor.reshape(-1)[0])


@expansion("Attention")
def _attention(node: Node, known: dict[str, Known], look: Look) -> list[Node] | None:
    """By its definition, where it is more than torch's scaled dot product."""
    scores, lengths = node.outputs[3:4], node.inputs[6:7]
    windows = [node.get(side, -1) for side in ("left_window_size", "right_window_size")]
    more = node.get("softcap", 0.0) or any(scores) or any(lengths) or max(windows) >= 0
    return _by_definition(node, known, look) if more else None


@expansion("If")
def _branch(node: Node, known: dict[str, Known], look: Look) -> list[Node] | None:
    condition = node.inputs[0]
    if condition not in known:
        return None
    body = node.get("then_branch" if _true(known[condition].tensor) else "else_branch")
    return inlined(node, body, node.place, (), node.outputs, known)


@expansion("Loop")
def _loop(node: Node, known: dict[str, Known], look: Look) -> list[Node] | None:
    """The loop before its first iteration."""
    trips, *rest = node.own_inputs
    if trips and trips not in known:
        return None
    attributes = {
        "body": node.get("body"),
        "iteration": 0,
        "trips": int(known[trips].tensor.reshape(-1)[0]) if trips else None,
    }
    return [replace(node, domain=OWN, inputs=(*rest, *node.captures.values()), attributes=attributes)]


@expansion("Loop", domain=OWN)
def _iteration(node: Node, known: dict[str, Known], look: Look) -> list[Node] | None:
    """One iteration and the rest of the loop, or the loop's end.

    Its inputs: the condition, the values carried on, what every iteration so far has to be stacked.
    """
    body, i, trips = node.get("body"), node.get("iteration"), node.get("trips")
    condition, *values = node.own_inputs
    if condition and condition not in known:
        return None
    carried = len(body.inputs) - 2
    stacked = len(body.outputs) - 1 - carried
    if (trips is not None and i >= trips) or (condition and not _true(known[condition].tensor)):
        return _ended(node, values, carried, [0] * stacked)
    place = f"{node.place}/{i}"
    counter, truth = f"{place}/iteration", condition or f"{place}/true"
    known[counter] = Known(torch.tensor(i), counter)
    if not condition:
        known[truth] = Known(torch.tensor(True), truth)
    results = [f"{place}/result_{k}" for k in range(len(body.outputs))]
    nodes = inlined(node, body, place, (counter, truth, *values[:carried]), results, known)
    following = replace(
        node,
        inputs=(
            results[0] if condition else "",
            *results[1 : 1 + carried],
            *values[carried:],
            *results[1 + carried :],
            *node.captures.values(),
        ),
        attributes={**node.attributes, "iteration": i + 1},
    )
    return [*nodes, following]


def _ended(node: Node, values: Sequence[str], carried: int, axes: Sequence[int]) -> list[Node]:
    """Hand on the carried values, and stack what each iteration left along `axes`."""
    outputs = [*node.outputs, *[""] * (carried + len(axes) - len(node.outputs))]
    nodes = [
        replace(node, op="Identity", domain="", inputs=(value,), outputs=(output,), attributes={})
        for value, output in zip(values[:carried], outputs[:carried], strict=True)
        if output
    ]
    for k, (output, axis) in enumerate(zip(outputs[carried:], axes, strict=True)):
        parts = tuple(values[carried + k :: len(axes)])
        if output and not parts:
            raise UnsupportedOperator(f"{node.title} without an iteration", node.called)
        if output:
            attributes = {"axis": axis}
            nodes.append(
                replace(node, op="Stack", domain=OWN, inputs=parts, outputs=(output,), attributes=attributes)
            )
    return nodes


@expansion("Scan")
def _scan(node: Node, known: dict[str, Known], look: Look) -> list[Node] | None:
    """All iterations: one for each slice of what is scanned."""
    if node.opset < 9:
        return None  # scans every sample of a batch by itself
    body, scanned = node.get("body"), node.get("num_scan_inputs")
    own, carried = node.own_inputs, len(body.inputs) - scanned
    axes = node.get("scan_input_axes") or [0] * scanned
    backwards = node.get("scan_input_directions") or [0] * scanned
    stacked = len(body.outputs) - carried
    first = look(own[carried])
    length = None if first is None else first.shape[axes[0]]
    if not isinstance(length, int):
        return None
    if length * max(len(body.nodes), 1) > MOST_NODES:
        raise BadFile(f"The file's loops unroll to more than {MOST_NODES} nodes.")
    nodes: list[Node] = []
    state, parts = list(own[:carried]), []
    for i in range(length):
        place = f"{node.place}/{i}"
        slices = []
        for k, (name, axis, backward) in enumerate(zip(own[carried:], axes, backwards, strict=True)):
            index, part = f"{place}/index_{k}", f"{place}/slice_{k}"
            known[index] = Known(torch.tensor(length - 1 - i if backward else i), index)
            picking = replace(
                node, op="Gather", inputs=(name, index), outputs=(part,), attributes={"axis": axis}
            )
            nodes.append(picking)
            slices.append(part)
        results = [f"{place}/result_{k}" for k in range(len(body.outputs))]
        nodes += inlined(node, body, place, (*state, *slices), results, known)
        state = results[:carried]
        parts.append(results[carried:])
    reverse = node.get("scan_output_directions") or [0] * stacked
    columns = [[row[k] for row in (parts[::-1] if reverse[k] else parts)] for k in range(stacked)]
    flat = [name for row in zip(*columns, strict=True) for name in row] if columns else []
    return nodes + _ended(node, [*state, *flat], carried, node.get("scan_output_axes") or [0] * stacked)
