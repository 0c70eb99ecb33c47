"""Composites: which rule stands at which layer, under the field's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

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


@dataclass(frozen=True)
class Composite:
    """A rule for every linear layer of a network.

    convolution, linear: the rule for each kind of layer. first: the rule for layers that read the input directly
    (for convolutions only, where `first_convolutions_only`). overrides: (pattern, rule) pairs; the last one whose
    pattern matches the layer's name wins over everything else. norm_epsilon: the stabilizer at residual sums and
    average pools (the field's Norm rule; 0 lets the gradient do it exactly). batch_norm: the rule at batch norms that
    stay in the network, "magnitude", "identity" or "epsilon" (`lrp.batch_norm`).
    """

    name: str
    convolution: LinearRule
    linear: LinearRule
    first: AnyRule | None = None
    first_convolutions_only: bool = False
    overrides: tuple[tuple[str, AnyRule], ...] = field(default=())
    norm_epsilon: float = 0.0
    batch_norm: BatchNormRule = "magnitude"

    def override(self, rules: Mapping[str, AnyRule]) -> Composite:
        """The same composite with other rules at the layers whose names match the given names or glob patterns."""
        return replace(self, overrides=(*self.overrides, *rules.items()))

    def resolve(
        self, layers: Sequence[LinearLayer], readers_of_input: set[LinearLayer]
    ) -> dict[LinearLayer, AnyRule]:
        """The rule of every layer. Raises BadComposite for an override that matches nothing, or for an input rule
        at a layer that does not read the input."""
        for pattern, _ in self.overrides:
            if not any(_matches(layer, pattern) for layer in layers):
                known = ", ".join(layer.name for layer in layers[:8]) + (", ..." if len(layers) > 8 else "")
                raise BadComposite(
                    f"The override '{pattern}' matches no linear layer. The layers are: {known}."
                )
        resolved = {layer: self._rule(layer, layer in readers_of_input) for layer in layers}
        for layer, rule in resolved.items():
            if isinstance(rule, InputRule) and layer not in readers_of_input:
                raise BadComposite(
                    f"{type(rule).__name__} is a rule for layers that read the network's input; '{layer.name}' does "
                    "not. Use Epsilon, Gamma, ZPlus or AlphaBeta there."
                )
        return resolved

    def _rule(self, layer: LinearLayer, reads_input: bool) -> AnyRule:
        for pattern, rule in reversed(self.overrides):
            if _matches(layer, pattern):
                return rule
        convolution = layer.kind != "linear"
        if reads_input and self.first is not None and (convolution or not self.first_convolutions_only):
            return self.first
        return self.convolution if convolution else self.linear

    def __str__(self) -> str:
        parts = [f"convolution {self.convolution}", f"linear {self.linear}"]
        parts += [f"first {self.first}"] if self.first else []
        parts += [f"{pattern} {rule}" for pattern, rule in self.overrides]
        parts += [f"batch norms {self.batch_norm}"] if self.batch_norm != "magnitude" else []
        return f"{self.name}: " + ", ".join(parts)


def _matches(layer: LinearLayer, pattern: str) -> bool:
    return fnmatchcase(layer.name, pattern) or layer.node.name == pattern


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


COMPOSITES: dict[str, Callable[..., Composite]] = {
    "EpsilonPlus": epsilon_plus,
    "EpsilonPlusFlat": epsilon_plus_flat,
    "EpsilonGammaBox": epsilon_gamma_box,
    "EpsilonAlpha2Beta1": epsilon_alpha2_beta1,
    "EpsilonAlpha2Beta1Flat": epsilon_alpha2_beta1_flat,
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
