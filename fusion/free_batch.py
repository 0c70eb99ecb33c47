"""Graphs that were traced for one batch size, made to run with any.

Tracing with a fixed size leaves it in three kinds of places: in the target shapes of reshapes and expansions, in
constants that hold something once per sample (a class token, a position bias), and in tensors made by size. Each is
found where the graph, run on tensors without storage, stops to fit.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from fusion.network import Network, call, op_name, prune
from fusion.outputs import tensors_in
from fusion.targets import expanded, reshaped
from fusion.tracing import TRACING

aten = torch.ops.aten

# Two sizes that no axis has by chance: sizes that are a multiple of them in both runs follow the batch.
_TRIED = (1009, 1013)
_MOST_TRIES = 100  # of other constants for one node
_MOST_CHANGES = 200  # of other places for the batch
_ROUNDING = 0.02  # of an output's scale; images that are mixed up differ by about all of it
_MADE_BY_SIZE: Mapping[str, Callable[..., Tensor]] = {
    "new_zeros": torch.zeros,
    "new_ones": torch.ones,
    "new_full": torch.full,
}

Runs = tuple[Any, Any]


def free_batch(network: Network, declared: int) -> bool:
    """Rewrite a normalized graph that was traced for `declared` samples, in place. For so many it computes what it did;
    what cannot be freed is left as it is, and fails where the graph is run with another batch.

    Returns whether the batch could stand in several places, so that one had to be chosen: see `keeps_apart`.
    """
    # The dispatcher runs layers such as an LSTM in parts, which refuse sizes that do not fit: their kernels do not.
    with TRACING, torch.no_grad(), enable_python_dispatcher():
        walk = _Walk(network, declared)
        walk.run()
    prune(network)
    network.graph.lint()
    return any(count > 1 for count in walk.choices.values())


def keeps_apart(network: Network) -> bool:
    """Whether an annotated network answers for two images what it answers for each: of several places for the batch
    that fit, only this tells the right one. Runs on noise."""
    image = network.input_nodes[0].meta
    noise = torch.randn(2, *image["shape"][1:], generator=torch.Generator().manual_seed(0))
    pixels = noise if image["dtype"].is_floating_point else noise.mul(64).add(128).clamp(0, 255)
    x = pixels.to(network.device, image["dtype"])
    freed = network.copy()  # a graph belongs to the module that runs it, and this one goes on changing
    both, *each = (tensors_in(freed(part)) for part in (x, x[:1], x[1:]))
    follow = [node.meta["shape"][:1] == (None,) for node in network.output_values]
    pairs = (
        (got, torch.cat(alone)) for got, *alone, counts in zip(both, *each, follow, strict=True) if counts
    )
    return all(_same(want, got) for got, want in pairs)


def _same(want: Tensor, got: Tensor) -> bool:
    """Up to rounding, of which half precision has much."""
    want, got = want.double(), got.double()
    scale = want[want.isfinite()].abs().max() if want.isfinite().any() else 0.0
    return torch.allclose(got, want, rtol=0.0, atol=_ROUNDING * float(scale), equal_nan=True)


@dataclass
class _Walk:
    network: Network
    declared: int
    # None: it does not run with these sizes, or nothing before it does
    values: dict[fx.Node, Runs | None] = field(default_factory=dict)
    # Which of several places for the batch a target takes, and how many there are: the first fits mostly.
    chosen: dict[fx.Node, int] = field(default_factory=dict)
    choices: dict[fx.Node, int] = field(default_factory=dict)

    def run(self) -> None:
        """Node by node; where one does not fit, with another choice for the last target that leaves one."""
        nodes = list(self.network.graph.nodes)
        written = [(node.args, node.kwargs) for node in nodes]

        def restored(start: int) -> int:
            for node, (args, kwargs) in zip(nodes[start:], written[start:], strict=True):
                node.args, node.kwargs = args, kwargs
                self.choices.pop(node, None)
            return start

        position, changes = 0, 0
        while position < len(nodes):
            fits = self._step(nodes[position])
            position += 1
            if fits or changes > _MOST_CHANGES:
                continue
            changes += 1
            last = next((i for i in range(position - 1, -1, -1) if self._has_another(nodes[i])), None)
            if last is None:  # nothing helps: as it is most likely, up to where it fails
                self.chosen.clear()
                position, changes = restored(0), _MOST_CHANGES + 1
            else:
                position = restored(last)
                self.chosen[nodes[last]] = self.chosen.get(nodes[last], 0) + 1
                for node in nodes[last + 1 :]:
                    self.chosen.pop(node, None)

    def _has_another(self, node: fx.Node) -> bool:
        return self.chosen.get(node, 0) + 1 < self.choices.get(node, 1)

    def _step(self, node: fx.Node) -> bool:
        """Work out a node's value; False where it is the first on its way that has none."""
        if node.op == "placeholder":
            self.values[node] = self._made(node)
        elif node.op == "get_attr":
            self.values[node] = self._constant(node)
        elif node.op == "call_function":
            return self._free(node, self.network.input_nodes[0])
        return True

    def _made(self, node: fx.Node) -> Runs:
        shapes = [[n if size is None else size for size in node.meta["shape"]] for n in _TRIED]
        first, second = (torch.empty(shape, dtype=node.meta["dtype"], device="meta") for shape in shapes)
        return first, second

    def _constant(self, node: fx.Node) -> Runs:
        tensor = self.network.constants[str(node.target)].to("meta")
        return tensor, tensor

    def _free(self, node: fx.Node, image: fx.Node) -> bool:
        if any(self.values.get(source) is None for source in node.all_input_nodes):
            self.values[node] = None
            return True
        self._follow(node, image)
        self._made_by_size(node)
        self.values[node] = self._called(node)
        if self.values[node] is None:
            self._repair(node, image)
        return self.values[node] is not None

    def _called(self, node: fx.Node, other: Mapping[fx.Node, Runs] | None = None) -> Runs | None:
        """What the node returns at both sizes, `other` in the place of some of its inputs; None where it does not run,
        or follows the batch in no sound way."""
        runs = {n: self.values[n] or () for n in node.all_input_nodes} | dict(other or {})
        given = [{n: values[i] for n, values in runs.items()} for i in (0, 1)]
        try:
            first, second = (call(node, values) for values in given)
        except Exception:  # operators raise anything where shapes do not fit
            return None
        tensors = tensors_in(first), tensors_in(second)
        if len(tensors[0]) != len(tensors[1]):  # one for each image
            return None
        fits = all(_coefficients(*pair) is not None for pair in zip(*tensors, strict=True))
        return (first, second) if fits else None

    def _follow(self, node: fx.Node, image: fx.Node) -> None:
        """Let a constant target shape follow the batch."""
        if op_name(node) not in ("reshape", "expand") or not all(isinstance(n, int) for n in node.args[1]):  # type: ignore[union-attr]
            return
        found = self._sizes(node.args[0])
        if found is None:
            return
        sizes, axis = found
        wanted: list[int] = list(node.args[1])  # type: ignore[arg-type]
        if op_name(node) == "expand":
            place = expanded(wanted, sizes, axis, self.declared)
            targets = None if place is None else (wanted, [place])
        else:
            targets = reshaped(wanted, sizes, axis, self.declared)
        if targets is not None:
            full, places = targets
            self.choices[node] = len(places)
            place = places[self.chosen.get(node, 0)]
            target: list[Any] = [*full]
            target[place] = self._times(full[place] // self.declared, node, image)
            node.update_arg(1, target)

    def _sizes(self, value: Any) -> tuple[list[int], int] | None:
        """A tensor's sizes for one sample, and the axis of the batch; None for what has none."""
        runs = self.values.get(value) if isinstance(value, fx.Node) else None
        if runs is None or not isinstance(runs[0], Tensor):
            return None
        found = _coefficients(*runs)
        return None if found is None or found[1] is None else (found[0], found[1])

    def _times(self, size: int, before: fx.Node, image: fx.Node) -> fx.Node:
        """The batch size times a number, computed before a node."""
        with self.network.graph.inserting_before(before):
            count = self._size_node(aten.sym_size.int, (image, 0))
            return count if size == 1 else self._size_node(operator.mul, (count, size))

    def _size_node(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        node = self.network.graph.call_function(target, args)
        node.meta = {"layer": ""}
        self.values[node] = self._called(node)
        return node

    def _made_by_size(self, node: fx.Node) -> None:
        """A tensor of one number, made by size, as the constant that it is: it is repaired as other constants are."""
        maker = _MADE_BY_SIZE.get(op_name(node))
        shape = node.args[1] if maker is not None else ()
        if maker is None or not all(isinstance(n, int) for n in shape):  # type: ignore[union-attr]
            return
        like = self.values[node.args[0]][0]  # type: ignore[index]
        dtype = node.kwargs.get("dtype") or like.dtype
        made = maker(list(shape), *node.args[2:], dtype=dtype)  # type: ignore[arg-type]
        constant = self.network.add_constant(node.name, made, before=node)
        constant.meta["layer"] = node.meta.get("layer", "")
        self.values[constant] = self._constant(constant)
        node.replace_all_uses_with(constant)

    def _repair(self, node: fx.Node, image: fx.Node) -> None:
        """Give the node its constants once per sample, whatever their number, so that it fits."""
        for periods in itertools.islice(self._tries(node), _MOST_TRIES):
            for narrow in (True, False) if _broadcasts(node) else (False,):
                other = {n: self._runs(n, axis, narrow) for n, axis in periods.items()}
                if self._called(node, other) is None:
                    continue
                for constant, axis in periods.items():
                    node.replace_input_with(constant, self._once(constant, axis, narrow, node, image))
                self.values[node] = self._called(node)
                return

    def _tries(self, node: fx.Node) -> Iterator[dict[fx.Node, int]]:
        """Constants of a node with the axis along which each could repeat: few at a time first, those of one shape (as
        the two states of a recurrent layer) always together."""
        alike: dict[torch.Size, list[fx.Node]] = {}
        for n in node.all_input_nodes:
            if n.op == "get_attr":
                alike.setdefault(self.network.constants[str(n.target)].shape, []).append(n)
        groups = [(group, axes) for group in alike.values() if (axes := self._axes(group))]
        for count in range(1, len(groups) + 1):
            for chosen in itertools.combinations(groups, count):
                for along in itertools.product(*(axes for _, axes in chosen)):
                    yield {n: axis for (group, _), axis in zip(chosen, along, strict=True) for n in group}

    def _axes(self, constants: Sequence[fx.Node]) -> list[int]:
        """The axes along which all of these repeat themselves as often as there are samples."""
        tensors = [self.network.constants[str(n.target)] for n in constants]
        return [axis for axis in range(tensors[0].ndim) if all(self._repeats(t, axis) for t in tensors)]

    def _repeats(self, tensor: Tensor, axis: int) -> bool:
        size = tensor.shape[axis]
        if not size or size % self.declared:
            return False
        times = [self.declared if i == axis else 1 for i in range(tensor.ndim)]
        return self.declared == 1 or torch.equal(self._part(tensor, axis).repeat(times), tensor)

    def _part(self, tensor: Tensor, axis: int) -> Tensor:
        """One sample's part of a constant."""
        return tensor.narrow(axis, 0, tensor.shape[axis] // self.declared)

    def _runs(self, constant: fx.Node, axis: int, narrow: bool) -> Runs:
        """What a constant would be at both sizes."""
        part = self._part(self.network.constants[str(constant.target)].to("meta"), axis)
        if narrow:
            return part, part
        first, second = (part.repeat([n if i == axis else 1 for i in range(part.ndim)]) for n in _TRIED)
        return first, second

    def _once(self, constant: fx.Node, axis: int, narrow: bool, before: fx.Node, image: fx.Node) -> fx.Node:
        """One sample's part of a constant, left to broadcasting (narrow), or as often as there are samples."""
        part = self._part(self.network.constants[str(constant.target)], axis).contiguous()
        once = self.network.add_constant(f"{constant.target}_once", part, before=before)
        once.meta["layer"] = constant.meta.get("layer", "")
        self.values[once] = self._constant(once)
        return once if narrow else self._repeated(once, axis, before, image)

    def _repeated(self, once: fx.Node, axis: int, before: fx.Node, image: fx.Node) -> fx.Node:
        count = self._times(1, before, image)
        shape = self.network.constants[str(once.target)].shape
        with self.network.graph.inserting_before(before):
            if shape[axis] == 1:
                target, sizes = aten.expand.default, [count if i == axis else n for i, n in enumerate(shape)]
            else:
                target, sizes = aten.repeat.default, [count if i == axis else 1 for i in range(len(shape))]
            node = self.network.graph.call_function(target, (once, sizes))
        node.meta = {"layer": once.meta["layer"]}
        self.values[node] = self._called(node)
        return node


def _broadcasts(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _coefficients(first: Tensor, second: Tensor) -> tuple[list[int], int | None] | None:
    """The sizes for one sample, and the one axis that the batch multiplies (None: there is no such axis); None where
    the sizes follow it in another way."""
    sizes: list[int] = []
    axes: list[int] = []
    for i, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)):
        if a == b:
            sizes.append(a)
            continue
        if a % _TRIED[0] or a // _TRIED[0] * _TRIED[1] != b:
            return None
        sizes.append(a // _TRIED[0])
        axes.append(i)
    return (sizes, axes[0] if axes else None) if len(axes) <= 1 else None
