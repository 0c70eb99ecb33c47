"""Networks with inputs beside the image: what the image alone decides can be explained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from fusion.errors import BadFile
from models.formats.onnx.file import Input, OnnxFile
from models.formats.onnx.images import Image

# The types of tensors as ONNX Runtime calls them.
KINDS: dict[str, Any] = {
    f"tensor({name})": kind
    for name, kind in (
        ("float", np.float32),
        ("float16", np.float16),
        ("double", np.float64),
        ("bool", np.bool_),
        ("string", np.str_),
        *(
            (f"{sign}int{bits}", np.dtype(f"{sign}int{bits}"))
            for sign in ("", "u")
            for bits in (8, 16, 32, 64)
        ),
    )
}


def asked(file: OnnxFile) -> tuple[Input, ...]:
    """The inputs that some node reads: converters leave others, which were constants once. All where none is read."""
    wanted = {name for node in file.nodes for name in node.inputs}.union(file.outputs)
    return tuple(input for input in file.inputs if input.name in wanted) or file.inputs


def alone(file: OnnxFile, image: Image) -> tuple[OnnxFile, tuple[str, ...]]:
    """The file with the image as its only input, and what is to be said of it.

    Flags (single truth values, as TensorFlow's "training") are false. Outputs that depend on another input (words, a
    second image) go. Raises BadFile where none is left.
    """
    flags = [other for other in image.others if _is_flag(other)]
    rest = [other.name for other in image.others if other not in flags]
    weights = {
        **file.weights,
        **{flag.name: torch.zeros([1] * len(flag.shape or ())).bool() for flag in flags},
    }
    reached = set(rest)
    for node in file.nodes:
        if reached.intersection(node.inputs):
            reached.update(node.outputs)
    outputs = tuple(output for output in file.outputs if output not in reached)
    if not outputs:
        raise BadFile(
            f"The network's output depends on {_listed(rest)} as well as on the image '{image.name}', and only an "
            "image can be given. Export it with the image as its only input and constants for the others."
        )
    notes = []
    if flags:
        notes.append(f"set to false: {_listed([flag.name for flag in flags])}")
    left = [output for output in file.outputs if output in reached]
    if left:
        notes.append(f"outputs that depend on {_listed(rest)} too are left out: {', '.join(left)}")
    return replace(file, weights=weights, outputs=outputs), tuple(notes)


def neutral(kind: str, shape: Sequence[int | str | None], batch: int) -> NDArray[np.generic]:
    """Something to give to an input that none of the wanted outputs depends on, of a type and shape in ONNX Runtime's
    words. A free first size is the batch."""
    sides = [side if isinstance(side, int) and side > 0 else 1 for side in shape]
    if shape and not isinstance(shape[0], int):
        sides[0] = batch
    return np.zeros(sides, KINDS.get(kind, np.float32))


def _is_flag(input: Input) -> bool:
    sides = input.shape
    return (
        input.dtype == ir.DataType.BOOL and sides is not None and math.prod(side or 2 for side in sides) == 1
    )


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
