"""Reductions over axes, given as an attribute in old opsets and as an input in new ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.formats.onnx.registry import Node, operator
from models.formats.onnx.values import Value, ints


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _extreme(largest: bool) -> Callable[[Tensor, list[int], bool], Tensor]:
    def run(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in axes):
            # Of nothing: the least value of the type, or the greatest.
            chosen = {a % x.ndim for a in axes}
            sizes = [1 if i in chosen else s for i, s in enumerate(x.shape) if keep or i not in chosen]
            return torch.full(sizes, _limit(x.dtype, largest), dtype=x.dtype)
        if x.dtype == torch.bool:
            return run(x.to(torch.uint8), axes, keep).to(torch.bool)
        return x.amax(axes, keepdim=keep) if largest else x.amin(axes, keepdim=keep)

    return run


def _limit(kind: torch.dtype, largest: bool) -> Any:
    if kind == torch.bool:
        return not largest
    if kind.is_floating_point:
        return -math.inf if largest else math.inf
    return torch.iinfo(kind).min if largest else torch.iinfo(kind).max


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMax": _extreme(largest=True),
    "ReduceMin": _extreme(largest=False),
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


@operator("CumSum", "CumProd", since=11, static=(1,))
def cumulated(node: Node, x: Tensor, axis: Value) -> Tensor:
    dim = ints(axis, f"The axis of {node.op}")[0]
    backwards = bool(node.get("reverse", 0))
    x = x.flip(dim) if backwards else x
    run = torch.cumsum if node.op == "CumSum" else torch.cumprod
    total = run(x, dim, dtype=x.dtype)
    if node.get("exclusive", 0):  # each without itself: the one before, and nothing before the first
        first = torch.full_like(x.narrow(dim, 0, 1), 0 if node.op == "CumSum" else 1)
        total = torch.cat([first, total.narrow(dim, 0, x.shape[dim] - 1)], dim)
    return total.flip(dim) if backwards else total


@operator("TopK")
def topk_1(node: Node, x: Tensor) -> tuple[Tensor, Tensor]:
    return _largest(node, x, node.get("k"))


@operator("TopK", since=10, static=(1,))
def topk(node: Node, x: Tensor, k: Value) -> tuple[Tensor, Tensor]:
    return _largest(node, x, ints(k, "The k of TopK")[0])


def _largest(node: Node, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of equals the first, which torch.topk does not promise; the values as a gather, through which relevance flows."""
    axis = node.get("axis", -1)
    order = torch.sort(x, dim=axis, descending=bool(node.get("largest", 1)), stable=True)[1]
    indices = order.narrow(axis, 0, k)
    return torch.gather(x, axis, indices), indices
