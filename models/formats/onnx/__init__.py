"""ONNX files as modules of torch operators, with the original beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fusion.errors import BadFile, ClearfoldError
from models.formats.onnx import images, quantized
from models.formats.onnx.file import OnnxFile, flatten
from models.formats.onnx.module import OnnxModule
from models.formats.onnx.plan import make
from models.formats.onnx.runtime import Runtime
from models.scan.onnx import decode

__all__ = ["OnnxSource", "read"]


@dataclass(frozen=True)
class OnnxSource:
    """A file that was read: `module` runs any batch size, `original` is ONNX Runtime on the file itself.

    `example` is an input [2, channels, height, width] in float32, `notes` say what a user should know,
    `metadata` is what the file's author left in it.
    """

    module: nn.Module
    example: Tensor
    original: Callable[[Tensor], Tensor]
    notes: tuple[str, ...]
    metadata: Mapping[str, str]


def read(path: Path, *, size: tuple[int, int] | None = None) -> OnnxSource:
    """Read an ONNX file. `size` (height, width) is needed where the file leaves the image size open.

    Raises BadFile for files that are damaged, hostile or no image network, BadInput for a wrong or missing
    size, UnsupportedOperator, and NonFiniteWeights.
    """
    name = Path(path).name
    try:
        stored = Path(path).open("rb")  # noqa: SIM115 (the runtime reads it again, when it is first asked)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    # Neither the bytes nor the decoded file stay: large networks would be held several times over.
    file = flatten(decode(stored.read(), name), name)
    if not file.outputs:
        raise BadFile("The file declares no output. Export it again.")
    image = images.find(file.inputs, size)
    output = file.outputs[0]
    try:
        plan = make(file.nodes, file.weights, image.name, image.sample, image.batch, output)
    except ClearfoldError:
        raise
    except Exception as error:  # a damaged name or attribute surfaces anywhere, as anything
        raise BadFile(f"{name} is not a readable ONNX file: {error}. Export it again.") from error
    return OnnxSource(
        module=OnnxModule(plan),
        example=torch.zeros(2, *image.sample),
        original=Runtime(stored, image.name, output, image.batch),
        notes=_notes(file, image.batch),
        metadata=file.metadata,
    )


def _notes(file: OnnxFile, batch: int | None) -> tuple[str, ...]:
    notes = [f"{kind} weights: computed in float32" for kind in file.widened]
    if batch is not None:
        notes.append(f"the file fixes the batch to {batch}: any batch size runs here")
    notes += quantized.notes(file.nodes)
    if len(file.outputs) > 1:
        notes.append(f"of {len(file.outputs)} outputs, the first ('{file.outputs[0]}') is explained")
    return tuple(notes)
