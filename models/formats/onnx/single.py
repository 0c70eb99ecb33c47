"""Files for one image that take its batch axis off (torchvision's detectors do): their operators on a whole batch.

What such a file holds as [A, K] is held as [N, A, K] here: it is *bare*, without its batch. Operators that read bare
values are written anew, so that they leave the first axis alone; those that take the axis off, or put it back, vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import SymInt, Tensor

from fusion.errors import BadFile
from models.formats.onnx.patterns import Known
from models.formats.onnx.registry import OWN, Node, find


class OneImageOnly(BadFile):
    """An operator that a file for one image applies in a way that cannot be done for each image of a batch."""


@dataclass
class Singles:
    """Which values are bare; `known` and `values` are those of the walk over the nodes, `free` is the batch size."""

    known: dict[str, Known]
    values: Mapping[str, Any]
    free: SymInt
    bare: set[str] = field(default_factory=set)

    def on_batch(self, node: Node) -> list[Node]:
        """The nodes in place of one of the file; notes which of their results are bare. Raises OneImageOnly."""
        if not self.bare.intersection(node.inputs):
            taking = None if node.domain else _TAKING_OFF.get(node.op)
            return [node] if taking is None or not self.follows(node.inputs[0]) else taking(self, node)
        operator = find(node)
        if operator is None or operator.counting:
            return [node]  # it cannot be run at all
        rule = _ON_BARE.get(node.op) if node.domain in ("", OWN) else None
        nodes = None if rule is None else rule(self, node)
        if nodes is None:
            raise OneImageOnly(
                f"Layer '{node.called}' ({node.title}) works on one image without its batch dimension. "
                "Export the network with a dynamic batch dimension."
            )
        return nodes

    def follows(self, name: str) -> bool:
        """Whether a value's first axis is the batch."""
        value = self.values.get(name)
        first = value.shape[0] if isinstance(value, Tensor) and value.ndim else None
        return isinstance(first, SymInt) and bool(first.node.expr == self.free.node.expr)

    def rank(self, name: str) -> int:
        """The number of dimensions that the file gives a value."""
        value = self.known[name].tensor if name in self.known else self.values[name]
        return len(value.shape) - (name in self.bare)

    def sizes(self, name: str) -> list[int] | None:
        """The sizes that the file gives a bare value; None where they follow the batch."""
        own = list(self.values[name].shape[1:])
        return own if all(isinstance(size, int) for size in own) else None

    def numbers(self, name: str) -> list[int] | None:
        """The entries of a constant."""
        return self.known[name].tensor.reshape(-1).tolist() if name in self.known else None

    def constant(self, node: Node, what: str, numbers: Sequence[int]) -> str:
        name = f"{node.place}/{what}"
        self.known[name] = Known(torch.tensor(list(numbers), dtype=torch.int64), name)
        return name

    def marked(self, *nodes: Node) -> list[Node]:
        """These nodes, the results of the last one bare."""
        self.bare.update(name for name in nodes[-1].outputs if name)
        return list(nodes)

    def widened(self, node: Node, name: str, rank: int) -> tuple[str, list[Node]]:
        """A bare value with axes of one entry behind the batch, up to `rank` dimensions, the batch included."""
        missing = rank - self.rank(name) - 1
        if missing <= 0:
            return name, []
        wide = f"{node.place}/{name}/wide"
        axes = self.constant(node, f"{name}/axes", range(1, 1 + missing))
        return wide, [_written(node, "Unsqueeze", (name, axes), (wide,))]


Rule = Callable[[Singles, Node], "list[Node] | None"]


def _written(
    node: Node, op: str, inputs: tuple[str, ...], outputs: tuple[str, ...] | None = None, **attributes: Any
) -> Node:
    """A node of the newest opset in place of this one."""
    return replace(
        node,
        op=op,
        domain="",
        opset=24,
        inputs=inputs,
        outputs=outputs or node.outputs,
        attributes=attributes,
    )


def _same(node: Node, **attributes: Any) -> Node:
    return replace(node, attributes={**node.attributes, **attributes})


def _behind(axis: int) -> int:
    """An axis of the file's value in what holds it here: one further from the front."""
    return axis + 1 if axis >= 0 else axis


def _axes(single: Singles, node: Node, place: int = 1) -> list[int] | None:
    """The axes that a node gives as an attribute or, at `place`, as an input; empty where it gives none."""
    if "axes" in node.attributes:
        return list(node.get("axes"))
    given = node.inputs[place] if len(node.inputs) > place else ""
    return single.numbers(given) if given else []


# What takes the batch axis off, or means it: each of these reads a value that has it.


def _identity(single: Singles, node: Node, bare: bool) -> list[Node]:
    identity = _written(node, "Identity", node.inputs[:1], node.outputs[:1])
    return single.marked(identity) if bare else [identity]


def _squeeze_off(single: Singles, node: Node) -> list[Node]:
    rank = single.rank(node.inputs[0])
    axes = [axis % rank for axis in _axes(single, node) or []]
    if 0 not in axes:
        return [node]
    rest = [axis for axis in axes if axis]
    if not rest:
        return _identity(single, node, bare=True)
    return single.marked(_written(node, "Squeeze", (node.inputs[0], single.constant(node, "axes", rest))))


def _gather_off(single: Singles, node: Node) -> list[Node]:
    data, index = node.inputs
    if node.get("axis", 0) % single.rank(data) or single.numbers(index) not in ([0], [-1]):
        return [node]
    return _identity(single, node, bare=single.rank(index) == 0)


def _split_off(single: Singles, node: Node) -> list[Node]:
    along = node.get("axis", 0) % single.rank(node.inputs[0])
    return [node] if along or len(node.outputs) != 1 else _identity(single, node, bare=False)


def _slice_off(single: Singles, node: Node) -> list[Node]:
    """The first of one image is all of them."""
    parts = _slice_parts(single, node)
    if parts is None:
        return [node]
    rank = single.rank(node.inputs[0])
    first = [p for p in parts if p[2] % rank == 0 and p[0] in (0, -1) and p[1] >= 1 and p[3] == 1]
    if not first:
        return [node]
    rest = [p for p in parts if p not in first]
    return [_sliced(single, node, rest)] if rest else _identity(single, node, bare=False)


def _gather_nd_off(single: Singles, node: Node) -> list[Node]:
    if node.get("batch_dims", 0):
        return [node]
    raise OneImageOnly(
        f"Layer '{node.called}' ({node.title}) picks by indices that count the images of a batch, and the file has "
        "those of one image only. Export the network with a dynamic batch dimension."
    )


_TAKING_OFF: dict[str, Callable[[Singles, Node], list[Node]]] = {
    "Squeeze": _squeeze_off,
    "Gather": _gather_off,
    "Split": _split_off,
    "Slice": _slice_off,
    "GatherND": _gather_nd_off,
}


# What reads bare values.


def _entry_by_entry(single: Singles, node: Node) -> list[Node] | None:
    """Operators on single entries, of which one input may be an image's and the others are settings."""
    others = [name for name in node.inputs[1:] if name]
    return single.marked(node) if all(name in single.known for name in others) else None


def _broadcast(single: Singles, node: Node) -> list[Node]:
    """Dimensions are aligned at the end, so those that lack some get them behind the batch."""
    follows = any(name not in single.bare and single.follows(name) for name in node.inputs if name)
    rank = max(
        single.rank(name) + (name in single.bare or not follows)
        for name in node.inputs
        if name and (name in single.known or isinstance(single.values[name], Tensor))
    )
    nodes: list[Node] = []
    inputs = []
    for name in node.inputs:
        made: list[Node] = []
        if name in single.bare:
            name, made = single.widened(node, name, rank)
        inputs.append(name)
        nodes += made
    nodes.append(replace(node, inputs=tuple(inputs)))
    return nodes if follows else single.marked(*nodes)


def _along(key: str, default: int) -> Rule:
    """Operators along one axis, which an attribute names; the other inputs are constants."""

    def rule(single: Singles, node: Node) -> list[Node] | None:
        if any(name and name not in single.known for name in node.inputs[1:]):
            return None
        return single.marked(_same(node, **{key: _behind(node.get(key, default))}))

    return rule


def _softmax(single: Singles, node: Node) -> list[Node] | None:
    default = 1 if node.opset < 13 else -1
    return single.marked(_same(node, axis=_behind(node.get("axis", default))))


def _shape(single: Singles, node: Node) -> list[Node]:
    end = node.get("end")
    given = {"start": _behind(node.get("start", 0))} | ({} if end is None else {"end": _behind(end)})
    return [_same(node, **given)]


def _reduce(single: Singles, node: Node) -> list[Node] | None:
    axes = _axes(single, node)
    if axes is None:
        return None
    if not axes and node.get("noop_with_empty_axes", 0):
        return single.marked(node)
    axes = axes or list(range(single.rank(node.inputs[0])))
    chosen = single.constant(node, "axes", map(_behind, axes))  # type: ignore[arg-type]
    return single.marked(_written(node, node.op, (node.inputs[0], chosen), keepdims=node.get("keepdims", 1)))


def _squeeze(single: Singles, node: Node) -> list[Node] | None:
    axes = _axes(single, node)
    if axes is None:
        return None
    if not axes:
        sizes = single.sizes(node.inputs[0])
        if sizes is None:
            return None
        axes = [i for i, size in enumerate(sizes) if size == 1]
    chosen = single.constant(node, "axes", [_behind(axis) for axis in axes])
    return single.marked(_written(node, "Squeeze", (node.inputs[0], chosen)))


def _unsqueeze(single: Singles, node: Node) -> list[Node] | None:
    """An axis of one in front of a single image is the batch."""
    axes = _axes(single, node)
    if axes is None:
        return None
    rank = single.rank(node.inputs[0]) + len(axes)
    axes = [axis % rank for axis in axes]
    if 0 not in axes:
        chosen = single.constant(node, "axes", [_behind(axis) for axis in axes])
        return single.marked(_written(node, "Unsqueeze", (node.inputs[0], chosen)))
    rest = [axis for axis in axes if axis]
    if not rest:
        return _identity(single, node, bare=False)
    return [_written(node, "Unsqueeze", (node.inputs[0], single.constant(node, "axes", rest)))]


def _concat(single: Singles, node: Node) -> list[Node] | None:
    """Constants beside bare values get an axis in front, along which they are repeated."""
    if any(name not in single.known and name not in single.bare for name in node.inputs):
        return None
    nodes, inputs = [], []
    for name in node.inputs:
        if name in single.known:
            wide = f"{node.place}/{name}/wide"
            nodes.append(_written(node, "Unsqueeze", (name, single.constant(node, "front", [0])), (wide,)))
            name = wide
        inputs.append(name)
    return single.marked(*nodes, _written(node, "Concat", tuple(inputs), axis=_behind(node.get("axis"))))


def _gather(single: Singles, node: Node) -> list[Node] | None:
    data, index = node.inputs
    axis = node.get("axis", 0) % single.rank(data)
    if index in single.known:
        return single.marked(_same(node, axis=axis + 1))
    if data in single.known:
        return single.marked(node) if axis == 0 else None
    if data not in single.bare or index not in single.bare or axis:
        return None
    wide = f"{node.place}/index"
    last = single.constant(node, "last", [-1])
    return single.marked(
        _written(node, "Unsqueeze", (index, last), (wide,)),
        _written(node, "GatherND", (data, wide), batch_dims=1),
    )


def _gather_nd(single: Singles, node: Node) -> list[Node] | None:
    data, index = node.inputs
    if index not in single.bare:
        return None
    if data in single.known:
        return None if node.get("batch_dims", 0) else single.marked(node)
    return (
        single.marked(_same(node, batch_dims=node.get("batch_dims", 0) + 1)) if data in single.bare else None
    )


def _gather_elements(single: Singles, node: Node) -> list[Node] | None:
    if not single.bare.issuperset(node.inputs):
        return None
    return single.marked(_same(node, axis=_behind(node.get("axis", 0))))


# start, end, axis, step
_Part = tuple[int, int, int, int]


def _slice_parts(single: Singles, node: Node) -> list[_Part] | None:
    if "starts" in node.attributes:
        starts, ends = list(node.get("starts")), list(node.get("ends"))
        return [
            (s, e, a, 1) for s, e, a in zip(starts, ends, node.get("axes") or range(len(starts)), strict=True)
        ]
    given = [single.numbers(name) if name else [] for name in (*node.inputs[1:], "", "")[:4]]
    if None in given:
        return None
    first, last, axes, steps = (g or [] for g in given)
    return list(zip(first, last, axes or range(len(first)), steps or [1] * len(first), strict=True))


def _sliced(single: Singles, node: Node, parts: Sequence[_Part]) -> Node:
    names = ("starts", "ends", "axes", "steps")
    columns = zip(names, zip(*parts, strict=True), strict=True)
    settings = (single.constant(node, name, column) for name, column in columns)
    return _written(node, "Slice", (node.inputs[0], *settings))


def _slice(single: Singles, node: Node) -> list[Node] | None:
    parts = _slice_parts(single, node)
    if parts is None:
        return None
    return single.marked(_sliced(single, node, [(s, e, _behind(a), t) for s, e, a, t in parts]))


def _transpose(single: Singles, node: Node) -> list[Node]:
    order = node.get("perm") or reversed(range(single.rank(node.inputs[0])))
    return single.marked(_same(node, perm=[0, *(axis + 1 for axis in order)]))


def _reshape(single: Singles, node: Node) -> list[Node] | None:
    target = single.numbers(node.inputs[1])
    if target is None or node.get("allowzero", 0):
        return None
    return _reshaped(single, node, target)


def _reshaped(single: Singles, node: Node, target: Sequence[int]) -> list[Node]:
    """The first 0 keeps the batch; others keep sizes one place further on, as the target is one place further on."""
    sizes = single.constant(node, "sizes", [0, *target])
    return single.marked(_written(node, "Reshape", (node.inputs[0], sizes)))


def _flatten(single: Singles, node: Node) -> list[Node] | None:
    sizes, axis = single.sizes(node.inputs[0]), node.get("axis", 1)
    if sizes is None:
        return None
    return _reshaped(single, node, [math.prod(sizes[:axis]), -1])


def _expand(single: Singles, node: Node) -> list[Node] | None:
    target = single.numbers(node.inputs[1])
    if target is None:
        return None
    name, nodes = single.widened(node, node.inputs[0], len(target) + 1)
    missing = max(single.rank(node.inputs[0]) - len(target), 0)
    sizes = single.constant(node, "sizes", [1] * (1 + missing) + target)
    return single.marked(*nodes, _written(node, "Expand", (name, sizes)))


def _tile(single: Singles, node: Node) -> list[Node] | None:
    times = single.numbers(node.inputs[1])
    if times is None:
        return None
    return single.marked(
        _written(node, "Tile", (node.inputs[0], single.constant(node, "times", [1, *times])))
    )


def _pad(single: Singles, node: Node) -> list[Node] | None:
    rank = single.rank(node.inputs[0])
    pads = list(node.get("pads")) if "pads" in node.attributes else single.numbers(node.inputs[1])
    axes = _axes(single, node, place=3)
    if pads is None or axes is None:
        return None
    chosen = [axis % rank for axis in axes] or list(range(rank))
    begin, end = [0] * (rank + 1), [0] * (rank + 1)
    for i, axis in enumerate(chosen):
        begin[axis + 1], end[axis + 1] = pads[i], pads[i + len(chosen)]
    value = node.inputs[2:3] if "pads" not in node.attributes else ()
    if "pads" in node.attributes:
        return single.marked(_same(node, pads=begin + end))
    amounts = single.constant(node, "pads", begin + end)
    return single.marked(
        _written(node, "Pad", (node.inputs[0], amounts, *value), mode=node.get("mode", "constant"))
    )


def _top_k(single: Singles, node: Node) -> list[Node]:
    return single.marked(_same(node, axis=_behind(node.get("axis", -1))))


def _matmul(single: Singles, node: Node) -> list[Node] | None:
    a, b = node.inputs
    ranks = single.rank(a), single.rank(b)
    if b in single.known:
        return single.marked(node) if ranks[1] == 2 else None
    if a in single.known:
        return single.marked(node) if ranks == (2, 2) else None
    both = single.bare.issuperset(node.inputs) and ranks[0] == ranks[1] and ranks[0] >= 2
    return single.marked(node) if both else None


_ENTRY_BY_ENTRY = (
    "Abs Cast Ceil Celu Clip Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log "
    "Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Silu Softplus Softsign Sqrt Swish Tanh ThresholdedRelu Linear"
).split()
_BROADCASTING = (
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or Pow Sub Sum Where Xor"
).split()
_REDUCING = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
).split()

_ON_BARE: dict[str, Rule] = (
    dict.fromkeys(_ENTRY_BY_ENTRY, _entry_by_entry)
    | dict.fromkeys(_BROADCASTING, _broadcast)
    | dict.fromkeys(_REDUCING, _reduce)
    | dict.fromkeys(("Softmax", "LogSoftmax"), _softmax)
    | dict.fromkeys(("ArgMax", "ArgMin", "Split"), _along("axis", 0))
    | {
        "Concat": _concat,
        "Expand": _expand,
        "Flatten": _flatten,
        "Gather": _gather,
        "GatherElements": _gather_elements,
        "GatherND": _gather_nd,
        "MatMul": _matmul,
        "Pad": _pad,
        "Reshape": _reshape,
        "Shape": _shape,
        "Slice": _slice,
        "Squeeze": _squeeze,
        "Tile": _tile,
        "TopK": _top_k,
        "Transpose": _transpose,
        "Unsqueeze": _unsqueeze,
    }
)
