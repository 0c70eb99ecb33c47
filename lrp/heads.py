"""The outputs of a network as they are explained: before a final softmax or sigmoid, with what is known of their
axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fusion.network import Network, OutputSpec, Shape, op_name
from fusion.outputs import Kind, nothing_to_explain
from lrp.channels import channel_axis
from lrp.held import unrounded

aten = torch.ops.aten

_SOFTMAX = ("softmax", "_softmax", "log_softmax", "_log_softmax")
_SIGMOID = ("sigmoid", "log_sigmoid")
_RESHAPING = ("reshape", "flatten", "squeeze", "unsqueeze")
_CASTING = ("_to_copy", "to")


@dataclass(frozen=True)
class Head:
    """One output as it is explained.

    name: the author's, or its position. kind: what it holds (`fusion.outputs`). node: the network's node that is
    explained. shape: the values' [N, ...] as an explanation gives them (None where it follows the batch): class scores
    as [N, K], single numbers as [N, 1]. axis: the channels', None where there are none. before: the final operator that
    was left out, empty where there was none.
    """

    name: str
    kind: Kind
    node: str
    shape: Shape
    axis: int | None
    before: str

    @property
    def note(self) -> str:
        """What was left out, in a sentence."""
        what = "score" if self.kind == "scores" else f"value of '{self.name}'"
        return f"The {what} before the final {self.before} is explained." if self.before else ""

    def __str__(self) -> str:
        sides = " x ".join("N" if size is None else str(size) for size in self.shape)
        return f"'{self.name}' ({self.kind}, {sides})"


def heads(network: Network) -> tuple[Head, ...]:
    """The outputs that can be explained, in order: floating-point numbers that follow the batch. Raises
    NothingToExplain where there is none."""
    pairs = zip(network.output_values, network.outputs, strict=True)
    found = tuple(_head(node, spec) for node, spec in pairs if spec.explainable)
    if not found:
        raise nothing_to_explain([(spec.shape, spec.dtype) for spec in network.outputs])
    return found


def in_shape(graph: fx.Graph, value: fx.Node, rank: int, head: Head) -> fx.Node:
    """An output's value, a node of the graph, in the shape that its head has. rank: of the value."""
    if rank == 1:
        return graph.call_function(aten.unsqueeze.default, (value, 1))
    if rank > len(head.shape):
        return graph.call_function(aten.flatten.using_ints, (value, 1))
    return value


def _head(output: fx.Node, spec: OutputSpec) -> Head:
    if spec.kind in ("scores", "vector") and all(size == 1 for size in spec.shape[2:]):
        node, before = _before_choice_of_classes(output) if spec.kind == "scores" else (output, "")
        return Head(spec.name, spec.kind, node.name, (None, spec.shape[1]), 1, before)
    if spec.kind == "value":
        node, before, _ = _before_choice(output, _SIGMOID)
        return Head(spec.name, spec.kind, node.name, (None, 1), 1, before)
    node, before, axis = _before_choice(output, (*_SOFTMAX, *_SIGMOID))
    if axis is None and len(spec.shape) > 2:
        axis = channel_axis(node)
    return Head(spec.name, spec.kind, node.name, spec.shape, axis, before)


def _before_choice(output: fx.Node, choices: Sequence[str]) -> tuple[fx.Node, str, int | None]:
    """The node before a final operator of these, its name, and the axis that a softmax goes along."""
    last = unrounded(output)
    while last.op == "call_function" and op_name(last) in _CASTING:
        last = last.args[0]  # type: ignore[assignment]
    if last.op != "call_function" or op_name(last) not in choices:
        return output, "", None
    before = last.args[0]
    assert isinstance(before, fx.Node)
    if op_name(last) in _SIGMOID:
        return before, op_name(last), None
    axis: int = last.args[1]  # type: ignore[assignment]
    return before, op_name(last).strip("_"), axis % len(before.meta["shape"])


def _before_choice_of_classes(output: fx.Node) -> tuple[fx.Node, str]:
    """The node before a final (log-)softmax over classes [N, K] or [N, K, 1, 1], or before a (log-)sigmoid of each,
    reshaped or not, and its name."""
    last = unrounded(output)
    while last.op == "call_function" and op_name(last) in (*_RESHAPING, *_CASTING):
        last = last.args[0]  # type: ignore[assignment]
    if last.op == "call_function" and op_name(last) in _SOFTMAX:
        before = last.args[0]
        assert isinstance(before, fx.Node)
        shape = before.meta["shape"]
        if (
            len(shape) >= 2
            and shape[1] == output.meta["shape"][1]
            and last.args[1] in (1, 1 - len(shape))
            and all(size == 1 for size in shape[2:])
        ):
            return before, op_name(last).strip("_")
    if last.op == "call_function" and op_name(last) in _SIGMOID:
        before = last.args[0]
        assert isinstance(before, fx.Node)
        classes = output.meta["shape"][1]
        if before.meta["shape"][1:2] == (classes,) and all(size == 1 for size in before.meta["shape"][2:]):
            return before, op_name(last)
    return output, ""
