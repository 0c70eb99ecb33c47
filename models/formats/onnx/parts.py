"""Files that fix the batch and combine parts of the images (windows of an attention) with constants of as many rows.

Masks of shifted windows are such constants where an exporter folded them: with N images the parts are N times as many,
and each image's own meet the constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import SymInt, Tensor

from models.formats.onnx.batch import coefficients
from models.formats.onnx.lowering import Writer, finished
from models.formats.onnx.patterns import Known
from models.formats.onnx.registry import Node

_BY_ENTRY = frozenset(
    "Add Sub Mul Div Pow Max Min Where Equal Greater GreaterOrEqual Less LessOrEqual And Or".split()
)


def by_image(
    node: Node, known: dict[str, Known], values: Mapping[str, Any], free: SymInt, declared: int
) -> list[Node]:
    """The nodes in place of one: itself, but where its first axis holds the `declared` images' parts, and a constant
    has a row for each of them (as class tokens have that are put beside the images' own). Where the constant is not
    the same for all these images, nothing is changed.

    Images are taken to be the outer part of the axis, as everywhere but in tables [rows, features], which are let be.
    """
    if node.domain or node.op not in (*_BY_ENTRY, "Concat"):
        return [node]
    tensors = {name: values[name] for name in node.inputs if isinstance(values.get(name), Tensor)}
    shapes = {name: coefficients(x, free) for name, x in tensors.items()}
    first = next((shape for shape in shapes.values() if shape is not None), None)
    if first is None or first[1] != 0 or len(first[0]) < 3:
        return [node]
    parts, rank = first[0][0], len(first[0])
    alike = all(s is not None and (s[0][0], s[1], len(s[0])) == (parts, 0, rank) for s in shapes.values())
    rows = {
        name: row
        for name in node.inputs
        if name in known and (row := _of_one_image(known[name].tensor, parts, declared, rank)) is not None
    }
    if not alike or not rows or parts * declared == 1:
        return [node]
    if node.op == "Concat" and (parts > 1 or node.get("axis", 0) % rank == 0):
        return [node]  # one row is repeated for the images, several are not
    write = Writer(node, known, lambda name: known[name].tensor if name in known else values.get(name))
    inputs = []
    for name in node.inputs:
        if name in rows:
            inputs.append(write.constant(rows[name], name=known[name].name))
        elif name in tensors and parts > 1:
            target = [-1, parts, *shapes[name][0][1:]]  # type: ignore[index]
            inputs.append(write("Reshape", name, write.constant(target, torch.int64)))
        else:
            inputs.append(name)
    result = write(node.op, *inputs, opset=node.opset, **node.attributes)
    if parts > 1:
        others = [shape[0][1:] for shape in shapes.values() if shape is not None]
        rest = torch.broadcast_shapes(*others, *(row.shape[1:] for row in rows.values()))  # type: ignore[no-untyped-call]
        result = write("Reshape", result, write.constant([-1, *rest], torch.int64))
    return finished(write, result)


def _of_one_image(constant: Tensor, parts: int, declared: int, rank: int) -> Tensor | None:
    """What a constant holds for one image, [parts, ...]; None where it has no row for each image and part, or others
    for one image than for another."""
    if constant.ndim != rank or constant.shape[0] != parts * declared or constant.shape[0] == 1:
        return None
    images = constant.reshape(declared, parts, *constant.shape[1:])
    return images[0] if bool((images == images[:1]).all()) else None
