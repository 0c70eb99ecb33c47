"""How relevance passes a batch norm that stays in the network: the field's three rules, by name.

Notation: y = s x + t per channel, R_x and R_y the relevance of its input and output. Relevance is value times gradient,
so a rule is a multiplier m with R_x = x (m g_y) where R_y = y g_y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from fusion.errors import BadComposite
from lrp.graft import ratio

BatchNormRule: TypeAlias = Literal["magnitude", "identity", "epsilon"]
CAPTUM_EPSILON = 1e-9


@dataclass(frozen=True)
class Propagation:
    """A rule as the surrogate graph needs it.

    multiplier: (x, y, s, t) -> m, s and t in the rank of x. through_relu: whether the rule hands relevance to what a
    ReLU in front of the batch norm read, even where that ReLU is closed; `x` is then the ReLU's input.
    """

    multiplier: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    through_relu: bool = False


def magnitude(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """R_x = |s x| / (|s x| + |t|) R_y (after Hui & Binder 2019, doi:10.1007/978-3-030-20518-8_24): the shift keeps its
    share, and m = |s| sign(x) y / (|s x| + |t|) never exceeds |s|."""
    product = scale * x
    return ratio(scale.abs() * x.sign() * (product + shift), product.abs() + shift.abs())


def identity(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """R_x = R_y, so m = y / x (zennit's Pass at batch norms, Anders et al. 2021, arXiv:2106.13200). Behind a ReLU, x is
    the ReLU's input: there the identity hands relevance to closed units too."""
    return ratio(y, x)


def epsilon(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """R_x = s x / stab(s x + t) R_y, so m = s y / stab(y) (captum's default at batch norms, with its epsilon of 1e-9;
    Kokhlikyan et al. 2020, arXiv:2009.07896): but for the stabilizer, the gradient. The shift keeps the rest."""
    return scale * ratio(y, y, CAPTUM_EPSILON)


PROPAGATIONS: dict[BatchNormRule, Propagation] = {
    "magnitude": Propagation(magnitude),
    "identity": Propagation(identity, through_relu=True),
    "epsilon": Propagation(epsilon),
}


def propagation(name: BatchNormRule) -> Propagation:
    """A rule by name. Raises BadComposite for a name that no rule has."""
    if name not in PROPAGATIONS:
        known = ", ".join(get_args(BatchNormRule))
        raise BadComposite(f"There is no rule '{name}' for batch norms. The rules are: {known}.")
    return PROPAGATIONS[name]
