"""Operators on quantized tensors: they compute on floats and round what comes out as the integers would be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion.errors import UnsupportedOperator
from models.formats.torchscript.packed import Packed
from models.formats.torchscript.program import Node
from models.formats.torchscript.quantized import RANGES, Quantized, plain, quantize
from models.opened import QUANTIZED

# Operators that hand on the values of a quantized tensor, and those that compute on them and round as it is rounded.
_MOVING = frozenset(
    f"aten::{name}"
    for name in """
    relu relu_ max_pool1d max_pool2d max_pool3d flatten reshape view permute transpose t contiguous clone detach
    squeeze unsqueeze slice select split chunk split_with_sizes narrow expand index_select unbind alias flip roll repeat
    dropout dropout_ feature_dropout channel_shuffle pixel_shuffle pixel_unshuffle upsample_nearest1d upsample_nearest2d
    upsample_nearest3d reflection_pad1d reflection_pad2d replication_pad2d unflatten movedim swapaxes to cpu amax amin
    """.split()
)
_ROUNDING = frozenset(
    f"aten::{name}"
    for name in """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d mean hardtanh hardtanh_
    relu6 relu6_ clamp clamp_ clamp_min clamp_max leaky_relu leaky_relu_ upsample_bilinear2d upsample_linear1d
    upsample_bicubic2d upsample_trilinear3d constant_pad_nd pad elu elu_ hardswish hardswish_ gelu
    """.split()
)
# Bounded functions answer by a scale of their own: (scale, zero point as quint8).
_BOUNDED = {
    "aten::sigmoid": (1 / 256, 0),
    "aten::hardsigmoid": (1 / 256, 0),
    "aten::tanh": (2 / 256, 128),
}

Operator = Callable[..., Any]
Registered = TypeVar("Registered", bound=Operator)
Run = Callable[[Node, Sequence[Any]], Any]
OPERATORS: dict[str, Operator] = {}


def operator(*kinds: str) -> Callable[[Registered], Registered]:
    """Registers a function of an operator's arguments as TorchScript gives them."""

    def register(function: Registered) -> Registered:
        OPERATORS.update(dict.fromkeys(kinds, function))
        return function

    return register


def handles(node: Node, values: Sequence[Any]) -> bool:
    """Whether an operator takes or makes quantized tensors."""
    if node.kind in OPERATORS and (
        not node.kind.startswith("aten::") or node.kind.startswith("aten::quantize")
    ):
        return True
    if any(isinstance(value, Quantized) for value in values):
        return True
    if node.kind == "aten::dequantize":
        return True
    return node.kind == "aten::cat" and any(
        isinstance(item, Quantized) for value in values if isinstance(value, list) for item in value
    )


def call(node: Node, values: Sequence[Any], run: Run, layer: str) -> Any:
    """An operator on quantized tensors; `run` calls operators on floats. Raises UnsupportedOperator."""
    found = OPERATORS.get(node.kind)
    if found is not None:
        return found(*values)
    first = next((value for value in values if isinstance(value, Quantized)), None)
    if first is None:
        raise UnsupportedOperator(node.kind, layer)
    if node.kind in _MOVING | _ROUNDING:
        result = run(node, [plain(value) for value in values])
        wrap = first.moved if node.kind in _MOVING else first.rounded
        return [wrap(part) for part in result] if isinstance(result, list | tuple) else wrap(result)
    kind = node.kind.rstrip("_")
    if kind in _BOUNDED:
        scale, zero = _BOUNDED[kind]
        shift = 128 if first.dtype == torch.qint8 else 0
        return quantize(run(node, [plain(value) for value in values]), scale, zero - shift, first.dtype)
    raise UnsupportedOperator(f"{node.kind} of quantized values", layer)


def notes(nodes: Iterable[Node]) -> list[str]:
    """What a user should know of a script that quantizes."""
    kinds = {node.kind for node in nodes}
    if not any(kind.startswith(("quantized::", "aten::quantize_per")) for kind in kinds):
        return []
    said = [QUANTIZED]
    return said if not any("dynamic" in kind for kind in kinds) else [*said, "activations are not rounded"]


_CODES = {12: torch.qint8, 13: torch.quint8, 14: torch.qint32}


@operator("aten::quantize_per_tensor")
def _per_tensor(x: Any, scale: Any, zero: Any, dtype: int) -> Any:
    return quantize(plain(x), scale, zero, _CODES[dtype])


@operator("aten::quantize_per_channel")
def _per_channel(x: Any, scales: Tensor, zeros: Tensor, axis: int, dtype: int) -> Quantized:
    return quantize(plain(x), scales, zeros, _CODES[dtype], axis)


@operator("aten::quantize_per_tensor_dynamic")
def _by_range(x: Tensor, dtype: int, reduce_range: bool) -> Quantized:
    return Quantized(x, None, None, _CODES[dtype])


@operator("aten::dequantize")
def _dequantize(x: Any) -> Any:
    return [plain(item) for item in x] if isinstance(x, list) else plain(x)


@operator("aten::q_scale")
def _scale(x: Quantized) -> Any:
    return x.scale


@operator("aten::q_zero_point")
def _zero_point(x: Quantized) -> Any:
    return x.zero


def _layer(
    apply: Callable[[Packed, Tensor], Tensor], after: Callable[[Tensor], Tensor] | None = None
) -> Operator:
    """A layer with packed weights, what follows it in one step, and the rounding of its output."""

    def run(x: Quantized, packed: Packed, scale: Any, zero: Any) -> Quantized:
        y = apply(packed, x.value)
        return quantize(y if after is None else after(y), scale, zero, x.dtype)

    return run


def _dynamic(
    apply: Callable[[Packed, Tensor], Tensor], after: Callable[[Tensor], Tensor] | None = None
) -> Operator:
    def run(x: Tensor, packed: Packed, reduce_range: bool = False) -> Tensor:
        y = apply(packed, x)
        return y if after is None else after(y)

    return run


for _name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
    operator(f"quantized::{_name}")(_layer(Packed.convolution))
    operator(f"quantized::{_name}_relu")(_layer(Packed.convolution, F.relu))
    operator(f"quantized::{_name}_dynamic")(_dynamic(Packed.convolution))
operator("quantized::linear")(_layer(Packed.linear))
operator("quantized::linear_relu")(_layer(Packed.linear, F.relu))
operator("quantized::linear_tanh")(_layer(Packed.linear, torch.tanh))
operator("quantized::linear_dynamic", "quantized::linear_dynamic_fp16")(_dynamic(Packed.linear))
operator("quantized::linear_relu_dynamic", "quantized::linear_relu_dynamic_fp16")(
    _dynamic(Packed.linear, F.relu)
)


@operator("quantized::linear_leaky_relu")
def _linear_leaky_relu(x: Quantized, packed: Packed, scale: Any, zero: Any, slope: float) -> Quantized:
    return quantize(F.leaky_relu(packed.linear(x.value), slope), scale, zero, x.dtype)


@operator("quantized::conv2d_add")
def _conv_add(x: Quantized, other: Quantized, packed: Packed, scale: Any, zero: Any) -> Quantized:
    return quantize(packed.convolution(x.value) + other.value, scale, zero, x.dtype)


@operator("quantized::conv2d_add_relu")
def _conv_add_relu(x: Quantized, other: Quantized, packed: Packed, scale: Any, zero: Any) -> Quantized:
    return quantize(F.relu(packed.convolution(x.value) + other.value), scale, zero, x.dtype)


@operator("quantized::conv2d_prepack", "quantized::conv3d_prepack", "quantized::conv_prepack")
def _pack_convolution(
    weight: Quantized, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Packed:
    return Packed(weight.value, bias, stride, padding, dilation, groups)


@operator("quantized::linear_prepack")
def _pack_linear(weight: Quantized, bias: Tensor | None = None) -> Packed:
    return Packed(weight.value, bias)


def _binary(compute: Callable[[Tensor, Tensor], Tensor], number: Operator, relu: bool = False) -> Operator:
    """A function of two tensors, rounded; `number` is what becomes of it with a number for the second."""

    def run(a: Quantized, b: Any, scale: Any = None, zero: Any = None) -> Any:
        if not isinstance(b, Quantized):
            return number(a, b)
        y = compute(a.value, b.value)
        return quantize(F.relu(y) if relu else y, scale, zero, a.dtype)

    return run


@operator("quantized::add_scalar")
def _add_number(x: Quantized, number: float) -> Quantized:
    """As torch does it (aten/src/ATen/native/quantized/cpu/qadd.cpp): the number in steps shifts the zero point; where
    that leaves the range, the scale grows."""
    low, high = RANGES[x.dtype]
    steps = round(number / x.scale)
    zero, y = x.zero - steps, x.value + steps * x.scale
    if low <= zero <= high:
        return Quantized(y, x.scale, zero, x.dtype)
    end, bound = (high, low) if zero < low else (low, high)
    scale = abs(end - zero) / (high - low) * x.scale
    return quantize(y, scale, bound, x.dtype)


@operator("quantized::mul_scalar")
def _times_number(x: Quantized, number: float) -> Quantized:
    """The scale takes the number; a negative one turns the range around."""
    low, high = RANGES[x.dtype]
    if number == 0:
        return Quantized(x.value * 0, 1.0, 0, x.dtype)
    zero = x.zero if number > 0 else high - (x.zero - low)
    return Quantized(x.value * number, x.scale * abs(number), zero, x.dtype)


@operator("quantized::add_scalar_relu")
def _add_number_relu(x: Quantized, number: float) -> Quantized:
    y = _add_number(x, number)
    return y.moved(F.relu(y.value))


@operator("quantized::mul_scalar_relu")
def _times_number_relu(x: Quantized, number: float) -> Quantized:
    y = _times_number(x, number)
    return y.moved(F.relu(y.value))


operator("quantized::add")(_binary(torch.add, _add_number))
operator("quantized::mul")(_binary(torch.mul, _times_number))
operator("quantized::add_relu")(_binary(torch.add, _add_number_relu, relu=True))
operator("quantized::mul_relu")(_binary(torch.mul, _times_number_relu, relu=True))
operator("quantized::matmul")(_binary(torch.matmul, _times_number))


@operator("quantized::cat", "aten::cat")
def _cat(parts: Sequence[Quantized], axis: int = 0, scale: Any = None, zero: Any = None) -> Quantized:
    first = parts[0]
    scale, zero = (first.scale, first.zero) if scale is None else (scale, zero)
    return quantize(torch.cat([part.value for part in parts], axis), scale, zero, first.dtype)


@operator("quantized::cat_relu")
def _cat_relu(parts: Sequence[Quantized], axis: int, scale: Any = None, zero: Any = None) -> Quantized:
    y = _cat(parts, axis, scale, zero)
    return y.moved(F.relu(y.value))


def _function(compute: Callable[..., Tensor], given: int = 0) -> Operator:
    """A function of one tensor whose output's scale and zero point come behind so many arguments of its own."""

    def run(x: Quantized, *values: Any) -> Quantized:
        own, (scale, zero, *more) = values[:given], values[given:]
        return quantize(compute(x.value, *own, *more), scale, zero, x.dtype)

    return run


operator("quantized::sigmoid")(_function(torch.sigmoid))
operator("quantized::hardswish")(_function(F.hardswish))
operator("quantized::softmax")(_function(torch.softmax, given=1))
operator("quantized::celu")(_function(lambda x, alpha=1.0: F.celu(x, alpha)))
operator("quantized::elu")(
    _function(
        lambda x, alpha=1.0, scale=1.0, input_scale=1.0: torch.ops.aten.elu(x, alpha, scale, input_scale)
    )
)
operator("quantized::leaky_relu")(_function(lambda x, slope, _=False: F.leaky_relu(x, slope), given=2))
operator("quantized::prelu")(_function(lambda x, weight: F.prelu(x, plain(weight)), given=1))
operator("quantized::dropout")(_function(lambda x, p=0.5, training=False: x))
operator("quantized::layer_norm")(_function(torch.layer_norm, given=4))
operator("quantized::group_norm")(
    _function(lambda x, n, w, b, eps: torch.group_norm(x, n, w, b, eps), given=4)
)
operator("quantized::instance_norm")(
    _function(lambda x, w, b, eps: F.instance_norm(x, weight=w, bias=b, eps=eps), given=3)
)


def _batch_norm(relu: bool) -> Operator:
    def compute(x: Tensor, weight: Any, bias: Any, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        return F.relu(y) if relu else y

    return _function(compute, given=5)


for _name in ("batch_norm", "batch_norm1d", "batch_norm2d", "batch_norm3d"):
    operator(f"quantized::{_name}")(_batch_norm(relu=False))
    operator(f"quantized::{_name}_relu")(_batch_norm(relu=True))


@operator("quantized::relu6")
def _relu6(x: Quantized, inplace: bool = False) -> Quantized:
    return x.rounded(F.relu6(x.value))


@operator("quantized::clamp")
def _clamp(x: Quantized, low: Any = None, high: Any = None) -> Quantized:
    return x.rounded(torch.clamp(x.value, low, high))


@operator("quantized::threshold")
def _threshold(x: Quantized, threshold: float, value: float) -> Quantized:
    return x.rounded(F.threshold(x.value, threshold, value))


@operator("quantized::max_pool2d")
def _max_pool(x: Quantized, *settings: Any) -> Quantized:
    return x.moved(torch.ops.aten.max_pool2d(x.value, *settings))
