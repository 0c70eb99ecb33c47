"""Layers as maps of channels by rows and columns of the image, and which of them a class activation map is made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion.errors import BadLayer
from fusion.network import Network, op_name
from lrp.graft import Place
from lrp.grids import Grid, Grids
from lrp.inner import samples_first
from lrp.surrogate import sample_places


class AsMaps(nn.Module):
    """A layer's output as it is, whose places pass through `maps` as [N, C, rows, columns] on the way; what stands for
    no part of the image goes past it.

    place, parts: where the samples are in the output, and how many entries of their axis belong to one. grid: one of a
    place for every cell (`is_map`).
    """

    order: Tensor

    def __init__(self, place: Place, parts: int, grid: Grid) -> None:
        super().__init__()
        self.place, self.parts, self.size = place, parts, (grid.rows, grid.columns)
        axes = range(grid.cells.ndim)
        self.channels = [i + 1 for i in axes if grid.cells.shape[i] == 1]
        self.places = [i + 1 for i in axes if grid.cells.shape[i] > 1]
        self.maps = nn.Identity()
        cells = grid.cells.flatten()
        inside = torch.nonzero(cells >= 0).flatten()
        self.register_buffer("order", inside[cells[inside].argsort()])

    def forward(self, t: Tensor) -> Tensor:
        moved = self._moved(t)
        flat = self._flat(moved)
        maps = self.maps(flat[:, :, self.order].reshape(*flat.shape[:2], *self.size))
        changed = flat.index_copy(2, self.order, maps.flatten(2)).reshape(moved.shape)
        axes = [0, *self.channels, *self.places]
        return _samples_back(
            changed.permute([axes.index(i) for i in range(len(axes))]), self.place, self.parts
        )

    def at_places(self, t: Tensor) -> Tensor:
        """What of a tensor of the layer's shape is at the places: [N, C, rows * columns]."""
        return self._flat(self._moved(t))[:, :, self.order]

    def _moved(self, t: Tensor) -> Tensor:
        return samples_first(t, *self.place, self.parts).permute([0, *self.channels, *self.places])

    def _flat(self, moved: Tensor) -> Tensor:
        """[N, channels, places]"""
        places = moved.shape[1 + len(self.channels) :].numel()
        return moved.reshape(len(moved), -1, places)


def is_map(grid: Grid) -> bool:
    """Whether every cell is one place, with all channels."""
    return int((grid.cells >= 0).sum()) == grid.rows * grid.columns


def _samples_back(t: Tensor, place: Place, parts: int) -> Tensor:
    """`samples_first` undone."""
    axis, outer = place
    if parts == 1:
        return t.movedim(0, axis)
    count, rest = t.shape[0], t.shape[2:]
    return t.reshape(count, outer, parts // outer, *rest).transpose(0, 1).reshape(-1, *rest).movedim(0, axis)


@dataclass(frozen=True)
class Mapped:
    """A node whose output is maps. name: its layer's, of the last such node of a layer; the node's for all others."""

    name: str
    node: fx.Node
    as_maps: AsMaps


def mapped(network: Network, grids: Grids, left: Collection[str]) -> list[Mapped]:
    """The nodes whose output is maps, of those whose names are left, in execution order."""
    places = sample_places(network)
    found = {}
    for node in network.calls():
        grid = grids.of(node.name) if node.name in left and node in places else None
        if grid is not None and is_map(grid):
            found[node] = AsMaps(places[node], node.meta["example"][places[node][0]] // 2, grid)
    last = {str(node.meta.get("layer") or node.name): node for node in found}
    names = {node: layer for layer, node in last.items()}
    return [Mapped(names.get(node, node.name), node, as_maps) for node, as_maps in found.items()]


def depended_on(found: Sequence[Mapped], module: fx.GraphModule, graph: fx.Graph, x: Tensor) -> list[Mapped]:
    """Those at whose places the graph's output depends on them, as its gradient at a random image like x [N, ...] says:
    behind the last attention of a network that answers by its class token, that is none."""
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape[1:], generator=source)[None].to(x).requires_grad_()
    run = _Keeping(module, graph, {m.node.name for m in found})
    with torch.enable_grad():
        output = run.run(noise)
        weights = torch.randn(output.shape, generator=source).to(output)
        known = [m for m in found if run.kept[m.node.name].requires_grad]
        kept = [run.kept[m.node.name] for m in known]
        score = (output * weights).sum()
        gradients = torch.autograd.grad(score, kept, allow_unused=True) if kept else ()
    return [
        m
        for m, g in zip(known, gradients, strict=True)
        if g is not None and bool(m.as_maps.at_places(g).any())
    ]


class _Keeping(fx.Interpreter):
    """A run that keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, names: Collection[str]) -> None:
        super().__init__(module, graph=graph)
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.kept[n.name] = value
        return value


# More sums than this are blocks, and what stands in front of them is their stem.
_SUMS_OF_A_BLOCK = 3


def last_maps(found: Sequence[Mapped]) -> Mapped:
    """The last convolution or layer norm of those in execution order; the last sum, where so many sums follow on that
    layer that it belongs to the stem; the last of all where there are none of these. Raises BadLayer."""
    layers = [
        i for i, m in enumerate(found) if op_name(m.node).startswith(("conv", "layer_norm", "rms_norm"))
    ]
    sums = [i for i, m in enumerate(found) if op_name(m.node) == "add"]
    if layers and sum(i > layers[-1] for i in sums) > _SUMS_OF_A_BLOCK:
        layers = []
    for places in (layers, sums, range(len(found))):
        if places:
            return found[places[-1]]
    raise BadLayer(
        "No layer that the scores depend on has places in rows and columns of the image, so there are no maps to weigh."
    )


def named_maps(name: str, found: Sequence[Mapped]) -> Mapped:
    """The layer or node of this name. Raises BadLayer."""
    chosen = next((m for m in reversed(found) if name in (m.name, m.node.name)), None)
    if chosen is None:
        others = ", ".join(list(dict.fromkeys(m.name for m in found))[-8:])
        raise BadLayer(
            f"There is no layer '{name[:80]}' with maps (places in rows and columns of the image) that the scores "
            f"depend on. The last layers with maps are: {others or 'none'}."
        )
    return chosen
