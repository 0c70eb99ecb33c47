"""Other attributions of the same graph, for comparison: captum's methods on the network that LRP explains."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from fusion.errors import BadComposite, BadInput
from fusion.network import Network, op_name
from fusion.outputs import default_of
from lrp.grids import Grids
from lrp.heads import heads, in_shape
from lrp.inner import InnerLayer, samples_first
from lrp.maps import Mapped, depended_on, last_maps, mapped, named_maps

aten = torch.ops.aten


# Told before every run of the network, of how many images; what it raises ends the attribution.
Progress: TypeAlias = Callable[[int], None]

# (scores or an output [N, ...], weights of the same shape) -> one number per sample [N]
Reduce: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Scored(nn.Module):
    """A network as captum wants it: (x [N, ...], weights) -> one number per sample [N], the sum of the scores times the
    weights, both [N, K] (or an output, in its shape), or what `reduce` makes of the two.

    `graph` is its own, so methods may rewrite it; it reads the weights of `weights` and calls the modules of `parts`.
    It is run node by node: torch.fx keeps the source of every module that it generates while the process lives. Before
    every run `progress` is told of how many images.
    """

    def __init__(
        self,
        weights: fx.GraphModule,
        graph: fx.Graph,
        reduce: Reduce | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.graph, self.reduce, self.progress = weights, graph, reduce, progress
        self.parts = nn.ModuleList()

    def part(self, module: nn.Module, x: Any) -> fx.Node:
        """A new node that calls the module."""
        self.parts.append(module)
        return self.graph.call_function(module.__call__, (x,))  # a function with a name, and with hooks

    def scores(self, x: Tensor) -> Tensor:
        """[N, K], or the output that is explained."""
        return fx.Interpreter(self.weights, graph=self.graph).run(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        if self.progress is not None:
            self.progress(len(x))
        scores = self.scores(x)
        return (scores * weights).flatten(1).sum(1) if self.reduce is None else self.reduce(scores, weights)


@dataclass(frozen=True)
class Subject:
    """What a method is given: the network, the grids of its layers, the scored module made of it, the input
    [N, C, H, W] and the weights of the scores [N, K] (of an output, in its shape)."""

    network: Network
    grids: Grids
    scored: Scored
    x: Tensor
    seed: Tensor


Method: TypeAlias = Callable[..., Tensor]


def scored(
    network: Network,
    layer: InnerLayer | None = None,
    reduce: Reduce | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> Scored:
    """The network up to an output (before a final softmax; by default the one that is explained by default), or up to a
    layer, flattened to [N, K]."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(network.module.graph, val_map=copied)
    new = {old.name: node for old, node in copied.items()}
    if layer is None:
        found = heads(network)
        head = next((h for h in found if h.name == name), default_of(found))
        value = new[head.node]
        result = in_shape(graph, value, len(value.meta["shape"]), head)
    else:
        first = graph.call_function(samples_first, (new[layer.node], *layer.place, layer.parts))
        result = graph.call_function(aten.flatten.using_ints, (first, 1))
    graph.output(result)
    graph.eliminate_dead_code()
    return Scored(network.module, graph, reduce, progress)


def footprint(network: Network) -> int:
    """About how many bytes the values between the layers take for one image: what a gradient has to keep."""
    sizes = (math.prod(n.meta["example"]) * n.meta["dtype"].itemsize for n in network.calls())
    return int(sum(sizes)) // 2  # examples are of two samples


def attribute(method: str, subject: Subject, options: Mapping[str, Any]) -> Tensor:
    """The attribution [N, C, H, W] (GradCAM: [N, 1, H, W]). Raises BadComposite for a method or an option that is not
    there, BadInput and BadLayer where the network does not fit the method."""
    if method not in METHODS:
        raise BadComposite(f"There is no method {method[:80]!r}: choose one of {', '.join(METHODS)}.")
    known = list(inspect.signature(METHODS[method]).parameters)[1:]
    unknown = [name for name in options if name not in known]
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise BadComposite(f"{method} has no option {unknown[0]!r}: {takes}.")
    return METHODS[method](subject, **options).detach()


# --- gradients ------------------------------------------------------------------------------------------------------
def input_x_gradient(subject: Subject) -> Tensor:
    """x * df/dx (Shrikumar et al. 2016, arXiv:1605.01713)."""
    captum = _captum()
    return _tensor(
        captum.InputXGradient(subject.scored).attribute(subject.x, additional_forward_args=(subject.seed,))
    )


def integrated_gradients(
    subject: Subject,
    baseline: float | Tensor = 0.0,
    n_steps: int = 50,
    rule: Literal["gausslegendre", "riemann_trapezoid", "riemann_middle"] = "gausslegendre",
    batch: int = 16,
) -> Tensor:
    """(x - b) * the mean gradient on the way from the baseline b to x (Sundararajan et al. 2017, arXiv:1703.01365): the
    sum is f(x) - f(b), up to the quadrature's error. baseline: in the units of the network's input, a number or a
    tensor that broadcasts to it. batch: how many steps run at once."""
    captum = _captum()
    found = captum.IntegratedGradients(subject.scored).attribute(
        subject.x,
        baselines=_filled(baseline, subject.x),
        additional_forward_args=(subject.seed,),
        n_steps=n_steps,
        method=rule,
        internal_batch_size=max(batch, len(subject.x)),
    )
    return _tensor(found)


def smooth_grad(
    subject: Subject, samples: int = 25, noise: float = 0.15, seed: int = 0, batch: int = 16
) -> Tensor:
    """The mean gradient of noisy copies of the image (Smilkov et al. 2017, arXiv:1706.03825). noise: its standard
    deviation as a share of the image's range. seed: the noise comes from a generator of its own, so the same seed gives
    every image the same map, whatever the device and `batch`, and nobody else's random numbers change."""
    saliency = _captum().Saliency(subject.scored)
    maps = []
    for x, weights in zip(
        torch.split(subject.x.detach(), 1), torch.split(subject.seed, 1), strict=True
    ):  # each image has a range of its own
        deviation = noise * float(x.max() - x.min())
        source = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(x)
        for first in range(0, samples, batch):
            count = min(batch, samples - first)
            # One by one and on the CPU: what a generator gives depends on how much it is asked for at once.
            drawn = torch.stack([torch.randn(x.shape[1:], generator=source) for _ in range(count)])
            noisy = (x + deviation * drawn.to(x)).requires_grad_()
            found = saliency.attribute(
                noisy, abs=False, additional_forward_args=(weights.expand(count, *weights.shape[1:]),)
            )
            total += _tensor(found).sum(0, keepdim=True)
        maps.append(total / samples)
    return torch.cat(maps)


def guided_backprop(subject: Subject) -> Tensor:
    """The gradient, with only its positive part passing a ReLU (Springenberg et al. 2015, arXiv:1412.6806). ReLUs that
    fusion gave another threshold count as what they were."""
    captum = _captum()
    if not _rectifiers_as_modules(subject.scored):
        raise BadComposite(
            "GuidedBackprop changes the gradient of ReLUs, and the network has none: what it gives would be the plain "
            "gradient. Take InputXGradient or SmoothGrad."
        )
    return _tensor(
        captum.GuidedBackprop(subject.scored).attribute(subject.x, additional_forward_args=(subject.seed,))
    )


# --- by occlusion ---------------------------------------------------------------------------------------------------
def occlusion(
    subject: Subject,
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    baseline: float | Tensor = 0.0,
    batch: int = 8,
) -> Tensor:
    """By how much the score falls when a window is covered by the baseline, the mean over all windows that cover a
    pixel (Zeiler and Fergus 2014, arXiv:1311.2901). window: in pixels, an eighth of the image by default; stride: half
    a window by default. captum averages in float32, whatever the network computes in."""
    captum = _captum()
    x = subject.x.detach()
    if x.ndim != 4:
        raise BadInput("Occlusion covers windows of images [N, C, H, W]; this network takes none.")
    size, steps, _ = windows((int(x.shape[2]), int(x.shape[3])), window, stride)
    found = captum.Occlusion(subject.scored).attribute(
        x,
        sliding_window_shapes=(x.shape[1], *size),
        strides=(x.shape[1], *steps),
        baselines=_filled(baseline, x),
        additional_forward_args=(subject.seed,),
        perturbations_per_eval=batch,
    )
    return _tensor(found).to(x.dtype)


def windows(
    image: tuple[int, int],
    window: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(window, stride, how many windows) by which Occlusion covers an image (height, width). Raises BadComposite."""
    height, width = _pair(window, (max(1, image[0] // 8), max(1, image[1] // 8)))
    down, right = _pair(stride, (max(1, height // 2), max(1, width // 2)))
    fits = 0 < height <= image[0] and 0 < width <= image[1] and 0 < down <= height and 0 < right <= width
    if not fits:
        raise BadComposite(
            f"A window of {height} x {width} with strides {down} and {right} does not cover an image of "
            f"{image[0]} x {image[1]}: a window fits into the image, and a stride into the window."
        )
    rows, columns = -(-(image[0] - height) // down) + 1, -(-(image[1] - width) // right) + 1
    return (height, width), (down, right), rows * columns


# --- class activation maps ------------------------------------------------------------------------------------------
def grad_cam(
    subject: Subject, layer: str | None = None, interpolate: Literal["bilinear", "nearest"] = "bilinear"
) -> Tensor:
    """relu(sum_k mean(df/dA_k) A_k) over the channels k of a layer's maps A, enlarged to the input's size (Selvaraju et
    al. 2017, arXiv:1610.02391): [N, 1, H, W].

    layer: one whose places are rows and columns of the image; tokens and windows are put where they stand in it, and
    what stands nowhere, as a class token, does not count. By default the last convolution or layer norm at whose places
    the scores depend on it: in a network that answers by its class token the norm in front of the last attention. Where
    more than three sums follow on that, it belongs to the stem (of a network without layer norms), and the last sum is
    taken. The affine part of a layer norm is in the layers behind it, and not in its maps.
    """
    captum = _captum()
    if subject.x.ndim != 4:
        raise BadInput("GradCAM is for networks of images [N, C, H, W]; this network takes none.")
    graph = subject.scored.graph
    chosen = cam_layer(subject.network, subject.grids, subject.scored, subject.x, layer)
    node = next(n for n in graph.nodes if n.name == chosen.node.name)
    as_maps = chosen.as_maps.to(subject.x.device)
    with graph.inserting_after(node):
        looked = subject.scored.part(as_maps, node)
    node.replace_all_uses_with(looked, delete_user_cb=lambda user: user is not looked)
    found = captum.LayerGradCam(subject.scored, as_maps.maps).attribute(
        subject.x, additional_forward_args=(subject.seed,), relu_attributions=True
    )
    size = (int(subject.x.shape[2]), int(subject.x.shape[3]))
    return _tensor(captum.LayerAttribution.interpolate(found, size, interpolate_mode=interpolate))


def cam_layer(network: Network, grids: Grids, scored: Scored, x: Tensor, layer: str | None) -> Mapped:
    """The layer whose maps GradCAM weighs: the one of this name, or which it takes by default. Raises BadLayer."""
    left = {n.name for n in scored.graph.nodes}
    found = depended_on(mapped(network, grids, left), scored.weights, scored.graph, x)
    return last_maps(found) if layer is None else named_maps(layer, found)


METHODS: dict[str, Method] = {
    "IntegratedGradients": integrated_gradients,
    "SmoothGrad": smooth_grad,
    "InputXGradient": input_x_gradient,
    "GuidedBackprop": guided_backprop,
    "Occlusion": occlusion,
    "GradCAM": grad_cam,
}


# --- looking at the graph -------------------------------------------------------------------------------------------
def _rectifiers_as_modules(scored: Scored) -> int:
    """Let every ReLU of the graph be a module of its own, as captum's hooks need it; returns how many there are.

    max(x, b) with a constant b, as fusion writes a ReLU behind a folded map, is b + relu(x - b), and min(x, b) is
    b - relu(b - x); channels without a bound (b = -inf, inf) go past them.
    """
    graph, count = scored.graph, 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        op = op_name(node)
        bound = _bound(scored.weights, node) if op in ("maximum", "minimum") else None
        if op != "relu" and bound is None:
            continue
        with graph.inserting_before(node):
            if bound is None:
                new = scored.part(nn.ReLU(), node.args[0])
            else:
                new = scored.part(Rectifier(bound[0], upper=op == "minimum"), bound[1])
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    return count


class Rectifier(nn.Module):
    """max(x, b), or min(x, b) with `upper`, around a ReLU as a module."""

    bound: Tensor
    bounded: Tensor

    def __init__(self, bound: Tensor, upper: bool) -> None:
        super().__init__()
        self.relu, self.sign = nn.ReLU(), -1.0 if upper else 1.0
        self.register_buffer("bounded", torch.isfinite(bound))
        self.register_buffer("bound", torch.where(self.bounded, bound, torch.zeros_like(bound)))

    def forward(self, x: Tensor) -> Tensor:
        beyond = self.relu(self.sign * (x - self.bound))
        return torch.where(self.bounded, self.bound + self.sign * beyond, x)


def _bound(weights: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Any] | None:
    """(the constant, the other argument) of a maximum or minimum with a constant."""
    for i, argument in enumerate(node.args[:2]):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return weights.get_buffer(str(argument.target)), node.args[1 - i]
    return None


def _filled(baseline: float | Tensor, x: Tensor) -> Tensor:
    """A baseline in the shape of the input. Raises BadInput."""
    value = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        return value.expand(x.shape)
    except RuntimeError:
        raise BadInput(
            f"A baseline of shape {list(value.shape)} does not fit the input {list(x.shape)}."
        ) from None


def _pair(value: int | tuple[int, int] | None, default: tuple[int, int]) -> tuple[int, int]:
    if value is None:
        return default
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _captum() -> Any:
    """captum.attr, imported where it is needed: it is slow to import, and has no types."""
    return importlib.import_module("captum.attr")


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)  # one input, one attribution
    return found
