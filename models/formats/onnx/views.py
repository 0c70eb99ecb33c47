"""Gathers that only rearrange: torch's exporter writes `as_strided` as an index into the flattened tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor

from models.formats.onnx.batch import Batched, coefficients
from models.formats.onnx.patterns import Known
from models.formats.onnx.registry import Node
from models.formats.onnx.steps import Constant, Static, Step, Variable
from models.formats.onnx.values import numbers

# The index is affine in the batch size, so two sizes would do.
_TRIED = (2, 3, 7)


class _DependsOnImage(Exception):
    pass


def as_view(
    node: Node,
    known: Mapping[str, Known],
    values: Mapping[str, Any],
    steps: list[Step],
    free: SymInt,
    declared: int | None,
) -> tuple[Node, Batched] | None:
    """The reshape that a gather is, with its target; None where it does not pick everything in order."""
    if node.domain or node.op != "Gather" or node.get("axis", 0) != 0:
        return None
    x, name = values.get(node.inputs[0]), node.inputs[1]
    if not isinstance(x, Tensor) or x.ndim != 1:
        return None
    size = coefficients(x, free)
    if size is None:
        return None
    reshape = replace(node, op="Reshape", attributes={})
    if name in known:
        index = known[name].tensor
        # A constant index belongs to the batch that the file fixes.
        if declared is None or index.shape[0] != declared or not _in_order(index, size[0][0] * declared):
            return None
        return reshape, Batched((1, *index.shape[1:]), (0,))
    index = values[name]
    if not isinstance(index, Tensor):
        return None
    shape = coefficients(index, free)
    makers = {output: step for step in steps for output in step.node.outputs if output}
    each = size[0][0]
    try:
        ordered = all(_in_order(_at(name, n, values, makers, free, {}), each * n) for n in _TRIED)
    except _DependsOnImage:
        return None
    return (reshape, Batched(tuple(shape[0]), (shape[1],))) if ordered and shape is not None else None


def _in_order(index: Tensor, count: int) -> bool:
    return index.numel() == count and bool((index.reshape(-1) == torch.arange(count)).all())


def _at(
    name: str,
    batch: int,
    values: Mapping[str, Any],
    makers: Mapping[str, Step],
    free: SymInt,
    done: dict[str, Any],
) -> Any:
    """A value at one batch size, if it depends on nothing else; `done` has those that were computed before."""
    if name in done:
        return done[name]
    value = values[name]
    if not isinstance(value, Tensor):
        sizes = (_number(item, batch, free) for item in value.reshape(-1))
        return done.setdefault(name, numbers(sizes).reshape(value.shape))
    step = makers.get(name)
    if step is None:
        raise _DependsOnImage
    arguments = []
    for argument in step.arguments:
        match argument:
            case Variable(source):
                arguments.append(_at(source, batch, values, makers, free, done))
            case Constant(known):
                arguments.append(known.tensor)
            case Static(given):
                arguments.append(given)
            case Batched():
                arguments.append(numbers(argument.sizes(batch)))
    results = step.run(step.node, *arguments)
    found = results[step.node.outputs.index(name)] if isinstance(results, tuple) else results
    return done.setdefault(name, found)


def _number(item: Any, batch: int, free: SymInt) -> Any:
    return int(item.node.expr.subs(free.node.expr, batch)) if isinstance(item, SymInt | SymFloat) else item
