"""The composite that suits a network, picked by what its graph contains, with the reason in one sentence.

What is known: z+ at convolutions and epsilon at linear layers is the best measured choice for convolutional networks
(Pahde et al. 2023, arXiv:2211.17174: VGG, ResNet, DenseNet, EfficientNet, where alpha-beta loses faithfulness;
Bluecher et al. 2024, arXiv:2401.06654: ResNet-50). Vision transformers want gamma: 0.05 at linear layers, 100 (all but
z+) at the patch embedding, with attention weights held constant (Achtibat et al. 2024, arXiv:2402.05602; Bakish et al.
2025, arXiv:2506.02138). For hybrids no rule set is published: each part has that of its kind, with a larger gamma,
since relevance grows with every layer that cancels.

Sums and z+ layers are stabilized by a share of their spread. Two branches that cancel get a multiple of what reaches
their sum, and where only little speaks for an output that much speaks against, z+ hands a large multiple on; each is
small beside the layer's relevance, but multiplied layer by layer they grow, and rounding decides their signs. Without,
float32 maps of MobileOne, RepViT or EfficientViT are off by 7 to 16 % of the maximum, with it by 1e-4, and maps of
networks that have no such sums stay what they were (`benchmarks.precision`). Thresholds max(x, b), which norms folded
through ReLUs leave, and maxima over tokens are smoothed by a share of their spread (`lrp.ties`): else, where rounding
turns the winner, relevance jumps, in DenseNet and Hiera by 0.4 to 0.8 % of the map's maximum in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fusion.linear import linear_layer
from fusion.network import Network, is_size_arithmetic, op_name, value_dependent
from lrp.composites import (
    Composite,
    epsilon_plus_flat_smooth,
    epsilon_plus_flat_steady,
    gamma_plus_flat,
    gamma_vit,
)

AUTO = "auto"
_SOFTMAX = {"softmax", "_softmax"}
_SMOOTH = {
    "silu": "SiLU",
    "gelu": "GELU",
    "hardswish": "hard swish",
    "mish": "Mish",
    "elu": "ELU",
    "tanh": "tanh",
}
_MIXING = {"matmul", "bmm", "einsum"}


@dataclass(frozen=True)
class Anatomy:
    """What a network is made of.

    convolutions: those behind the first linear layer that see more than one position. linear: linear layers and
    convolutions of one position. attention: products with attention weights. smooth: its smooth activations, by name.
    gates: squeeze-and-excite gates and their like. recurrent: recurrent layers.
    """

    convolutions: int
    linear: int
    attention: int
    smooth: tuple[str, ...]
    gates: int
    recurrent: int


@dataclass(frozen=True)
class Choice:
    """A composite, and a sentence that says why it was picked (empty where a user did)."""

    composite: Composite
    reason: str = ""


def anatomy(network: Network) -> Anatomy:
    """Count what matters for the choice of rules, in the part of the graph that depends on the image."""
    dependent = value_dependent(network)
    calls = [
        n
        for n in network.graph.nodes
        if n.op == "call_function" and n in dependent and not is_size_arithmetic(n)
    ]
    ops = [op_name(n) for n in calls]
    layers = [layer for n in calls if (layer := linear_layer(network, n))]
    wide = [layer for layer in layers[1:] if layer.sees_neighbours]
    return Anatomy(
        convolutions=len(wide),
        linear=len(layers) - len(wide),
        attention=ops.count("scaled_dot_product_attention") + sum(_attends(n) for n in calls),
        smooth=tuple(name for op, name in _SMOOTH.items() if op in ops),
        gates=sum(op in ("sigmoid", "hardsigmoid") for op in ops),
        recurrent=ops.count("lstm"),
    )


def _attends(node: fx.Node) -> bool:
    """Whether a softmax's answers go into a product of matrices, moved or mixed on the way."""
    if op_name(node) not in _SOFTMAX:
        return False
    front, seen = list(node.users), {node}
    for _ in range(8):
        if any(op_name(n) in _MIXING for n in front if n.op == "call_function"):
            return True
        seen |= set(front)
        front = [
            user
            for n in front
            if n.op == "call_function" and not is_size_arithmetic(n)
            for user in n.users
            if user not in seen
        ]
    return False


@dataclass(frozen=True)
class Preference:
    """A kind of network: how to tell it, its composite, and the reason, with what was counted filled in."""

    fits: Callable[[Anatomy], bool]
    composite: Callable[[], Composite]
    reason: str


# The first that fits is taken.
PREFERENCES: tuple[Preference, ...] = (
    Preference(
        lambda a: a.attention > 0 and a.convolutions == 0,
        gamma_vit,
        "a transformer ({attention} attention layers, no convolution but the patch embedding): gamma at every layer, "
        "attention weights held constant",
    ),
    Preference(
        lambda a: a.attention > 0,
        gamma_plus_flat,
        "a hybrid ({attention} attention layers, {convolutions} convolutions): z+ at convolutions, gamma at linear "
        "layers, which keeps relevance from growing layer by layer",
    ),
    Preference(
        lambda a: a.recurrent > 0,
        gamma_plus_flat,
        "recurrent ({recurrent} LSTM layers, gates held constant): gamma at linear layers, z+ at convolutions",
    ),
    Preference(
        lambda a: a.convolutions == 0,
        gamma_plus_flat,
        "linear layers that mix tokens ({linear}), without attention: gamma at linear layers, flat at the first",
    ),
    Preference(
        lambda a: bool(a.smooth) or a.gates > 0,
        epsilon_plus_flat_smooth,
        "a convolutional network with {features}: z+ for inputs of any sign at convolutions, gates held constant; "
        "alpha-beta rules lose faithfulness there",
    ),
    Preference(
        lambda a: True,
        epsilon_plus_flat_steady,
        "a convolutional network ({convolutions} convolutions, piecewise linear activations): z+ at convolutions, "
        "epsilon at linear layers, flat at the first",
    ),
)


def pick(network: Network) -> Choice:
    """The composite for a (fused) network, and why."""
    found = anatomy(network)
    features = [*found.smooth, *([f"{found.gates} gates"] if found.gates else [])]
    chosen = next(p for p in PREFERENCES if p.fits(found))
    composite = chosen.composite()
    reason = chosen.reason.format(
        attention=found.attention,
        convolutions=found.convolutions,
        linear=found.linear,
        recurrent=found.recurrent,
        features=" and ".join(features),
    )
    steady = "; sums that cancel fade out" if composite.norm_relative else ""
    return Choice(composite, f"The composite {composite.name} was picked for {reason}{steady}.")
