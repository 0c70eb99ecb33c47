"""Which input of a file is the image, and of what shape."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fusion.errors import BadFile, BadInput
from models.formats.onnx.file import Input
from models.preprocess import MAX_SIZE

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Image:
    """The input: its name, the batch size that the file fixes (or None), and the shape of one sample."""

    name: str
    batch: int | None
    sample: tuple[int, ...]


def find(inputs: tuple[Input, ...], size: tuple[int, int] | None) -> Image:
    """The only input, a float tensor of four dimensions; `size` (height, width) fills free spatial ones."""
    found = (
        ", ".join(f"'{i.name}' {i.dtype.name if i.dtype else 'unknown'} {_show(i.shape)}" for i in inputs)
        or "none"
    )
    if len(inputs) != 1:
        raise BadFile(
            f"The network must have one image input; the file declares {len(inputs)}: {found}. "
            "Export it with the image as its only input."
        )
    (only,) = inputs
    if only.dtype not in _FLOATS or only.shape is None or len(only.shape) != 4:
        raise BadFile(
            f"The network must have a float image input [batch, channels, height, width]; "
            f"found {found}. Export it with one."
        )
    batch, *dims = only.shape
    # Channels come last in files made from TensorFlow.
    last = dims[0] not in (1, 3, 4) and dims[2] in (1, 3, 4)
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
    return Image(only.name, batch, sample)


def _show(shape: tuple[int | None, ...] | None) -> str:
    return "of unknown shape" if shape is None else "x".join("?" if d is None else str(d) for d in shape)
