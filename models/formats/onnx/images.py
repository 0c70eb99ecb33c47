"""Which input of a file is the image, and of what shape."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fusion.errors import BadFile, BadInput
from models.formats.onnx.file import Input
from models.layouts import CHANNELS, is_channels_last
from models.preprocess import MAX_SIZE

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_WHOLE = (ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64)


@dataclass(frozen=True)
class Image:
    """The input: its name, the batch size that the file fixes (or None), the shape of one sample as the file has it,
    channels last or not; whether it takes whole numbers (pixels), and the inputs beside it."""

    name: str
    batch: int | None
    sample: tuple[int, ...]
    channels_last: bool = False
    pixels: bool = False
    others: tuple[Input, ...] = ()


def find(inputs: tuple[Input, ...], size: tuple[int, int] | None) -> Image:
    """The only input, or the only one of several that can be an image: a tensor of four dimensions. `size` (height,
    width) fills free spatial ones."""
    found = (
        ", ".join(f"'{i.name}' {i.dtype.name if i.dtype else 'unknown'} {_show(i.shape)}" for i in inputs)
        or "none"
    )
    candidates = inputs if len(inputs) == 1 else tuple(i for i in inputs if _is_image(i))
    if len(candidates) != 1:
        raise BadFile(
            f"The network must have one image input; the file declares {len(inputs)}: {found}. "
            "Export it with the image as its only input."
        )
    (only,) = candidates
    if only.dtype not in (*_FLOATS, *_WHOLE) or only.shape is None or len(only.shape) != 4:
        raise BadFile(
            f"The network must have an image input [batch, channels, height, width] or [batch, height, width, "
            f"channels]; found {found}. Export it with one."
        )
    batch, *dims = only.shape
    last = is_channels_last(dims)
    space = (0, 1) if last else (1, 2)
    for axis, given in zip(space, size or (None, None), strict=True):
        if dims[axis] is None:
            if given is None:
                raise BadInput(
                    f"The file leaves the image size open (input {found}). "
                    "Pass size=HxW, for example size=224x224."
                )
            dims[axis] = given
        elif given is not None and given != dims[axis]:
            raise BadInput(
                f"The file fixes the image size (input {found}); "
                "leave out size, or export with free height and width."
            )
    sample = tuple(3 if d is None else d for d in dims)
    if max(sample) > MAX_SIZE:
        raise BadFile(
            f"The network takes images of more than {MAX_SIZE} pixels a side ({found}). "
            "Export it for the size that it was trained on."
        )
    others = tuple(i for i in inputs if i is not only)
    return Image(only.name, batch, sample, last, only.dtype in _WHOLE, others)


def _is_image(input: Input) -> bool:
    """Whether an input among several is one: pixels of so many channels that an image has."""
    if input.shape is None or len(input.shape) != 4 or input.dtype not in (*_FLOATS, ir.DataType.UINT8):
        return False
    if max(side or 2 for side in input.shape[1:3]) == 1 or max(side or 2 for side in input.shape[2:]) == 1:
        return False  # a constant by channel that a converter left out
    return input.shape[1] in CHANNELS or input.shape[3] in CHANNELS


def _show(shape: tuple[int | None, ...] | None) -> str:
    return "of unknown shape" if shape is None else "x".join("?" if d is None else str(d) for d in shape)
