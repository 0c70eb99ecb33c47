"""Where in the image the values inside a network stand, as its graph tells it: tokens and windows as grids.

The graph is run once on regions instead of numbers. The region of a value is the part of the image that it stands for:
what only moves values (reshapes, windows, a shift) moves their regions, a layer over channels keeps them, a strided
layer joins those that it steps over, and attention leaves every token where its query stood. What stands for no part of
the image, such as a class token, has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fusion.network import Network, is_size_arithmetic, op_name, value_dependent
from fusion.normalize import argument
from fusion.registry import Registry
from lrp.surrogate import sample_places


@dataclass(frozen=True, eq=False)
class Grid:
    """The places of a layer as rows and columns of the image.

    cells: row * columns + column for the values of one sample, in a shape that broadcasts to theirs; -1 for what stands
    outside, as a class token does.
    """

    rows: int
    columns: int
    cells: Tensor

    def sums(self, values: Tensor, leading: int = 1) -> tuple[Tensor, Tensor]:
        """The sums of the values in every cell and outside: [N, ...] -> [N, rows, columns] and [N], with as many
        leading axes as there are in front of a sample's values."""
        front, cells = values.shape[:leading], self.cells.to(values.device).expand(values.shape[leading:])
        size = self.rows * self.columns
        flat = values.reshape(math.prod(front), -1).double()
        total = flat.new_zeros(len(flat), size + 1).index_add_(1, (cells % (size + 1)).flatten(), flat)
        total = total.to(values.dtype)
        return total[:, :size].reshape(*front, self.rows, self.columns), total[:, size].reshape(front)


class Grids:
    """The grids of a network's layers, worked out when the first one is asked for."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._found: dict[str, Grid | None] = {}

    @cached_property
    def _regions(self) -> tuple[_Regions, dict[str, Tensor]] | None:
        shape = self._network.inputs[0].shape
        if len(shape) != 4 or shape[2] is None or shape[3] is None:
            return None
        tracer = _Tracer(self._network, (shape[2], shape[3]))
        return tracer.regions, {n.name: tracer.of_a_sample(n, distinct(t)) for n, t in tracer.run()}

    def of(self, node: str) -> Grid | None:
        """The grid of a node by its name; None where its places are none, or one alone."""
        if self._regions is None:
            return None
        regions, found = self._regions
        if node in found and node not in self._found:
            self._found[node] = regions.grid(found[node])
        return self._found.get(node)


@dataclass(frozen=True)
class Window:
    """How a layer goes along an axis: how many steps, how wide it sees (dilated), how far it goes at once, and how much
    is padded in front."""

    steps: int
    extent: int
    stride: int
    padding: int


class _Regions:
    """Parts of an image [height, width] as numbers: four bounds in pixels, written as one number (exact in float64, and
    every operator that moves values takes it); 0 is no part."""

    def __init__(self, height: int, width: int) -> None:
        self.base = max(height, width) + 1
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        self.pixels = self.write(torch.stack([row, row + 1, column, column + 1]))
        self.everything = float(self.write(torch.tensor([0, height, 0, width])))

    def write(self, bounds: Tensor) -> Tensor:
        """Bounds [4, ...] (top, bottom, left, right) as numbers."""
        top, bottom, left, right = bounds.to(torch.int64)
        code = ((top * self.base + bottom) * self.base + left) * self.base + right
        return torch.where(bottom > top, code, 0).to(torch.float64)

    def read(self, regions: Tensor) -> Tensor:
        """The bounds [4, ...]; turned around where there is no part, so that joining ignores it."""
        left_over, bounds = regions.to(torch.int64), []
        for _ in range(4):
            bounds.append(left_over % self.base)
            left_over = left_over // self.base
        right, left, bottom, top = bounds
        none = regions == 0
        return torch.stack(
            [top.masked_fill(none, self.base), bottom.masked_fill(none, -1),
             left.masked_fill(none, self.base), right.masked_fill(none, -1)]
        )  # fmt: skip

    def joined(self, regions: Tensor, axes: Iterable[int]) -> Tensor:
        """The smallest parts that hold those along the axes, which stay with size 1."""
        regions = distinct(regions)
        wide = [axis % regions.ndim + 1 for axis in axes if regions.shape[axis] > 1]
        if not wide:
            return regions
        top, bottom, left, right = self.read(regions)
        axes = [axis - 1 for axis in wide]
        bounds = (
            top.amin(axes, True),
            bottom.amax(axes, True),
            left.amin(axes, True),
            right.amax(axes, True),
        )
        return self.write(torch.stack(bounds))

    def met(self, a: Tensor, b: Tensor, left_first: bool = False) -> Tensor:
        """Where two values meet: in the smaller part, since the larger one is what surrounds it; in both where they are
        equally large and not the same, with left_first in a's."""
        a, b = torch.broadcast_tensors(distinct(a), distinct(b))  # type: ignore[no-untyped-call]
        if torch.equal(a, b):
            return a
        one, other = self.read(a), self.read(b)
        low, high = torch.minimum(one, other), torch.maximum(one, other)
        both = a if left_first else self.write(torch.stack([low[0], high[1], low[2], high[3]]))
        difference = _area(one) - _area(other)
        met = torch.where(difference < 0, a, torch.where(difference > 0, b, both))
        return torch.where(a == 0, a if left_first else b, torch.where(b == 0, a, met))

    def stepped(self, regions: Tensor, sizes: Sequence[int]) -> Tensor:
        """The last axes in other sizes: every step joins what it goes over, as an adaptive pool does."""
        regions = distinct(regions)
        for axis, size in zip(range(-len(sizes), 0), sizes, strict=True):
            if regions.shape[axis] in (1, size):
                continue
            top, bottom, left, right = self.read(regions.movedim(axis, -1)).double()
            flat = torch.stack([-top, bottom, -left, right])
            pooled = torch.nn.functional.adaptive_max_pool1d(flat.flatten(0, -2)[None], size)[0]
            top, bottom, left, right = pooled.reshape(*flat.shape[:-1], size)
            regions = self.write(torch.stack([-top, bottom, -left, right])).movedim(-1, axis)
        return regions

    def centred(self, regions: Tensor, axis: int, window: Window) -> Tensor:
        """The axis as a window goes along it: at every step, the part under as many values as a step has, around the
        window's middle. What a window sees beyond that overlaps its neighbours."""
        count, stride = regions.shape[axis], window.stride
        middles = torch.arange(window.steps) * stride - window.padding + (window.extent - 1) / 2
        first = (middles - (stride - 1) / 2).ceil().long()
        seen = first[:, None] + torch.arange(stride)
        values = regions.movedim(axis, -1)[..., seen.clamp(0, count - 1)]
        values = torch.where((seen >= 0) & (seen < count), values, 0)
        return self.joined(values, [-1]).expand(*values.shape[:-1], 1)[..., 0].movedim(-1, axis)

    def grid(self, regions: Tensor) -> Grid | None:
        """Regions as the cells of a grid that has every cell, None where they are none. What spans all of the others
        stands outside."""
        top, bottom, left, right = self.read(regions)
        everything = self.write(torch.stack([top.min(), bottom.max(), left.min(), right.max()]))
        inside = (regions != 0) & (regions != everything)
        if not bool(inside.any()):
            return None
        return _by_middles(top + bottom, left + right, inside) or self._by_axes(regions, inside)

    def _by_axes(self, regions: Tensor, inside: Tensor) -> Grid | None:
        """Rows and columns by the axes that go down and to the right, where there are two: for maps whose channels
        stand a little apart."""
        downwards, rightwards = (self._rising(regions, side) for side in (0, 2))
        if downwards is None or rightwards is None or downwards == rightwards:
            return None
        rows, columns = regions.shape[downwards], regions.shape[rightwards]
        row, column = (
            torch.arange(regions.shape[a]).reshape([-1 if i == a else 1 for i in range(regions.ndim)])
            for a in (downwards, rightwards)
        )
        return Grid(rows, columns, (row * columns + column).where(inside, -1))

    def _rising(self, regions: Tensor, side: int) -> int | None:
        """The only axis along which the middles (from top to bottom, side 0, or from left to right, 2) rise."""
        rising = []
        for axis in range(regions.ndim):
            bounds = self.read(self.joined(regions, [a for a in range(regions.ndim) if a != axis]).flatten())
            middles = bounds[side] + bounds[side + 1]
            if len(middles) > 1 and bool((middles.diff() > 0).all()) and bool((bounds[3] >= 0).all()):
                rising.append(axis)
        return rising[0] if len(rising) == 1 else None


def _by_middles(vertical: Tensor, horizontal: Tensor, inside: Tensor) -> Grid | None:
    """Rows and columns by where the middles are, where every row has every column."""
    rows, row = _ranked(vertical, inside)
    columns, column = _ranked(horizontal, inside)
    cells = (row * columns + column).where(inside, -1)
    whole = len(torch.unique(cells[inside])) == rows * columns
    return Grid(rows, columns, cells) if whole else None


def _ranked(values: Tensor, inside: Tensor) -> tuple[int, Tensor]:
    """How many different values there are inside, and every value's place among them."""
    found, place = torch.unique(values.where(inside, -1), return_inverse=True)
    outer = int(not bool(inside.all()))  # -1 comes first
    return len(found) - outer, place - outer


def _area(bounds: Tensor) -> Tensor:
    return (bounds[1] - bounds[0]) * (bounds[3] - bounds[2])


def distinct(regions: Tensor) -> Tensor:
    """The same with every axis along which nothing changes in size 1."""
    for axis in range(regions.ndim):
        first, last = regions.narrow(axis, 0, 1), regions.narrow(axis, -1, 1)
        same = regions.stride(axis) == 0 or (
            torch.equal(first, last) and torch.equal(regions, first.expand_as(regions))
        )
        if regions.shape[axis] > 1 and same:
            regions = first
    return regions


# --- the operators --------------------------------------------------------------------------------------------------
class _Tracer:
    """A run of a network on regions, for one sample. `values` has the regions of what depends on the image, and what
    the rest is (sizes, indices, constants)."""

    def __init__(self, network: Network, size: tuple[int, int]) -> None:
        self.network = network
        self.regions = _Regions(*size)
        self.places = sample_places(network)
        self.dependent = value_dependent(network)
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> Iterable[tuple[fx.Node, Tensor]]:
        """Every tensor of the graph that depends on the image, with its regions."""
        readers = {node: len(node.users) for node in self.network.graph.nodes}
        for node in self.network.graph.nodes:
            if node.op == "output":
                return
            self.values[node] = self._value(node)
            if node in self.dependent and isinstance(self.values[node], Tensor) and node in self.places:
                yield node, self.values[node]
            for source in node.all_input_nodes:
                readers[source] -= 1
                if not readers[source]:
                    del self.values[source]

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.regions.pixels.expand(self.size(node))
        if node.op == "get_attr":
            return self.network.constants[str(node.target)]
        if is_size_arithmetic(node) or node not in self.dependent:
            return self._called(node, lambda n: self.values[n])
        rule = _rule.get(op_name(node)) or _elsewhere
        if any(self.values[n] is None for n in self.sources(node)):
            rule = _everywhere
        found = rule(self, node)
        return found.expand(self.size(node)) if isinstance(found, Tensor) else found

    def _called(self, node: fx.Node, lookup: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def moved(self, node: fx.Node) -> Any:
        """The operator itself on regions; constants among its values stand nowhere, indices are what they are."""

        def lookup(source: fx.Node) -> Any:
            value = self.values[source]
            constant = source not in self.dependent and isinstance(value, Tensor)
            return torch.zeros(value.shape).double() if constant and value.is_floating_point() else value

        return self._called(node, lookup)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that depend on the image."""
        return [n for n in node.all_input_nodes if n in self.dependent and not is_size_arithmetic(n)]

    def size(self, node: fx.Node) -> tuple[int, ...]:
        """The shape for one sample."""
        axis = self.places[node][0] if node in self.places else -1
        return tuple(s // 2 if i == axis else s for i, s in enumerate(node.meta["example"]))

    def of_a_sample(self, node: fx.Node, regions: Tensor) -> Tensor:
        """Without the samples' axis; with its parts (windows) in front where a sample has several, as `samples_first`
        has them."""
        axis = self.places[node][0]
        moved = regions.movedim(axis, 0)
        return moved[0] if self.size(node)[axis] == 1 else moved


_Rule = Callable[[_Tracer, fx.Node], Any]
_rule: Registry[_Rule] = Registry()


@_rule(
    "reshape", "flatten", "unflatten", "view", "permute", "transpose", "t", "movedim", "swapaxes", "swapdims",
    "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "slice",
    "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "getitem", "cat", "concat",
    "stack", "flip", "roll", "index_select", "index", "gather", "diagonal", "pixel_shuffle", "pixel_unshuffle",
    "unfold", "im2col", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
)  # fmt: skip
def _moving(tracer: _Tracer, node: fx.Node) -> Any:
    chosen_by_values = any(
        n.meta.get("dtype") is not None and not n.meta["dtype"].is_floating_point
        for n in tracer.sources(node)
    )
    return _everywhere(tracer, node) if chosen_by_values else tracer.moved(node)


@_rule("constant_pad_nd", "pad")
def _padded(tracer: _Tracer, node: fx.Node) -> Any:
    if op_name(node) == "pad" and argument(node, "mode") != "constant":
        return tracer.moved(node)
    return torch.nn.functional.pad(tracer.values[node.args[0]], list(node.args[1]))  # type: ignore[index,arg-type]


@_rule("to", "_to_copy", "type_as", "masked_fill")
def _first(tracer: _Tracer, node: fx.Node) -> Any:
    return tracer.values[tracer.sources(node)[0]]


@_rule("linear", "scaled_dot_product_attention")
def _over_channels(tracer: _Tracer, node: fx.Node) -> Any:
    """Where the first argument stands: attention leaves every token where its query stood."""
    x = node.args[0]
    if x not in tracer.dependent:
        return _everywhere(tracer, node)
    return tracer.regions.joined(tracer.values[x], [-1])  # type: ignore[index]


@_rule("conv1d", "conv2d", "conv3d")
def _convolution(tracer: _Tracer, node: fx.Node) -> Any:
    x = tracer.regions.joined(tracer.values[node.args[0]], [1])  # type: ignore[index]
    kernel = list(argument(node, "weight").meta["shape"][2:])
    stride, padding, dilation = (
        _each(argument(node, n), len(kernel)) for n in ("stride", "padding", "dilation")
    )
    return _stepping(tracer, node, x, kernel, stride, padding, dilation)


@_rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(tracer: _Tracer, node: fx.Node) -> Any:
    x = tracer.values[node.args[0]]  # type: ignore[index]
    rank = len(node.meta["example"]) - 2
    kernel = _each(argument(node, "kernel_size"), rank)
    stride = _each(argument(node, "stride") or kernel, rank)
    padding, dilation = _each(argument(node, "padding"), rank), _each(argument(node, "dilation", 1), rank)
    return _stepping(tracer, node, x, kernel, stride, padding, dilation)


def _stepping(
    tracer: _Tracer,
    node: fx.Node,
    regions: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[Any],
    dilation: Sequence[int],
) -> Tensor:
    for i, steps in enumerate(tracer.size(node)[2:]):
        extent = dilation[i] * (kernel[i] - 1) + 1
        front = {"same": (extent - 1) // 2, "valid": 0}.get(padding[i], padding[i])
        regions = tracer.regions.centred(regions, i + 2, Window(steps, extent, stride[i], front))
    return regions


def _each(value: Any, rank: int) -> list[Any]:
    """One value for every axis."""
    values = [value] if isinstance(value, int | str) else list(value)
    return values * rank if len(values) == 1 else values


@_rule(
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
)  # fmt: skip
def _resized(tracer: _Tracer, node: fx.Node) -> Any:
    x = tracer.values[node.args[0]]  # type: ignore[index]
    channels = [1] if op_name(node).startswith("conv") else []
    return tracer.regions.stepped(tracer.regions.joined(x, channels), tracer.size(node)[2:])


@_rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp")
def _reduced(tracer: _Tracer, node: fx.Node) -> Any:
    x = tracer.values[node.args[0]]  # type: ignore[index]
    stated = argument(node, "dim")
    axes = {a % x.ndim for a in ([stated] if isinstance(stated, int) else list(stated or range(x.ndim)))}
    sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    found = tracer.regions.joined(x, axes).expand(sizes)
    return found if argument(node, "keepdim", False) else found.squeeze(sorted(axes))


@_rule("matmul", "bmm", "mm")
def _product(tracer: _Tracer, node: fx.Node) -> Any:
    """Attention weights stand where their queries do, and so does what they mix; weights over channels go with the
    value."""
    left, right = node.args[:2]
    if len(left.meta["example"]) < 2 or len(right.meta["example"]) < 2:  # type: ignore[union-attr]
        return _everywhere(tracer, node)
    rows = tracer.regions.joined(tracer.values[left], [-1]) if left in tracer.dependent else None  # type: ignore[index]
    columns = tracer.regions.joined(tracer.values[right], [-2]) if right in tracer.dependent else None  # type: ignore[index]
    if rows is None or columns is None:
        return columns if rows is None else rows
    return tracer.regions.met(rows, columns, left_first=True)


@_rule("einsum")
def _einsum(tracer: _Tracer, node: fx.Node) -> Any:
    inputs, _, output = str(node.args[0]).replace(" ", "").partition("->")
    if not output or "." in inputs:
        return _everywhere(tracer, node)
    found: Tensor | None = None
    for letters, factor in zip(inputs.split(","), node.args[1], strict=True):  # type: ignore[arg-type]
        if factor not in tracer.dependent or len(set(letters)) < len(letters):
            continue
        kept = [letter for letter in letters if letter in output]
        summed = [i for i, letter in enumerate(letters) if letter not in output]
        regions = tracer.regions.joined(tracer.values[factor], summed).squeeze(summed)
        regions = regions.permute(sorted(range(len(kept)), key=lambda i: output.index(kept[i])))
        for i, letter in enumerate(output):
            regions = regions if letter in kept else regions.unsqueeze(i)
        found = regions if found is None else tracer.regions.met(found, regions, left_first=True)
    return _everywhere(tracer, node) if found is None else found


def _elsewhere(tracer: _Tracer, node: fx.Node) -> Any:
    """An operator of no rule: value by value where the shapes say so."""
    size = tracer.size(node) if node.meta.get("shape") is not None else None
    values = [tracer.values[n] for n in tracer.sources(node)]
    try:
        by_value = size is not None and _together(values) == size
    except (RuntimeError, AttributeError):
        by_value = False
    if not by_value:
        return _everywhere(tracer, node)
    found = values[0]
    for value in values[1:]:
        found = tracer.regions.met(found, value)
    return found


def _together(values: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(v.shape for v in values)))  # type: ignore[no-untyped-call]


def _everywhere(tracer: _Tracer, node: fx.Node) -> Any:
    """What may stand for any part of the image; None where there are several values at once."""
    if node.meta.get("shape") is None:
        return None
    return torch.full((1,) * len(node.meta["example"]), tracer.regions.everything, dtype=torch.float64)
