"""Looking inside: the relevance at a layer, and relevance through chosen channels of a layer only."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx

from fusion.errors import BadLayer
from fusion.network import Network, op_name, reads_values
from lrp.channels import channel_axis
from lrp.graft import Place, Recorder, graft, passed, per_sample, received, sink
from lrp.grids import Grid, Grids
from lrp.heads import Head
from lrp.surrogate import Surrogate

# Channels of a layer by index, or a mask that broadcasts against the layer's output [N, ...].
Channels: TypeAlias = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class InnerRelevance:
    """The relevance of a layer's output for one explanation.

    values: [N, ...] in the layout of the layer (parts of a sample, such as windows, in an axis of their own behind the
    samples), or [N, T, ...] with several targets per image. axis: the channels' in it. Behind `through`, what passed.
    of: the layer itself.
    """

    layer: str
    values: Tensor
    axis: int
    several: bool = False
    of: InnerLayer | None = field(default=None, repr=False)

    @property
    def grid(self) -> Grid | None:
        """Where in the image the values of a sample stand, None where the network's graph does not tell."""
        return None if self.of is None else self.of.grid

    @property
    def by_channel(self) -> Tensor:
        """The relevance of every channel: [N, C] or [N, T, C]."""
        first = 2 if self.several else 1
        moved = self.values.movedim(self.axis, first)
        return moved.flatten(first + 1).sum(-1) if moved.ndim > first + 1 else moved

    def map(self) -> Tensor:
        """The relevance of every place, summed over the channels: [N, H, W] for a convolution."""
        return self.values.sum(self.axis)

    def on_image(self) -> Tensor:
        """The relevance of every part of the image, [N, H, W] or [N, T, H, W] with the rows and columns of the layer's
        grid: of tokens and windows too, each where it stands. Raises BadLayer where that is not known."""
        return self._sums()[0]

    def outside(self) -> Tensor:
        """The relevance of what stands for no part of the image, as class tokens do: [N] or [N, T]. Raises BadLayer."""
        return self._sums()[1]

    def _sums(self) -> tuple[Tensor, Tensor]:
        grid = self.grid
        if grid is None:
            first = 2 if self.several else 1
            raise BadLayer(
                f"The places of '{self.layer}' are no rows and columns of the image (a sample's relevance there has "
                f"shape {list(self.values.shape[first:])}). Ask for its channels, or for another layer."
            )
        return grid.sums(self.values, 2 if self.several else 1)

    def top(self, count: int = 10) -> tuple[Tensor, Tensor]:
        """(channels, their relevance), each [N, count] or [N, T, count]: the channels that speak most for the target,
        those that speak against it last."""
        amounts, channels = self.by_channel.sort(dim=-1, descending=True)
        return channels[..., :count], amounts[..., :count]


@dataclass(frozen=True)
class InnerLayer:
    """A place inside a network where relevance can be read and directed.

    name: as asked for. node: the network's node. op: its operator. axis: its channels' axis in the output. example:
    the output's shape for two samples. place: where the samples are in it. grids: those of the network's layers.
    """

    name: str
    node: str
    op: str
    axis: int
    example: tuple[int, ...]
    place: Place
    grids: Grids = field(repr=False, compare=False)

    @property
    def grid(self) -> Grid | None:
        """Where in the image the output's values stand, None where the network's graph does not tell. The first call
        for a network reads the whole graph, which may take seconds."""
        return self.grids.of(self.node)

    def size(self, samples: int) -> torch.Size:
        """The shape of the layer's output for so many samples."""
        axis = self.place[0]
        return torch.Size([s // 2 * samples if i == axis else s for i, s in enumerate(self.example)])

    def mask(self, channels: Channels, samples: int) -> Tensor:
        """1 where relevance passes and 0 elsewhere, broadcastable to the layer's output. Raises BadLayer."""
        size = self.size(samples)
        if isinstance(channels, Tensor) and (channels.is_floating_point() or channels.dtype == torch.bool):
            try:
                fits = torch.broadcast_shapes(channels.shape, size) == size  # type: ignore[no-untyped-call]
            except RuntimeError:
                fits = False
            if not fits:
                raise BadLayer(
                    f"The mask for '{self.name}' has shape {list(channels.shape)}, which does not broadcast to the "
                    f"layer's output {list(size)}."
                )
            return channels
        count = size[self.axis]
        try:
            chosen = [channels] if isinstance(channels, int) else [operator.index(c) for c in channels]
        except TypeError:
            raise BadLayer(
                f"The channels of '{self.name}' are whole numbers from 0 to {count - 1}."
            ) from None
        wrong = [c for c in chosen if not 0 <= c < count]
        if wrong or not chosen:
            what = f"has no channel {wrong[0]}" if wrong else "needs at least one channel"
            raise BadLayer(f"'{self.name}' {what}: its {count} channels are 0 to {count - 1}.")
        vector = torch.zeros(count, dtype=torch.bool)
        vector[chosen] = True
        return vector.reshape([-1 if i == self.axis else 1 for i in range(len(size))])

    def by_sample(self, t: Tensor) -> Tensor:
        """A tensor of the output's shape with the samples first: [N, ...], or [N, P, ...] where each sample has P parts
        along its axis (windows, tokens)."""
        return samples_first(t, *self.place, self.parts)

    @property
    def parts(self) -> int:
        """How many entries of the samples' axis belong to one sample."""
        return self.example[self.place[0]] // 2

    @property
    def channels(self) -> int:
        return self.example[self.axis]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The output's shape; None where it follows the batch."""
        return tuple(None if i == self.place[0] else s for i, s in enumerate(self.example))

    def relevance(self, by_target: Sequence[Tensor | None], like: Tensor, several: bool) -> InnerRelevance:
        """What a recording holds of this layer, for one target or several; 0 where it was not reached. like: a
        tensor of the samples, for their number, type and device."""
        axis = self.place[0]
        channels = self.axis + 1 if self.axis < axis else self.axis
        if self.parts != 1:
            channels += 1
        tensors = [
            self.by_sample(like.new_zeros(self.size(len(like))) if t is None else t) for t in by_target
        ]
        if several:
            return InnerRelevance(self.name, torch.stack(tensors, 1), channels + 1, True, self)
        return InnerRelevance(self.name, tensors[0], channels, False, self)


def samples_first(t: Tensor, axis: int, outer: int, parts: int) -> Tensor:
    """A tensor whose `axis` has `parts` entries per sample, `outer` of them slower than the samples: [N, ...] or, where
    there are several, [N, parts, ...]."""
    moved = t.movedim(axis, 0)
    if parts == 1:
        return moved
    samples, rest = moved.shape[0] // parts, moved.shape[1:]
    return moved.reshape(outer, samples, parts // outer, *rest).transpose(0, 1).reshape(samples, parts, *rest)


class Watcher(Recorder, Protocol):
    """A recorder that also looks at relevance inside the network, and may let only a part of it pass."""

    def watch(self, key: str, relevance: Tensor) -> Tensor | None:
        """Take the relevance of a node's output; returns a mask for what passes, None for everything."""


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, watcher: Watcher, key: str, place: Place, t: Tensor) -> Tensor:
        ctx.watcher, ctx.key, ctx.place = watcher, key, place
        ctx.save_for_backward(t)
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (t,), (grad,) = ctx.saved_tensors, grads
        relevance = t * grad
        mask = ctx.watcher.watch(ctx.key, relevance)
        if mask is None:
            return None, None, None, grad
        amounts = (per_sample(r, ctx.place, ctx.watcher.count) for r in (relevance, relevance * mask))
        ctx.watcher.record(f"{ctx.key}:through", *amounts)
        return None, None, None, grad * mask


def watch(watcher: Watcher, key: str, t: Tensor, place: Place = (0, 1)) -> Tensor:
    """t itself; the watcher learns its relevance and says what of it passes on."""
    return _Watch.apply(watcher, key, place, t)  # type: ignore[no-any-return]


def inner_layers(network: Network, surrogate: Surrogate, grids: Grids) -> dict[str, InnerLayer]:
    """Every place that can be looked at, in execution order, by its name: the last of several calls in a layer has the
    layer's name, those before it their node's (`LAYER#1` for the first call, where a layer is called like the node)."""
    open_to = passing(surrogate.whole.graph)
    nodes = [
        n for n in network.calls() if n.name in surrogate.nodes and surrogate.nodes[n.name][0] in open_to
    ]
    last = {n.meta.get("layer"): n for n in nodes}
    calls: Counter[str] = Counter()
    found = {}
    for node in nodes:
        layer = node.meta.get("layer") or ""
        calls[layer] += 1
        name = node.name if node.name not in last else f"{layer or node.name}#{calls[layer]}"
        if layer and last[layer] is node:
            name = layer
        found[name] = InnerLayer(
            name,
            node.name,
            op_name(node),
            channel_axis(node),
            node.meta["example"],
            surrogate.nodes[node.name][1],
            grids,
        )
    return found


def choose_layers(
    network: Network, known: Mapping[str, InnerLayer], names: Iterable[str]
) -> dict[str, InnerLayer]:
    """The places that these names stand for: those of `inner_layers` (`known`), or a node's. Raises BadLayer."""
    by_node = {layer.node: layer for layer in known.values()}
    found = {}
    for name in names:
        layer = known.get(name) or by_node.get(name)
        if layer is None:
            raise BadLayer(_why_not(network, name, known))
        found[name] = replace(layer, name=name)
    return found


def _why_not(network: Network, name: str, known: Mapping[str, InnerLayer]) -> str:
    if name and any(name in (n.meta.get("layer"), n.name) for n in network.calls()):
        return (
            f"Relevance does not pass through '{name}': it stands behind the class scores or before an input rule's "
            "layer, or it only chooses or scales what passes (a gate, attention weights). Ask for a layer beside it."
        )
    close = [k for k in known if name and name.lower() in k.lower()][:8] or list(known)[:8]
    return (
        f"There is no layer '{name[:80]}'. Among the layers are: {', '.join(close)}. A normalization that was "
        "folded is part of the layer that took it."
    )


# The inputs of a surrogate's own functions that gradients enter; every tensor, for all others.
_CARRYING: dict[object, Callable[[tuple[Any, ...]], Any]] = {
    graft: lambda args: args[3],
    sink: lambda args: (),
    passed: lambda args: args[2],
    received: lambda args: args[2],
    torch.ops.aten.detach.default: lambda args: (),
}


def passing(program: fx.Graph) -> set[str]:
    """The names of the nodes of a surrogate's graph that relevance reaches on its way from the scores to the input."""

    def sources(node: fx.Node) -> list[fx.Node]:
        if node.op == "output":
            return node.all_input_nodes
        if node.op != "call_function" or not reads_values(node):
            return []
        carrying: list[fx.Node] = []
        select = _CARRYING.get(node.target)
        fx.node.map_arg((node.args, node.kwargs) if select is None else select(node.args), carrying.append)
        return carrying

    nodes = list(program.nodes)
    gated: set[fx.Node] = set()
    for node in nodes:
        if (node.op == "placeholder" and node.target == "gate") or any(n in gated for n in sources(node)):
            gated.add(node)
    reached = {nodes[-1]}
    for node in reversed(nodes):
        if node in reached:
            reached.update(sources(node))
    return {node.name for node in reached & gated}


@dataclass(frozen=True)
class Directed:
    """A surrogate's program for one question: (x, gate, recorder) -> scores [N, K], or the values that are explained.

    It is run node by node: torch.fx keeps the source of every module that it generates while the process lives.
    """

    weights: fx.GraphModule
    graph: fx.Graph

    def __call__(self, x: Tensor, gate: Tensor, recorder: Recorder | None) -> Any:
        return fx.Interpreter(self.weights, graph=self.graph).run(x, gate, recorder)


def directed(
    surrogate: Surrogate,
    watched: Iterable[InnerLayer],
    neurons: InnerLayer | None = None,
    heads: Sequence[Head] = (),
) -> Directed:
    """The surrogate's program with a watcher (its recorder) at these layers, for these outputs (by default the one that
    is explained by default; several come as a tuple). Where neurons are explained, it is cut at their layer: its
    output, with the samples first and flattened, takes the outputs' place. The weights are shared. Raises BadLayer for
    a watched layer that what is explained does not depend on."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    answers: Any = graph.graph_copy(surrogate.whole.graph, val_map=copied)
    new = {old.name: node for old, node in copied.items()}
    if neurons is not None:
        node = new[surrogate.nodes[neurons.node][0]]
        first = graph.call_function(samples_first, (node, *neurons.place, neurons.parts))
        answers = graph.call_function(torch.ops.aten.flatten.using_ints, (first, 1))
    elif len(surrogate.heads) > 1:
        chosen = [answers[surrogate.heads.index(head)] for head in heads or (surrogate.default,)]
        answers = chosen[0] if len(chosen) == 1 else tuple(chosen)
    graph.output(answers)
    graph.eliminate_dead_code()
    open_to = passing(graph)
    recorder = next(node for node in graph.nodes if node.op == "placeholder" and node.target == "recorder")
    for layer in {layer.node: layer for layer in watched}.values():
        node = new[surrogate.nodes[layer.node][0]]
        if node.name not in open_to:
            names = [f"'{head.name}'" for head in heads or (surrogate.default,)]
            last = " and ".join(names) if neurons is None else f"'{neurons.name}'"
            raise BadLayer(f"'{layer.name}' is no part of what makes {last}: its relevance is 0 everywhere.")
        with graph.inserting_after(node):
            look = graph.call_function(watch)
        node.replace_all_uses_with(look)
        look.args = (recorder, layer.node, node, layer.place)
    graph.lint()
    return Directed(surrogate.whole, graph)
