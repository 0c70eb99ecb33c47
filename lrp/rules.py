"""The propagation rules for linear layers, each a small table that reads like its formula.

Notation: a_i inputs, w_ik weights, b_k bias, z_k = sum_i a_i w_ik + b_k outputs, R_k the relevance of output k,
(.)+ = max(0, .), (.)- = min(0, .), and stab(z) = z + epsilon sign(z) with sign(0) = +1. Conventions (which bias goes
into which denominator, the mask of gamma by the output's sign) are those that zennit's documentation and tests pin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

Modify: TypeAlias = Callable[[Tensor], Tensor]
InputPart = Literal["all", "positive", "negative"]
BiasMode = Literal["absorb", "omit", "redistribute"]


@dataclass(frozen=True)
class Weighting:
    """A modification of weights, named: `name` tells the constants of the surrogate graph apart."""

    name: str
    apply: Modify = field(compare=False)


SAME = Weighting("", lambda w: w)
MAGNITUDE = Weighting("magnitude", lambda w: w.abs())
PLUS = Weighting("plus", lambda w: w.clamp(min=0))
MINUS = Weighting("minus", lambda w: w.clamp(max=0))
SQUARE = Weighting("square", lambda w: w * w)
ONE = Weighting("one", lambda w: w.new_ones(w.shape))
ZERO = Weighting("zero", lambda w: w.new_zeros(w.shape))


def favour_positive(gamma: float) -> Weighting:
    """w + gamma w+"""
    return Weighting(_name("plus", gamma), lambda w: w + gamma * w.clamp(min=0))


def favour_negative(gamma: float) -> Weighting:
    """w + gamma w-"""
    return Weighting(_name("minus", gamma), lambda w: w + gamma * w.clamp(max=0))


def _name(side: str, gamma: float) -> str:
    # A dot would end an attribute's name.
    return f"{side}_{gamma!r}".replace(".", "p").replace("-", "m")


@dataclass(frozen=True)
class Branch:
    """One share of the relevance: coefficient * sum over terms of (input part)(weight) / stab(their sum + bias).

    terms: pairs of (part of the input, weighting). bias: what of the bias stands in the denominator.
    where: the outputs that this branch serves, by the sign of z_k.
    """

    terms: tuple[tuple[InputPart, Weighting], ...]
    bias: Weighting = SAME
    coefficient: float = 1.0
    where: Literal["all", "positive", "negative"] = "all"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules.

    epsilon: the stabilizer of the denominator; with relative=True a share of the root mean square of the layer's
    denominators, sample by sample. bias: what becomes of a bias's relevance (the forward pass always has biases).
    "absorb": it stands in the denominator and the bias keeps its share. "omit": it is left out of denominators, so
    that a rule's own shares are all of 1. "redistribute": it stands in the denominator, and its share goes to the
    inputs in proportion to |a_i w_ik|, which no cancellation among them can blow up (at input rules: as "omit").
    """

    epsilon: float = 1e-6
    relative: bool = False
    bias: BiasMode = "absorb"

    def __str__(self) -> str:
        values = ", ".join(
            f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self._shown().items()
        )
        return f"{type(self).__name__}({values})"

    def _shown(self) -> dict[str, object]:
        names = [name for name in self.__dataclass_fields__ if name not in ("epsilon", "relative", "bias")]
        shown: dict[str, object] = {name: getattr(self, name) for name in names}
        shown |= {"relative": True} if self.relative else {}
        return {**shown, **({"bias": self.bias} if self.bias != "absorb" else {})}


class LinearRule(Rule):
    """A rule that hands every input a multiple of its own value: it can stand at any layer."""

    def branches(self) -> tuple[Branch, ...]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LRP0(LinearRule):
    """R_i = sum_k a_i w_ik / z_k R_k (Bach et al. 2015, doi:10.1371/journal.pone.0130140). 0 where z_k = 0."""

    epsilon: float = 0.0

    def branches(self) -> tuple[Branch, ...]:
        return (Branch((("all", SAME),)),)


@dataclass(frozen=True)
class Epsilon(LinearRule):
    """R_i = sum_k a_i w_ik / stab(z_k) R_k (Bach et al. 2015, eq. 58)."""

    epsilon: float = 1e-6

    def branches(self) -> tuple[Branch, ...]:
        return (Branch((("all", SAME),)),)

    def _shown(self) -> dict[str, object]:
        return {"epsilon": self.epsilon, **super()._shown()}


@dataclass(frozen=True)
class Gamma(LinearRule):
    """Generalized gamma rule (Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10; for inputs of any sign
    Andeol et al. 2022, arXiv:2206.04401).

    z_k > 0: R_i = sum_k (a_i+ (w + g w+) + a_i- (w + g w-)) / stab(sum of these + b + g b+) R_k
    z_k < 0: R_i = sum_k (a_i+ (w + g w-) + a_i- (w + g w+)) / stab(sum of these + b + g b-) R_k
    """

    gamma: float = 0.25

    def branches(self) -> tuple[Branch, ...]:
        up, down = favour_positive(self.gamma), favour_negative(self.gamma)
        return (
            Branch((("positive", up), ("negative", down)), bias=up, where="positive"),
            Branch((("positive", down), ("negative", up)), bias=down, where="negative"),
        )


@dataclass(frozen=True)
class AlphaBeta(LinearRule):
    """R_i = sum_k (alpha (a_i w_ik)+ / stab(z_k+) - beta (a_i w_ik)- / stab(z_k-)) R_k with alpha - beta = 1 and
    z_k+ = sum_i (a_i w_ik)+ + b_k+, z_k- likewise (Bach et al. 2015, eq. 60)."""

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(
                f"AlphaBeta needs alpha, beta >= 0 with alpha - beta = 1, not {self.alpha}, {self.beta}"
            )

    def branches(self) -> tuple[Branch, ...]:
        positive = Branch((("positive", PLUS), ("negative", MINUS)), bias=PLUS, coefficient=self.alpha)
        negative = Branch((("positive", MINUS), ("negative", PLUS)), bias=MINUS, coefficient=-self.beta)
        return (positive, negative) if self.beta else (positive,)


@dataclass(frozen=True)
class ZPlus(LinearRule):
    """R_i = sum_k (a_i w_ik)+ / stab(sum_j (a_j w_jk)+ + b_k+) R_k (Montavon et al. 2017,
    doi:10.1016/j.patcog.2016.11.008; negative inputs count with negative weights)."""

    def branches(self) -> tuple[Branch, ...]:
        return (Branch((("positive", PLUS), ("negative", MINUS)), bias=PLUS),)


@dataclass(frozen=True)
class AbsLRP(LinearRule):
    """R_i = c sum_k (a_i w_ik + |a_i w_ik|) / |z_k| R_k, c such that the layer hands on all that it received, sample by
    sample (Vukadin et al. 2024, arXiv:2412.09311, who scale each layer's relevance to a sum of one: the same shares).
    Biases keep nothing, whatever `bias` says. Not additive in R: a contrast is not the difference of two maps."""

    def branches(self) -> tuple[Branch, ...]:
        return ZPlus().branches()


@dataclass(frozen=True)
class InputTerm:
    """One term of an input rule: sign * (values)(weight), values being the input, a bound of it, or one."""

    values: Literal["input", "low", "high", "one"]
    weight: Weighting
    sign: float = 1.0


class InputRule(Rule):
    """A rule that is no multiple of the input, for layers that read the network's input directly."""

    def terms(self) -> tuple[InputTerm, ...]:
        raise NotImplementedError

    def denominator_bias(self) -> Weighting:
        return ZERO


@dataclass(frozen=True)
class Flat(InputRule):
    """R_i = sum_k R_k / (number of inputs of k) (Lapuschkin et al. 2019, doi:10.1038/s41467-019-08987-4)."""

    def terms(self) -> tuple[InputTerm, ...]:
        return (InputTerm("one", ONE),)


@dataclass(frozen=True)
class WSquare(InputRule):
    """R_i = sum_k w_ik^2 / stab(sum_j w_jk^2 + b_k^2) R_k (Montavon et al. 2017)."""

    def terms(self) -> tuple[InputTerm, ...]:
        return (InputTerm("one", SQUARE),)

    def denominator_bias(self) -> Weighting:
        return SQUARE


@dataclass(frozen=True)
class ZBox(InputRule):
    """R_i = sum_k (a_i w_ik - l_i w_ik+ - h_i w_ik-) / stab(sum_j of these) R_k (Montavon et al. 2017).

    low, high: the bounds of the network's input in *its own* units (after mean and standard deviation), one number
    or one per channel.
    """

    low: float | tuple[float, ...] = -3.0
    high: float | tuple[float, ...] = 3.0

    def terms(self) -> tuple[InputTerm, ...]:
        return (InputTerm("input", SAME), InputTerm("low", PLUS, -1.0), InputTerm("high", MINUS, -1.0))


def bound(value: float | Sequence[float] | Tensor) -> float | tuple[float, ...]:
    """A bound of ZBox from a number, a sequence with one per channel, or a tensor [1, C, 1, 1]."""
    if isinstance(value, Tensor):
        value = [float(v) for v in value.flatten()]
    if isinstance(value, int | float):
        return float(value)
    return float(value[0]) if len(value) == 1 else tuple(float(v) for v in value)


AnyRule: TypeAlias = LinearRule | InputRule
