"""Core ATen back to the operators that rules and folds hang on: what `ExportedProgram.run_decompositions` renames.

Its operators compute the same under other names (`native_layer_norm`, `_softmax`), some with results that only a
backward pass reads. What it spells out in several nodes is recognized once shapes are known (`fusion.recognition`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from fusion.network import Network
from fusion.normalize import argument, as_linear, emit, rewrite, undo_transpose

aten = torch.ops.aten


def _results(node: fx.Node) -> Iterable[tuple[int, fx.Node]]:
    """(position, node) of the results that are read of an operator that has several."""
    # A program that was stored names all of them, read or not.
    readers = (user for user in node.users if user.target is operator.getitem and user.users)
    return [(user.args[1], user) for user in readers]  # type: ignore[misc]


def _given(node: fx.Node, *names: str) -> tuple[Any, ...]:
    return tuple(argument(node, name) for name in names)


def _first(network: Network, node: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Let another operator give the first result, where no other one is read."""
    results = _results(node)
    if any(position != 0 for position, _ in results):
        return
    value = emit(network, node, target, *args)
    value.kwargs = kwargs
    for _, user in results:
        value.meta = {**user.meta}
        user.replace_all_uses_with(value)


# --- normalizations: the second and third results are statistics ------------------------------------------------------
@rewrite("native_layer_norm")
def _layer_norm(network: Network, node: fx.Node) -> None:
    given = _given(node, "input", "normalized_shape", "weight", "bias", "eps")
    _first(network, node, aten.layer_norm.default, *given)


@rewrite("native_group_norm")
def _group_norm(network: Network, node: fx.Node) -> None:
    given = _given(node, "input", "group", "weight", "bias", "eps")
    _first(network, node, aten.group_norm.default, *given)


@rewrite("_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "native_batch_norm")
def _batch_norm(network: Network, node: fx.Node) -> None:
    tensors = _given(node, "input", "weight", "bias", "running_mean", "running_var")
    training, numbers = argument(node, "training", False), _given(node, "momentum", "eps")
    _first(network, node, aten.batch_norm.default, *tensors, training, *numbers, False)


# --- softmax and pools ------------------------------------------------------------------------------------------------
@rewrite("_softmax", "_log_softmax")
def _softmax(network: Network, node: fx.Node) -> fx.Node | None:
    twins = {aten._softmax.default: aten.softmax.int, aten._log_softmax.default: aten.log_softmax.int}
    twin = twins.get(node.target)  # type: ignore[call-overload]
    x, axis, widened = _given(node, "self", "dim", "half_to_float")
    return None if twin is None or widened else emit(network, node, twin, x, axis)


@rewrite("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def _adaptive_pool(network: Network, node: fx.Node) -> fx.Node:
    flat = node.target is aten._adaptive_avg_pool2d.default
    twin = aten.adaptive_avg_pool2d.default if flat else aten.adaptive_avg_pool3d.default
    return emit(network, node, twin, *node.args)


@rewrite("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool(network: Network, node: fx.Node) -> None:
    flat = node.target is aten.max_pool2d_with_indices.default
    _first(network, node, aten.max_pool2d.default if flat else aten.max_pool3d.default, *node.args)


# --- attention: kernels of one processor or another -------------------------------------------------------------------
@rewrite(
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(network: Network, node: fx.Node) -> None:
    quantized = getattr(node.target, "_overloadname", "") != "default"
    if quantized or argument(node, "dropout_p", 0.0) or argument(node, "enable_gqa", False):
        return
    inputs = _given(node, "query", "key", "value")
    mask = argument(node, "attn_mask", argument(node, "attn_bias"))
    causal, scale = argument(node, "is_causal", False), argument(node, "scale")
    twin = aten.scaled_dot_product_attention.default
    _first(network, node, twin, *inputs, mask, 0.0, causal, scale=scale)


# --- arithmetic -------------------------------------------------------------------------------------------------------
@rewrite("clamp")
def _clamp(network: Network, node: fx.Node) -> fx.Node | None:
    """Bounds that stand in two nodes are one pair."""
    if node.target is not aten.clamp.default:
        return None
    source, low, high = node.args[0], argument(node, "min"), argument(node, "max")
    inner = isinstance(source, fx.Node) and source.op == "call_function"
    if low is None and inner and source.target is aten.clamp_min.default:  # type: ignore[union-attr]
        return emit(network, node, aten.clamp.default, source.args[0], source.args[1], high)  # type: ignore[union-attr]
    if high is None:
        return emit(network, node, aten.clamp_min.default, source, low)
    return None


@rewrite("clamp_max")
def _clamp_max(network: Network, node: fx.Node) -> fx.Node | None:
    """An upper bound alone is a pair without the lower one."""
    if node.target is not aten.clamp_max.default:
        return None
    return emit(network, node, aten.clamp.default, node.args[0], None, node.args[1])


@rewrite("sub")
def _number_less(network: Network, node: fx.Node) -> fx.Node | None:
    """1 - x, a number less a tensor."""
    number, x = node.args[:2]
    if isinstance(number, fx.Node) or not isinstance(x, fx.Node) or argument(node, "alpha", 1) != 1:
        return None
    return emit(network, node, aten.rsub.Scalar, x, number)


# --- products ---------------------------------------------------------------------------------------------------------
@rewrite("bmm")
def _by_one_matrix(network: Network, node: fx.Node) -> fx.Node | None:
    """A batch of matrices times one constant matrix, repeated for each, is a linear layer. (Before constants are
    folded: the copies would be.)"""
    x, repeated = node.args[:2]
    matrix = _unrepeated(repeated)
    return None if matrix is None else as_linear(network, node, x, matrix)


def _unrepeated(node: Any) -> fx.Node | None:
    """The matrix M where the node is a batch of copies of M."""
    while isinstance(node, fx.Node) and node.target is aten.reshape.default:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.expand.default:
        return None
    matrix: Any = node.args[0]
    constant = undo_transpose(matrix) or matrix
    return matrix if isinstance(constant, fx.Node) and constant.op == "get_attr" else None
