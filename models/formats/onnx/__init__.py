"""ONNX files as modules of torch operators, with the original beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import BadFile
from fusion.outputs import Kind
from models.formats.onnx import quantized
from models.formats.onnx.file import OnnxFile, flatten
from models.formats.onnx.images import find
from models.formats.onnx.inputs import alone, asked
from models.formats.onnx.module import OnnxModule
from models.formats.onnx.plan import Plan, make
from models.formats.onnx.runtime import Runtime
from models.formats.onnx.tables import take_tables
from models.formats.onnx.whole import open_whole

__all__ = ["OnnxSource", "read"]


@dataclass(frozen=True)
class OnnxSource:
    """A file that was read: `module` runs any batch size, `original` is ONNX Runtime on the file itself.

    `example` is an input [2, channels, height, width] in float32, `notes` say what a user should know,
    `metadata` is what the file's author left in it. Where images are `channels_last` the example is, and runtime and
    module take them so; `pixels` are whole numbers. `kinds` say what outputs hold whose shapes do not tell.
    """

    module: nn.Module
    example: Tensor
    original: Callable[[Tensor], Any]
    output_names: tuple[str, ...]
    notes: tuple[str, ...]
    metadata: Mapping[str, str]
    channels_last: bool = False
    pixels: bool = False
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None


def read(path: Path, *, size: tuple[int, int] | None = None) -> OnnxSource:
    """Read an ONNX file, with the data files that it names in its own folder. `size` (height, width) is needed where
    the file leaves the image size open.

    Raises BadFile for files that are damaged, hostile or no image network, MissingData, BadInput for a wrong or missing
    size, UnsupportedOperator, and NonFiniteWeights.
    """
    name = Path(path).name
    proto, stored = open_whole(Path(path))
    classes = take_tables(proto)
    file = flatten(proto, name)
    del proto  # neither the bytes nor the decoded file stay: large networks would be held several times over
    if not file.outputs:
        raise BadFile("The file declares no output. Export it again.")
    image = find(asked(file), size)
    file, set_aside = alone(file, image)
    plan = make(file, image)
    return OnnxSource(
        module=OnnxModule(plan),
        example=torch.zeros(2, *image.sample),
        original=Runtime(
            stored,
            image.name,
            plan.outputs,
            image.batch,
            plan.bare,
            inner=plan.cut is not None or classes is not None,
        ),
        output_names=plan.outputs,
        notes=(*_notes(file, image.batch, plan), *set_aside),
        metadata=file.metadata,
        channels_last=image.channels_last,
        pixels=image.pixels,
        kinds=plan.cut.kinds if plan.cut is not None else {},
        labels=classes or None,
    )


def _notes(file: OnnxFile, batch: int | None, plan: Plan) -> tuple[str, ...]:
    notes = [f"{kind} weights: computed in float32" for kind in file.widened]
    if batch is not None:
        notes.append(f"the file fixes the batch to {batch}: any batch size runs here")
    notes += quantized.notes(file.nodes)
    missing = [name for name in file.outputs if name not in plan.outputs]
    if plan.cut is not None:
        notes.append(plan.cut.note)
    elif missing:
        notes.append(f"outputs that are constant or cannot be computed are left out: {', '.join(missing)}")
    return tuple(notes)
