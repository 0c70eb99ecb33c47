"""What flows between ONNX nodes: tensors, and numbers that Python knows (shapes and arithmetic on them).

A shape may hold the free batch size, so numbers are NumPy arrays of objects: plain ints, or torch's symbolic
ints while a graph is being captured. NumPy's own indexing, concatenation and arithmetic then just work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import SymFloat, SymInt, Tensor

from fusion.errors import BadFile, UnsupportedOperator

Numbers: TypeAlias = npt.NDArray[Any]
Value: TypeAlias = Tensor | Numbers


class DependsOnPixels(BadFile):
    """A size, or another number that the graph's form hangs on, is computed from the image's values."""


class Counted(UnsupportedOperator):
    """An operator that returns as much as the image's values say."""

    def __init__(self, op: str, layer: str) -> None:
        super().__init__(
            op,
            layer,
            "How much it returns depends on pixel values, so nothing behind it has a fixed shape. "
            "Export the network up to the layer before it.",
        )


# More elements than any activation or weight of an image network; a few bytes of ONNX can ask for billions.
LARGEST = 2**29

# torch computes in none of these unsigned integers; the values of the widest beyond 2^63 are not kept.
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}
_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.int32,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,
    11: torch.float32,
    12: torch.int64,
    13: torch.int64,
    16: torch.float32,
}
# The codes of element types that are not held as what they are.
WIDENED = (4, 10, 11, 12, 13, 16)


def dtype(code: int) -> torch.dtype:
    """The torch type for an ONNX element type: every float computes in float32, unsigned integers of 16 bits and more
    in the next larger type."""
    if code not in _DTYPES:
        raise BadFile(f"The file uses the ONNX element type {code}, which is not read. Export it in float32.")
    return _DTYPES[code]


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the type that its kind of numbers is computed in."""
    return tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))


def numbers(items: Iterable[Any]) -> Numbers:
    """A vector of numbers, symbolic ones included."""
    listed = list(items)
    array = np.empty(len(listed), dtype=object)
    array[:] = listed
    return array


def is_symbolic(value: Numbers) -> bool:
    """Whether any entry is known only once the batch is."""
    kinds = SymInt | SymFloat | torch.SymBool
    return value.dtype == object and any(isinstance(item, kinds) for item in value.flat)


def ints(value: Value | int, what: str) -> list[Any]:
    """The entries as (symbolic) ints, for an operator that needs them to build its output's shape."""
    if isinstance(value, int):
        return [value]
    if isinstance(value, Tensor):
        raise DependsOnPixels(
            f"{what} depends on pixel values, so the network has no fixed graph. "
            "Export it with constant or shape-derived sizes."
        )
    return [item if isinstance(item, SymInt) else int(item) for item in value.reshape(-1).tolist()]


def scalar(value: Value, what: str) -> Any:
    """The single entry of a value that Python knows."""
    if isinstance(value, Tensor):
        raise DependsOnPixels(f"{what} depends on pixel values. Export the network with a constant there.")
    return value.reshape(-1).tolist()[0]


def as_tensor(value: Value, like: Tensor | None = None) -> Tensor:
    """Numbers as an int64 tensor (float32 or bool where they are)."""
    if isinstance(value, Tensor):
        return value
    device = like.device if like is not None else None
    flat = value.reshape(-1).tolist()
    if not flat and value.dtype == object:
        return torch.zeros(value.shape, dtype=torch.int64, device=device)  # sizes, none of them
    if is_symbolic(value):
        kind = torch.float32 if any(isinstance(i, SymFloat | float) for i in flat) else torch.int64
        items = [torch.scalar_tensor(item, dtype=kind, device=device) for item in flat]
        return torch.stack(items).reshape(value.shape)
    return torch.tensor(value.tolist(), device=device)


def allocation(shape: Sequence[Any], layer: str) -> Sequence[Any]:
    """The shape, after a check that a tensor of it fits into memory."""
    total = 1
    for size in shape:
        total *= 1 if isinstance(size, SymInt) else int(size)
    if total > LARGEST:
        raise BadFile(
            f"Layer '{layer}' asks for a tensor of {total} elements, more than {LARGEST}. "
            "The file is damaged or hostile."
        )
    return shape
