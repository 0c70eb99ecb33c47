"""The surrogate of every operator that is no linear layer: most need none, the rest are a few lines each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from fusion.affine import RUNNING, affine_node, along
from fusion.centred import centred_activation
from fusion.errors import UnsupportedOperator
from fusion.network import is_size_arithmetic, op_name
from fusion.normalize import argument
from lrp.batch_norm import propagation
from lrp.graft import passed, ratio, received, relative_ratio, share
from lrp.held import factors_of, held_factors
from lrp.surrogate import Builder, is_code, operator_rule
from lrp.ties import threshold

aten = torch.ops.aten


# --- operators whose gradient is the rule: linear or positively homogeneous in all that they read --------------------
@operator_rule(
    "relu", "leaky_relu", "prelu", "rrelu", "abs", "neg", "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "sum", "reshape", "flatten", "unflatten", "permute", "transpose", "t",
    "squeeze", "unsqueeze", "expand", "slice", "select", "narrow", "split", "split_with_sizes", "chunk",
    "unbind", "getitem", "flip", "roll", "index_select", "pixel_shuffle", "pixel_unshuffle", "unfold", "im2col",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "repeat", "tile", "to", "_to_copy", "gather", "movedim", "diagonal",
    "swapaxes", "swapdims", "cumsum", "index", "repeat_interleave", "channel_shuffle", "rot90", "tril", "triu",
    "reflection_pad3d", "replication_pad3d", "upsample_nearest1d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_trilinear3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip
def _homogeneous(builder: Builder, node: fx.Node) -> fx.Node:
    others = [n for n in node.all_input_nodes if n is not node.args[0] and builder.depends(n)]
    if not all(is_code(n) for n in others):
        raise _unsupported(node)  # slopes computed from the image
    return builder.copied(node)


@operator_rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
               "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "mean")  # fmt: skip
def _average(builder: Builder, node: fx.Node) -> fx.Node:
    return _norm(builder, node, builder.copied(node))


@operator_rule("add", "sub", "rsub", "cat", "concat", "stack", "maximum", "minimum")
def _sum_or_choice(builder: Builder, node: fx.Node) -> fx.Node:
    centred = centred_activation(builder.network, node)
    if centred is not None:
        return _activated(builder, node, centred.args[0])  # type: ignore[arg-type]
    if op_name(node) in ("maximum", "minimum") and (tied := threshold(builder, node)) is not None:
        return tied
    # a + b hands a to a and b to b; constants keep their part.
    joined = op_name(node) in ("cat", "concat", "stack")
    like = None if joined else next(builder.values[n] for n in node.all_input_nodes if builder.depends(n))

    def value(n: fx.Node) -> fx.Node:
        constant = not builder.depends(n) and not is_size_arithmetic(n)
        return (
            builder.sink(node, builder.values[n], like, builder.place(n) if joined else None)
            if constant
            else builder.values[n]
        )

    total = builder.copied(node, value)
    numbers = [a for a in node.args if isinstance(a, int | float) and not isinstance(a, bool)]
    if op_name(node) in ("add", "sub", "rsub") and numbers and any(numbers):
        # A plain number is a bias too: x + 3 keeps 3 g.
        (source,) = (n for n in node.all_input_nodes if builder.depends(n))
        sign = -argument(node, "alpha", 1) if op_name(node) == "rsub" else 1
        carrier = (
            builder.values[source]
            if sign == 1
            else builder.emit(aten.mul.Tensor, builder.values[source], sign)
        )
        return builder.graft(node, total, [carrier], [None])
    if op_name(node) == "add" and builder.composite.sums == "ratio" and _is_residual(builder, node):
        a, b = (builder.values[n] for n in node.args)  # type: ignore[index]
        da, db = builder.detached(a), builder.detached(b)
        return builder.graft(
            node, total, [a, b], [builder.emit(own_share, da, db), builder.emit(own_share, db, da)]
        )
    return _norm(builder, node, total) if op_name(node) == "add" else total


def _is_residual(builder: Builder, node: fx.Node) -> bool:
    """Whether a sum is that of two signals of one shape, as behind a skip connection."""
    terms = [n for n in node.args if builder.depends(n)]
    return (
        len(node.args) == 2
        and len(terms) == 2
        and not node.kwargs
        and len({tuple(n.meta["shape"]) for n in terms}) == 1  # type: ignore[union-attr]
    )


def own_share(a: Tensor, b: Tensor) -> Tensor:
    """The multiplier of a that hands it |a| / (|a| + |b|) of the relevance of a + b (Otsuki et al. 2024)."""
    return ratio(a.sign() * (a + b), a.abs() + b.abs())


@operator_rule("constant_pad_nd", "pad")
def _pad(builder: Builder, node: fx.Node) -> fx.Node:
    value = argument(node, "value", 0)
    mode = argument(node, "mode", "constant")
    # What is padded with infinity wins no maximum, and infinity times no relevance would be no number.
    if mode == "constant" and value and math.isfinite(value):
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        zero_padded = builder.emit(aten.constant_pad_nd.default, builder.values[source], node.args[1], 0)
        return builder.graft(node, builder.copied(node), [zero_padded], [None])
    return builder.copied(node)


@operator_rule("where")
def _where(builder: Builder, node: fx.Node) -> fx.Node:
    condition, *choices = node.args
    like = next(builder.values[n] for n in choices if isinstance(n, fx.Node) and builder.depends(n))
    return builder.copied(
        node,
        lambda n: (
            builder.values[n]
            if builder.depends(n) or n is condition
            else builder.sink(node, builder.values[n], like)
        ),
    )


def _norm(builder: Builder, node: fx.Node, value: fx.Node) -> fx.Node:
    """The Norm rule's stabilizer, a_i / stab(sum a) R, where the composite asks for one."""
    if not builder.composite.norm_epsilon:
        return value
    epsilon, fixed = builder.composite.norm_epsilon, builder.detached(value)
    if not builder.composite.norm_relative:
        return builder.graft(node, value, [value], [builder.emit(ratio, fixed, fixed, epsilon)])
    factor = builder.emit(relative_ratio, fixed, fixed, epsilon, builder.x, builder.place(node))
    return builder.graft(node, value, [value], [factor])


# --- element-wise activations: relevance passes unchanged, so the multiplier is f(x)/x --------------------------------
@operator_rule(
    "relu6", "hardtanh", "sigmoid", "hardsigmoid", "tanh", "gelu", "silu", "hardswish", "mish", "elu", "celu", "selu",
    "softplus", "softsign", "softshrink", "hardshrink", "threshold", "clamp", "clamp_min", "clamp_max", "erf", "exp",
    "sqrt", "log", "sin", "cos", "round",
)  # fmt: skip
def _activation(builder: Builder, node: fx.Node) -> fx.Node:
    return _activated(builder, node, node.args[0])  # type: ignore[arg-type]


def _activated(builder: Builder, node: fx.Node, source: fx.Node) -> fx.Node:
    """f(x) with the multiplier f(x)/x, x being the value at `source`."""
    x = builder.values[source]
    value = builder.copied(node, lambda n: builder.detached(builder.values[n]))
    factor = builder.emit(ratio, value, builder.detached(x))
    return builder.graft(node, value, [x], [factor])


# --- products ---------------------------------------------------------------------------------------------------------
@operator_rule("mul", "matmul", "bmm", "mm", "mv", "dot", "einsum")
def _product(builder: Builder, node: fx.Node) -> fx.Node:
    """One factor constant: linear. A gate, attention weights or the inverse of a statistic times a signal: all to the
    signal (CP-LRP, Ali et al. 2022; signal-only gate, Pahde et al. 2023; `lrp.held`), unless the composite says
    otherwise. N signals: a share of 1/N each (Achtibat et al. 2024, prop. 3.2-3.3)."""
    factors = [a for a in factors_of(node) if builder.depends(a)]
    if len(factors) < 2:
        return builder.copied(node)
    constant = [] if builder.opened(node) else held_factors(builder.network, node)
    if constant:
        return builder.copied(
            node, lambda n: builder.detached(builder.values[n]) if n in constant else builder.values[n]
        )
    value = builder.copied(node)
    part = builder.emit(torch.full_like, builder.detached(value), 1 / len(factors))
    return builder.graft(node, value, [value], [part], degree=len(factors))


@operator_rule("pow", "square")
def _power(builder: Builder, node: fx.Node) -> fx.Node:
    exponent = 2 if op_name(node) == "square" else node.args[1]
    if isinstance(exponent, int | float) and exponent > 0:
        # x^p is homogeneous of degree p.
        value = builder.copied(node)
        x = builder.values[node.args[0]]  # type: ignore[index]
        factor = builder.emit(ratio, builder.detached(value), builder.detached(x))
        return builder.graft(node, builder.detached(value), [x], [factor])
    raise _unsupported(node)


@operator_rule("div")
def _quotient(builder: Builder, node: fx.Node) -> fx.Node:
    """What is divided keeps its relevance; a divisor that depends on the input is a statistic, held constant."""
    if not builder.depends(node.args[0]):
        raise _unsupported(node)
    dividend, divisor = node.args[:2]  # by place: they may be the same tensor
    below: Any = fx.node.map_arg(divisor, lambda n: builder.values[n])
    if builder.depends(divisor):
        below = builder.detached(below)
    above = builder.values[dividend]  # type: ignore[index]
    return builder.emit(node.target, above, below, *node.args[2:], **node.kwargs)  # type: ignore[arg-type]


@operator_rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(builder: Builder, node: fx.Node) -> fx.Node:
    """R_i = x_i (R_i - s_i sum_j R_j), the gradient (Achtibat et al. 2024, prop. 3.1); it does not conserve."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    place = builder.place(node)
    x = builder.emit(passed, builder.recorder, builder.key(node), builder.values[source], place)
    value = builder.copied(node, lambda n: x if n is source else builder.values[n])
    return builder.emit(received, builder.recorder, builder.key(node), value, place)


@operator_rule("scaled_dot_product_attention")
def _attention(builder: Builder, node: fx.Node) -> fx.Node:
    """Attention weights held constant, relevance through the values alone (CP-LRP, Ali et al. 2022).

    Or, as two products around a softmax, half of the gradient to the values and a quarter to queries and keys (AttnLRP,
    Achtibat et al. 2024, in the form of Arras et al. 2025, arXiv:2502.15886). The softmax does not conserve: its node
    keeps the rest."""
    query, key, value, *rest = node.args  # by place: they may be the same tensor
    if not builder.opened(node):
        frozen = [builder.detached(builder.values[n]) for n in (query, key)]  # type: ignore[index]
        args, kwargs = fx.node.map_arg(((value, *rest), dict(node.kwargs)), lambda n: builder.values[n])
        return builder.emit(node.target, *frozen, *args, **kwargs)  # type: ignore[arg-type]

    def part(n: fx.Node, amount: float) -> fx.Node:
        x = builder.values[n]
        if not builder.depends(n):
            return x
        taken = builder.emit(passed, builder.recorder, builder.key(node), x, builder.place(n))
        return builder.emit(share, taken, amount)

    shares = [part(n, amount) for n, amount in ((query, 0.25), (key, 0.25), (value, 0.5))]  # type: ignore[arg-type]
    # A bias of the weights that is computed from the image stands in the first product's sum.
    args, kwargs = fx.node.map_arg((tuple(rest), dict(node.kwargs)), lambda n: part(n, 0.5))
    answer = builder.emit(node.target, *shares, *args, **kwargs)  # type: ignore[arg-type]
    return builder.emit(received, builder.recorder, builder.key(node), answer, builder.place(node))


# --- normalizations that fusion could not fold ------------------------------------------------------------------
@operator_rule("batch_norm", "instance_norm")
def _kept_affine(builder: Builder, node: fx.Node) -> fx.Node:
    """A batch norm that stays, y = s x + t: by the rule that the composite names (`lrp.batch_norm`)."""
    if not RUNNING[op_name(node)](node):
        if op_name(node) == "instance_norm":
            return _statistics(builder, node, axes=list(range(2, len(node.meta["shape"]))))
        raise UnsupportedOperator(
            "aten::batch_norm", str(node.meta.get("layer")),
            "It uses the statistics of the batch at hand, so an image's answer depends on its neighbours; give it "
            "running statistics (track_running_stats=True) and export the network in evaluation mode.",
        )  # fmt: skip
    bn = affine_node(builder.network, node)
    vectors = None if bn is None else bn.coefficients.vector(1)
    if bn is None or vectors is None:
        raise _unsupported(node)
    rule = propagation(builder.composite.batch_norm)
    source = bn.source
    if rule.through_relu and op_name(source) == "relu":
        source = source.args[0]  # type: ignore[assignment]
    x = builder.values[source]
    rank = len(node.meta["shape"])
    scale, shift = (
        builder.constant(f"{node.name}.{name}", along(vector, 1, rank).to(builder.network.dtype).contiguous())
        for name, vector in zip(("scale", "shift"), vectors, strict=True)
    )
    value = builder.copied(node, lambda n: builder.detached(builder.values[n]))
    factor = builder.emit(rule.multiplier, builder.detached(x), builder.detached(value), scale, shift)
    return builder.graft(node, value, [x], [factor])


def root_mean_square(x: Tensor, axes: list[int], eps: float) -> Tensor:
    """sqrt(mean x^2 + eps) as a number, in float32 at least, as torch's own norms have it; no number where a square
    leaves the type's range: x / inf would pass for an answer of zeros."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    power = wide.square().mean(axes, keepdim=True) + eps
    return torch.where(power.isinf(), math.nan, power).sqrt().to(x.dtype)


def centred(x: Tensor, axes: list[int], eps: float, weight: Tensor | None, groups: int = 0) -> Tensor:
    """(x - mean) / deviation * weight with the deviation held constant: what carries relevance in a normalization."""
    shape = x.shape
    if groups:
        x = x.reshape(shape[0], groups, -1)
        axes = [2]
    middle = x - x.mean(axes, keepdim=True)
    return (middle / root_mean_square(middle, axes, eps)).reshape(shape) * (1 if weight is None else weight)


def _statistics(
    builder: Builder, node: fx.Node, axes: list[int], channels: bool = True, groups: int = 0
) -> fx.Node:
    """The LN-rule (Ali et al. 2022): deviation held constant, centering linear, the shift keeps its part. Or identity:
    relevance passes unchanged (zennit's Pass)."""
    if builder.composite.normalization == "identity":
        return _activated(builder, node, node.args[0])  # type: ignore[arg-type]
    weight = argument(node, "weight")
    shaped = None
    if weight is not None:
        tensor = builder.network.constant(weight)
        if tensor is None:
            raise _unsupported(node)
        rank = len(node.meta["shape"])
        shaped = builder.constant(
            f"{weight.target}__shaped", tensor.reshape(-1, *[1] * (rank - 2)) if channels else tensor
        )
    value = builder.copied(node, lambda n: builder.detached(builder.values[n]))
    x = builder.values[node.args[0]]  # type: ignore[index]
    carrier = builder.emit(centred, x, axes, float(argument(node, "eps")), shaped, groups)
    return builder.graft(node, value, [carrier], [None])


@operator_rule("layer_norm")
def _layer_norm(builder: Builder, node: fx.Node) -> fx.Node:
    count = len(argument(node, "normalized_shape"))
    return _statistics(builder, node, axes=list(range(-count, 0)), channels=False)


def scaled(x: Tensor, axes: list[int], eps: float, weight: Tensor | None) -> Tensor:
    """x / rms(x) * weight with the root mean square held constant."""
    return x / root_mean_square(x, axes, eps) * (1 if weight is None else weight)


@operator_rule("rms_norm")
def _rms_norm(builder: Builder, node: fx.Node) -> fx.Node:
    """The LN-rule (Ali et al. 2022) where nothing is centred: the root mean square is held constant, so that relevance
    passes unchanged."""
    weight = argument(node, "weight")
    if weight is not None and builder.network.constant(weight) is None:
        raise _unsupported(node)
    eps = argument(node, "eps")
    if eps is None:  # as torch.nn.RMSNorm has it
        eps = torch.finfo(node.meta["dtype"]).eps
    axes = list(range(-len(argument(node, "normalized_shape")), 0))
    x = builder.values[node.args[0]]  # type: ignore[index]
    value = builder.copied(node, lambda n: builder.detached(builder.values[n]))
    carrier = builder.emit(scaled, x, axes, float(eps), None if weight is None else builder.values[weight])
    return builder.graft(node, value, [carrier], [None])


@operator_rule("group_norm")
def _group_norm(builder: Builder, node: fx.Node) -> fx.Node:
    return _statistics(builder, node, axes=[], groups=int(argument(node, "num_groups")))


def _unsupported(node: fx.Node) -> UnsupportedOperator:
    layer = str(node.meta.get("layer") or node.name)
    return UnsupportedOperator(
        f"aten::{op_name(node)}", layer, "There is no relevance rule for it in this place."
    )
