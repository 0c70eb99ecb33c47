"""Composites: which rule stands at which layer, under the field's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, Literal, TypeAlias, get_args

from fusion.errors import BadComposite
from fusion.linear import LinearLayer
from lrp.batch_norm import BatchNormRule
from lrp.rules import (
    AlphaBeta,
    AnyRule,
    BiasMode,
    Epsilon,
    Flat,
    Gamma,
    InputRule,
    LinearRule,
    ZBox,
    ZPlus,
    bound,
)

AttentionRule: TypeAlias = Literal["values", "attnlrp"]
GateRule: TypeAlias = Literal["signal", "uniform"]
SumRule: TypeAlias = Literal["contribution", "ratio"]
NormalizationRule: TypeAlias = Literal["ln-rule", "identity"]


@dataclass(frozen=True)
class Composite:
    """A rule for every linear layer of a network.

    convolution, linear: the rule for each kind of layer. first: the rule for layers that read the input directly
    (for convolutions only, where `first_convolutions_only`). overrides: (pattern, rule) pairs; the last one whose
    pattern matches the layer wins over everything else; `override` says what a pattern is. norm_epsilon: the stabilizer
    at residual sums and average pools (the field's Norm rule; 0 lets the gradient do it exactly); with norm_relative a
    share of the root mean square of a sample's sums. Terms that cancel have large shares of a sum that is about 0, and
    where a ReLU follows, rounding decides whether they count: a stabilizer beyond rounding lets their relevance fade
    out instead. tie_width: the lead, as a share of the root mean square of a sample's values, that a value must have to
    take all at thresholds max(x, b) and at maxima over axes; what is closer to a tie fades (0: the winner takes all,
    the gradient; see `lrp.ties`). Maximum pools over windows are the gradient.

    What happens elsewhere: batch_norm: the rule at batch norms that stay in the network, "magnitude", "identity" or
    "epsilon" (`lrp.batch_norm`). attention: "values" holds attention weights constant (CP-LRP, Ali et al. 2022,
    arXiv:2202.07304); "attnlrp" gives queries and keys their part too (Achtibat et al. 2024, arXiv:2402.05602, prop.
    3.1 and 3.3). gates: a sigmoid's product with a signal goes all to the "signal" (Pahde et al. 2023), or "uniform",
    half to each (Achtibat et al. 2024, prop. 3.2). sums: each term of a residual sum has its "contribution"
    a / (a + b), or the "ratio" |a| / (|a| + |b|), which nothing cancels (Otsuki et al. 2024, arXiv:2407.09115).
    normalization: the divisions that stay of layer, group and instance norms pass relevance by the "ln-rule" (deviation
    constant, centering linear, Ali et al. 2022) or unchanged, by "identity".
    """

    name: str
    convolution: LinearRule
    linear: LinearRule
    first: AnyRule | None = None
    first_convolutions_only: bool = False
    overrides: tuple[tuple[str, AnyRule], ...] = field(default=())
    norm_epsilon: float = 0.0
    norm_relative: bool = False
    tie_width: float = 0.0
    batch_norm: BatchNormRule = "magnitude"
    attention: AttentionRule = "values"
    gates: GateRule = "signal"
    sums: SumRule = "contribution"
    normalization: NormalizationRule = "ln-rule"

    def __post_init__(self) -> None:
        for name, known in _WAYS.items():
            if getattr(self, name) not in known:
                raise BadComposite(
                    f"There is no way '{getattr(self, name)}' for {name}: choose one of {', '.join(known)}."
                )

    def override(self, rules: Mapping[str, AnyRule]) -> Composite:
        """The same composite with other rules at the layers that a pattern matches: a layer's name, a glob pattern of
        names, or one of "@first", "@last" (in execution order), "@low", "@mid", "@high" (thirds of the convolutions
        that see their neighbours' values; of all layers but the last in a network with fewer than three of them),
        "@conv", "@conv_transpose", "@linear" (kinds of layers)."""
        return replace(self, overrides=(*self.overrides, *rules.items()))

    def resolve(
        self, layers: Sequence[LinearLayer], readers_of_input: set[LinearLayer]
    ) -> dict[LinearLayer, AnyRule]:
        """The rule of every layer. Raises BadComposite for an override that matches nothing, or for an input rule
        at a layer that does not read the input."""
        groups = layer_groups(layers)
        for pattern, _ in self.overrides:
            if not any(_matches(layer, pattern, groups) for layer in layers):
                known = ", ".join(layer.name for layer in layers[:8]) + (", ..." if len(layers) > 8 else "")
                raise BadComposite(
                    f"The override '{pattern}' matches no linear layer. The layers are: {known}. Groups of them are: "
                    f"{', '.join(sorted(set().union(*groups.values())))}."
                )
        resolved = {layer: self._rule(layer, layer in readers_of_input, groups) for layer in layers}
        for layer, rule in resolved.items():
            if isinstance(rule, InputRule) and layer not in readers_of_input:
                raise BadComposite(
                    f"{type(rule).__name__} is a rule for layers that read the network's input; '{layer.name}' does "
                    "not. Use Epsilon, Gamma, ZPlus or AlphaBeta there."
                )
        return resolved

    def _rule(self, layer: LinearLayer, reads_input: bool, groups: Mapping[LinearLayer, set[str]]) -> AnyRule:
        for pattern, rule in reversed(self.overrides):
            if _matches(layer, pattern, groups):
                return rule
        convolution = layer.kind != "linear"
        if reads_input and self.first is not None and (convolution or not self.first_convolutions_only):
            return self.first
        return self.convolution if convolution else self.linear

    def __str__(self) -> str:
        parts = [f"convolution {self.convolution}", f"linear {self.linear}"]
        parts += [f"first {self.first}"] if self.first else []
        parts += [f"{pattern} {rule}" for pattern, rule in self.overrides]
        if self.norm_epsilon:
            parts += [f"sums epsilon={self.norm_epsilon:g}" + (" relative" if self.norm_relative else "")]
        parts += [f"ties within {self.tie_width:g}"] if self.tie_width else []
        defaults = type(self).__dataclass_fields__
        parts += [
            f"{name.replace('_', ' ')} {getattr(self, name)}"
            for name in ("batch_norm", *_WAYS)
            if getattr(self, name) != defaults[name].default
        ]
        return f"{self.name}: " + ", ".join(parts)


_WAYS: dict[str, tuple[str, ...]] = {
    "attention": get_args(AttentionRule),
    "gates": get_args(GateRule),
    "sums": get_args(SumRule),
    "normalization": get_args(NormalizationRule),
}


def layer_groups(layers: Sequence[LinearLayer]) -> dict[LinearLayer, set[str]]:
    """The groups that every layer belongs to, by the names that overrides know: see `Composite.override`."""
    groups = {layer: {f"@{layer.kind}"} for layer in layers}
    if layers:
        groups[layers[0]].add("@first")
        groups[layers[-1]].add("@last")
    deep = [layer for layer in layers if layer.sees_neighbours]
    deep = deep if len(deep) >= 3 else list(layers[:-1])
    for i, layer in enumerate(deep):
        groups[layer].add(("@low", "@mid", "@high")[i * 3 // len(deep)])
    return groups


def _matches(layer: LinearLayer, pattern: str, groups: Mapping[LinearLayer, set[str]]) -> bool:
    return pattern in groups[layer] or fnmatchcase(layer.name, pattern) or layer.node.name == pattern


def epsilon_plus(
    epsilon: float = 1e-6, stabilizer: float = 1e-6, norm_epsilon: float = 0.0, bias: BiasMode = "absorb"
) -> Composite:
    """z+ at convolutions, epsilon at linear layers (Montavon et al. 2019)."""
    return Composite(
        "EpsilonPlus",
        convolution=ZPlus(epsilon=stabilizer, bias=bias),
        linear=Epsilon(epsilon=epsilon, bias=bias),
        norm_epsilon=norm_epsilon,
    )


def epsilon_plus_flat(
    epsilon: float = 1e-6, stabilizer: float = 1e-6, norm_epsilon: float = 0.0, bias: BiasMode = "absorb"
) -> Composite:
    """EpsilonPlus with flat at the first layer (Lapuschkin et al. 2019; Kohlbrenner et al. 2020, arXiv:1910.09840)."""
    base = epsilon_plus(epsilon, stabilizer, norm_epsilon, bias)
    return replace(base, name="EpsilonPlusFlat", first=Flat(epsilon=stabilizer))


def epsilon_gamma_box(
    low: Any = -3.0,
    high: Any = 3.0,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    stabilizer: float = 1e-6,
    norm_epsilon: float = 0.0,
    bias: BiasMode = "absorb",
) -> Composite:
    """Gamma at convolutions, epsilon at linear layers, zB at the first convolution (Montavon et al. 2019)."""
    return Composite(
        "EpsilonGammaBox",
        convolution=Gamma(gamma, epsilon=stabilizer, bias=bias),
        linear=Epsilon(epsilon=epsilon, bias=bias),
        first=ZBox(bound(low), bound(high), epsilon=stabilizer),
        first_convolutions_only=True,
        norm_epsilon=norm_epsilon,
    )


def epsilon_alpha2_beta1(
    epsilon: float = 1e-6, stabilizer: float = 1e-6, norm_epsilon: float = 0.0, bias: BiasMode = "absorb"
) -> Composite:
    """alpha = 2, beta = 1 at convolutions, epsilon at linear layers (Lapuschkin et al. 2017, arXiv:1708.07689)."""
    return Composite(
        "EpsilonAlpha2Beta1",
        convolution=AlphaBeta(2.0, 1.0, epsilon=stabilizer, bias=bias),
        linear=Epsilon(epsilon=epsilon, bias=bias),
        norm_epsilon=norm_epsilon,
    )


def epsilon_alpha2_beta1_flat(
    epsilon: float = 1e-6, stabilizer: float = 1e-6, norm_epsilon: float = 0.0, bias: BiasMode = "absorb"
) -> Composite:
    """EpsilonAlpha2Beta1 with flat at the first layer (Kohlbrenner et al. 2020)."""
    base = epsilon_alpha2_beta1(epsilon, stabilizer, norm_epsilon, bias)
    return replace(base, name="EpsilonAlpha2Beta1Flat", first=Flat(epsilon=stabilizer))


def attn_lrp(
    epsilon: float = 1e-6, stabilizer: float = 1e-6, norm_epsilon: float = 0.0, bias: BiasMode = "absorb"
) -> Composite:
    """Epsilon at every layer, relevance through queries and keys too (Achtibat et al. 2024, arXiv:2402.05602)."""
    return Composite(
        "AttnLRP",
        convolution=Epsilon(epsilon=stabilizer, bias=bias),
        linear=Epsilon(epsilon=epsilon, bias=bias),
        norm_epsilon=norm_epsilon,
        attention="attnlrp",
        gates="uniform",
    )


def epsilon_plus_flat_steady(
    epsilon: float = 1e-6,
    stabilizer: float = 1e-2,
    norm_epsilon: float = 2e-3,
    tie_width: float = 0.1,
    bias: BiasMode = "absorb",
) -> Composite:
    """EpsilonPlusFlat with z+ (stabilizer) and sums (norm_epsilon) stabilized, and thresholds smoothed (tie_width), by
    shares of their spread."""
    return replace(
        epsilon_plus_flat(epsilon=epsilon, norm_epsilon=norm_epsilon, bias=bias),
        name="EpsilonPlusFlatSteady",
        convolution=ZPlus(epsilon=stabilizer, relative=True, bias=bias),
        norm_relative=True,
        tie_width=tie_width,
    )


def epsilon_plus_flat_smooth(
    epsilon: float = 1e-6,
    stabilizer: float = 1e-2,
    norm_epsilon: float = 1e-2,
    tie_width: float = 0.1,
    bias: BiasMode = "absorb",
) -> Composite:
    """EpsilonPlusFlatSteady for networks whose activations are no ReLUs, where more cancels."""
    steady = epsilon_plus_flat_steady(epsilon, stabilizer, norm_epsilon, tie_width, bias)
    return replace(steady, name="EpsilonPlusFlatSmooth")


def gamma_plus_flat(
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    stabilizer: float = 1e-2,
    norm_epsilon: float = 1e-2,
    tie_width: float = 0.1,
    bias: BiasMode = "absorb",
) -> Composite:
    """EpsilonPlusFlatSmooth with gamma at linear layers, which keeps relevance from growing layer by layer."""
    return replace(
        epsilon_plus_flat_smooth(epsilon, stabilizer, norm_epsilon, tie_width, bias),
        name="GammaPlusFlat",
        linear=Gamma(gamma, epsilon=epsilon, bias=bias),
    )


def gamma_vit(
    epsilon: float = 1e-6,
    gamma: float = 0.05,
    convolution_gamma: float = 100.0,
    tie_width: float = 0.1,
    bias: BiasMode = "absorb",
) -> Composite:
    """Gamma everywhere: hardly any at linear layers, all but z+ at convolutions (Achtibat et al. 2024; Bakish et al.
    2025, arXiv:2506.02138); maxima over tokens smoothed by a share of their spread."""
    return Composite(
        "GammaViT",
        convolution=Gamma(convolution_gamma, epsilon=epsilon, bias=bias),
        linear=Gamma(gamma, epsilon=epsilon, bias=bias),
        tie_width=tie_width,
    )


COMPOSITES: dict[str, Callable[..., Composite]] = {
    "EpsilonPlus": epsilon_plus,
    "EpsilonPlusFlat": epsilon_plus_flat,
    "EpsilonGammaBox": epsilon_gamma_box,
    "EpsilonAlpha2Beta1": epsilon_alpha2_beta1,
    "EpsilonAlpha2Beta1Flat": epsilon_alpha2_beta1_flat,
    "AttnLRP": attn_lrp,
    "EpsilonPlusFlatSteady": epsilon_plus_flat_steady,
    "EpsilonPlusFlatSmooth": epsilon_plus_flat_smooth,
    "GammaPlusFlat": gamma_plus_flat,
    "GammaViT": gamma_vit,
}
DEFAULT = "EpsilonPlusFlat"


def parameters(name: str) -> dict[str, Any]:
    """A composite's parameters with their defaults."""
    return {p.name: p.default for p in signature(_factory(name)).parameters.values()}


def build(name: str, **values: Any) -> Composite:
    """A composite by name. Raises BadComposite for an unknown name or parameter."""
    factory = _factory(name)
    unknown = set(values) - set(signature(factory).parameters)
    if unknown:
        known = ", ".join(signature(factory).parameters)
        raise BadComposite(f"{name} has no parameter {', '.join(sorted(unknown))}. It takes: {known}.")
    return factory(**values)


def _factory(name: str) -> Callable[..., Composite]:
    if name not in COMPOSITES:
        raise BadComposite(f"There is no composite '{name}'. The composites are: {', '.join(COMPOSITES)}.")
    return COMPOSITES[name]
