"""Reductions over axes, given as an attribute in old opsets and as an input in new ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value, ints


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


@operator(*_REDUCTIONS, static=(1,))
def reduce(node: Node, x: Tensor, axes: Value | None = None) -> Tensor:
    chosen = list(node.get("axes", ())) if axes is None else ints(axes, f"The axes of {node.op}")
    if not chosen and node.get("noop_with_empty_axes", 0):
        return x
    return _REDUCTIONS[node.op](x, chosen or list(range(x.ndim)), bool(node.get("keepdims", 1)))


@operator("ArgMax", "ArgMin")
def arg_extreme(node: Node, x: Tensor) -> Tensor:
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    run = torch.argmax if node.op == "ArgMax" else torch.argmin
    if not node.get("select_last_index", 0):
        return run(x, axis, keepdim=keep)
    return torch.rsub(run(x.flip(axis), axis, keepdim=keep), x.shape[axis] - 1)


@operator("CumSum", since=11, static=(1,))
def cumsum(node: Node, x: Tensor, axis: Value) -> Tensor:
    dim = ints(axis, "The axis of CumSum")[0]
    y = x.flip(dim) if node.get("reverse", 0) else x
    total = torch.cumsum(y, dim)
    if node.get("exclusive", 0):
        total = total - y
    return total.flip(dim) if node.get("reverse", 0) else total


@operator("TopK", since=10, static=(1,))
def topk(node: Node, x: Tensor, k: Value) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(
        x,
        ints(k, "The k of TopK")[0],
        node.get("axis", -1),
        bool(node.get("largest", 1)),
        bool(node.get("sorted", 1)),
    )
    return values, indices
