"""Where a network is cut whose outputs all lie behind something that no relevance comes back through.

A detector ends in operators that return as much as the image's values say, a segmenter in the number of the best class.
What these choose from is explained instead. The rule:

- The network is cut at operators whose results are as many as the values say (NonZero, NonMaxSuppression, a TopK whose
  k is computed, ...), at non-maximum suppression of any domain, at branches and loops whose course depends on pixel
  values, and where integers and truth values are made (ArgMax, comparisons) if nothing else comes out. It is not cut
  at an operator that is merely unknown: what that one reads, nobody asked for.
- The outputs become the floating-point values that those operators choose from: what they read themselves, or over
  comparisons and other integers, and what their results pick from. What merely meets their results later on (features
  that are pooled at the chosen boxes) is no output.
- What is chosen from part by part (class by class, level by level) is one output: the tensor that the parts are of.
- Scores come first, boxes last. A number for each of the boxes is no table of class scores.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import SymInt, Tensor

from fusion.outputs import Kind
from models.formats.onnx.registry import Node, find
from models.formats.onnx.single import OneImageOnly
from models.formats.onnx.values import Counted, DependsOnPixels
from models.formats.onnx.walk import Failure, Walk

_COUNTED = "how much it returns depends on pixel values"
_COURSE = "its course depends on pixel values"
_BOXES = "it chooses among boxes by a rule of its own"
_PLACES = "it picks by places that depend on pixel values"
_INTEGERS = "no relevance comes back through what it returns"

# Operators of other domains that choose among boxes, as runtimes call them.
_SUPPRESSION = re.compile(r"nms|non_?max|detection_?(output|post)", re.IGNORECASE)
_COURSES = {"If", "Loop", "Scan"}
# They pick from their first input.
_PICKING = {"Compress", "Gather", "GatherElements", "GatherND", "Slice", "TopK"}
# They only rearrange or pick what they read.
_MOVING = {
    "Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_ENTRY_BY_ENTRY = {
    "Add", "Clip", "Div", "Exp", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh",
}  # fmt: skip
# They keep what they read, moved, or the best of it.
_KEEPING = _MOVING | {"Add", "GatherElements", "ReduceMax", "Sub", "TopK"}


@dataclass(frozen=True)
class Cut:
    """The values that become a network's outputs, by the file's names; what some hold whose shapes do not tell; and a
    note of what is left off and why."""

    outputs: tuple[str, ...]
    kinds: Mapping[str, Kind]
    note: str


# How a value is read by what chooses from it: the operator, and which of its inputs the value is.
_Role = tuple[str, int]


@dataclass
class _Frontier:
    """The candidates and their roles, in the order in which they were met."""

    walk: Walk
    image: str
    own: Container[str]
    roles: dict[str, set[_Role]] = field(default_factory=dict)

    def add(self, name: str, role: _Role) -> None:
        """The floats that a value is, or is computed from over integers."""
        todo, seen = [name], set()
        while todo:
            value = todo.pop(0)
            if value in seen or value not in self.walk.values or value == self.image:
                continue
            seen.add(value)
            if value in self.walk.carrying and self.is_output(value):
                self.roles.setdefault(value, set()).add(role)
            else:
                todo += self.walk.maker[value].inputs

    def is_output(self, name: str) -> bool:
        """Whether a value can be an output: one of the file's own graph, of a fixed shape for each image."""
        if name not in self.own or name == self.image:
            return False
        value = self.walk.values[name]
        rest = value.shape[1:] if isinstance(value, Tensor) else ()
        return self.walk.singles.follows(name) and not any(isinstance(size, SymInt) for size in rest)

    def sources(self, name: str, known: Container[str] = ()) -> list[str]:
        """The nearest of the `known` values that one is made of entry by entry, or else the furthest values."""
        found: dict[str, None] = {}
        todo, seen = [name], set()
        while todo:
            value = todo.pop(0)
            maker = self.walk.maker.get(value)
            if value in known or maker is None or maker.domain or maker.op not in _MOVING | _ENTRY_BY_ENTRY:
                found[value] = None
            elif value not in seen:
                seen.add(value)
                todo += [read for read in maker.inputs if read in self.walk.carrying]
        return list(found)

    def ancestors(self, name: str) -> set[str]:
        """The values that one is made of entry by entry, at any distance."""
        found, todo = set(), [name]
        while todo:
            maker = self.walk.maker.get(todo.pop())
            if maker is not None and not maker.domain and maker.op in _MOVING | _ENTRY_BY_ENTRY:
                reads = [read for read in maker.inputs if read in self.walk.carrying and read not in found]
                found.update(reads)
                todo += reads
        return found

    def drop_derived(self) -> None:
        """Leave out what is only a part of other candidates, their best, or one of them moved by constants."""
        for name in list(self.roles):
            others = set(self.roles) - {name}
            if others and self._rests_on(name, others):
                del self.roles[name]

    def _rests_on(self, name: str, others: set[str]) -> bool:
        todo, seen = [name], set()
        while todo:
            value = todo.pop()
            if value in others or value in seen:
                continue
            seen.add(value)
            maker = self.walk.maker.get(value)
            if maker is None or maker.domain or maker.op not in _KEEPING:
                return False
            todo += [read for read in maker.inputs if read in self.walk.carrying]
        return True

    def merge_parts(self) -> None:
        """Put the tensors that several candidates of the same roles are parts of in their place."""
        groups: dict[tuple[frozenset[_Role], bool, tuple[str, ...]], list[str]] = {}
        for name, roles in self.roles.items():
            furthest = tuple(sorted(self.sources(name)))
            groups.setdefault((frozenset(roles), self._is_boxes(name), furthest), []).append(name)
        for (common, _, _), parts in groups.items():
            shared = set.intersection(*map(self.ancestors, parts))
            wholes = [self.sources(name, shared) for name in parts]
            whole = wholes[0]
            alike = all(set(each) == set(whole) for each in wholes)
            if alike and len(whole) < len(parts) and all(map(self.is_output, whole)):
                self._replace(parts, whole, common)

    def _replace(self, parts: Sequence[str], whole: Sequence[str], common: frozenset[_Role]) -> None:
        merged: dict[str, set[_Role]] = {}
        for name, roles in self.roles.items():
            for each in whole if name in parts else (name,):
                merged.setdefault(each, set()).update(common if name in parts else roles)
        self.roles = merged

    def turn_rows(self) -> None:
        """NonMaxSuppression wants [N, classes, boxes]; where a file has turned its rows for it, the rows are meant."""
        turned: dict[str, set[_Role]] = {}
        for name, roles in self.roles.items():
            maker = self.walk.maker[name]
            if (
                maker.op == "Transpose"
                and ("NonMaxSuppression", 1) in roles
                and self.is_output(maker.inputs[0])
            ):
                name = maker.inputs[0]
            turned[name] = roles | turned.get(name, set())
        self.roles = turned

    def ordered(self) -> tuple[str, ...]:
        return tuple(sorted(self.roles, key=self._is_boxes))

    def kinds(self) -> dict[str, Kind]:
        """Beside boxes, a table has a number for each of them, and none for classes."""
        if not any(map(self._is_boxes, self.roles)):
            return {}
        shapes = {name: self.walk.values[name].shape for name in self.roles}
        return {name: "vector" for name, shape in shapes.items() if all(size == 1 for size in shape[2:])}

    def _is_boxes(self, name: str) -> bool:
        by_role = any(position == 0 and _is_suppression(op) for op, position in self.roles[name])
        return by_role or self.walk.values[name].shape[-1] == 4


def find_cut(walk: Walk, outputs: Sequence[str], image: str, own: Container[str]) -> Cut | None:
    """Where to cut a network none of whose `outputs` can be explained, by a tolerant walk over it; None where it fails
    elsewhere. `own` are the values of the file's own graph, which its runtime can be asked for."""
    frontier = _Frontier(walk, image, own)
    ends: dict[str, list[Node]] = {}
    others: list[Failure] = []
    for failure in walk.failures:
        reason = _reason(failure, walk)
        if reason:
            ends.setdefault(reason, []).append(failure.node)
            _add(frontier, failure.node, failure.node.inputs, everything=True)
        else:
            others.append(failure)
    if not ends and any(find(failure.node) is None for failure in others):
        return None
    if not ends and others:
        ends = {_COUNTED: [node for node in walk.behind if _is_choosing(node)]}
    for node in walk.behind:
        _add(frontier, node, node.inputs)
    for node in _last_floats(walk, outputs):
        ends.setdefault(_INTEGERS, []).append(node)
        for position, name in enumerate(node.inputs):
            if name in walk.carrying:
                frontier.add(name, (node.op, position))
    if not frontier.roles or not any(ends.values()):
        return None
    frontier.drop_derived()
    frontier.merge_parts()
    frontier.turn_rows()
    names = frontier.ordered()
    return Cut(names, frontier.kinds(), _note(ends, others, names))


def _reason(failure: Failure, walk: Walk) -> str:
    """Why the network is cut at a node that cannot be read; empty where it is not."""
    node, error = failure.node, failure.error
    if isinstance(error, Counted | DependsOnPixels):
        return _COUNTED
    if node.op in _COURSES and find(node) is None:
        return _COURSE
    if _is_suppression(node.op) and find(node) is None:
        return _BOXES
    if isinstance(error, OneImageOnly) and node.op in _PICKING:
        return _PLACES if any(name in walk.values for name in node.inputs[1:]) else ""
    return ""


def _is_suppression(op: str) -> bool:
    return _SUPPRESSION.search(op) is not None


def _is_choosing(node: Node) -> bool:
    operator = find(node)
    return _is_suppression(node.op) or (operator is not None and operator.counting)


def _chosen_from(node: Node) -> range:
    """Which of its inputs a node chooses from."""
    if _is_choosing(node):
        return range(len(node.own_inputs))
    return range(1 if not node.domain and node.op in _PICKING else 0)


def _add(frontier: _Frontier, node: Node, inputs: Sequence[str], everything: bool = False) -> None:
    """What a node chooses from (or everything that it reads), and what those in the graphs inside it do; `inputs` are
    the names of its inputs in the file's own graph."""
    own = len(node.own_inputs)
    for position in range(own) if everything else _chosen_from(node):
        frontier.add(inputs[position], (node.op, position))
    outside = dict(zip(node.captures, inputs[own:], strict=True))
    for each in (inner for body in node.bodies for inner in body.nodes):
        _add(frontier, each, [outside.get(name, "") for name in each.inputs])


def _last_floats(walk: Walk, outputs: Sequence[str]) -> list[Node]:
    """The nodes that make integers of floats, of which the outputs are computed."""
    found: dict[str, Node] = {}
    todo, seen = list(outputs), set()
    while todo:
        name = todo.pop(0)
        if name in seen or name not in walk.maker or name not in walk.values or name in walk.carrying:
            continue
        seen.add(name)
        node = walk.maker[name]
        if walk.carrying.intersection(node.inputs):
            found[node.place] = node
        todo += node.inputs
    return list(found.values())


def _note(ends: Mapping[str, Sequence[Node]], others: Sequence[Failure], names: Sequence[str]) -> str:
    places = []
    for reason, nodes in ends.items():
        more = len(nodes) - 1
        rest = "" if not more else f" and {more} other operator{'s' if more > 1 else ''}"
        places.append(f"'{nodes[0].name or nodes[0].called}'{rest} is left off: {reason}")
    listed = ", ".join(f"'{name}'" for name in names[:-1])
    listed = f"{listed} and '{names[-1]}'" if listed else f"'{names[-1]}'"
    left = "" if not others else f"; what '{others[0].node.called}' computes is left out ({others[0].error})"
    verb = "are" if len(names) > 1 else "is"
    return f"everything behind {', behind '.join(places)}; explained {verb} {listed}{left}"


def picked_from(nodes: Iterable[Node]) -> list[str]:
    """The values that nodes choose from where the network may have to be cut at them."""
    names = (node.inputs[position] for node in nodes for position in _chosen_from(node))
    return list(dict.fromkeys(filter(None, names)))
