"""torch.export programs in: .pt2 files and ExportedProgram objects."""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram

from fusion.errors import BadFile
from models.formats.portions import in_portions
from models.formats.probing import DEFAULT_SIZE, first_line, map_tensors
from models.formats.torchscript.allowed import GLOBALS, vocabulary
from models.layouts import is_channels_last
from models.opened import Source
from models.scan.programs import scan_program
from models.scan.zips import Contents, contents

# Beyond tensors, their example inputs remember which axes are free.
_GLOBALS = GLOBALS | {("torch._tensor", "_rebuild_from_type_v2"), ("torch", "Tensor"), ("__builtin__", "set")}
PROGRAM = "serialized_exported_program.json"  # of the flat layout
MAX_METADATA_BYTES = 4 * 1024 * 1024


def read(path: Path, *, size: tuple[int, int] | None = None) -> Source:
    """Reads a .pt2 file. torch.export.load may run code from it, so it is scanned before (`models.scan.programs`); that
    is no proof, and strangers' files are read in a confined process.

    Raises UnsafeFile where the file could do more than describe a network, BadFile where torch cannot load it.
    """
    flat = _is_flat(path)
    extra = "extra_files" if flat else "extra"
    found = contents(
        path, path.name, lambda entry: entry.startswith(f"{extra}/"), flat_but=extra if flat else None
    )
    scan_program(found, vocabulary().operators, lambda module, name: (module, name) in _GLOBALS, extra)
    metadata = _metadata(found, extra)
    try:
        with warnings.catch_warnings(), _unheard("torch.export"):
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:  # its reader raises whatever the damaged part leads to
        raise BadFile(
            f"'{path.name}' cannot be loaded as a torch.export program: {first_line(error)}. "
            "Save it again with torch.export.save, by the torch version installed here or an older one."
        ) from error
    return from_program(program, size=size, metadata=metadata)


def from_program(
    program: ExportedProgram, *, size: tuple[int, int] | None = None, metadata: dict[str, Any] | None = None
) -> Source:
    """An ExportedProgram with one image input as a source. The program itself is left as it is."""
    import fusion

    shape, dtype = _input(program)
    sides = [side if isinstance(side, int) else None for side in shape[1:]]
    last = is_channels_last(sides)
    space = sides[:2] if last else sides[1:]
    notes: list[str] = []
    if space == [None, None] and size is None:
        notes.append("The program takes images of any size; 224x224 is assumed. Pass size=HxW for another.")
    if any(side not in (None, wanted) for side, wanted in zip(space, size or space, strict=True)):
        raise BadFile(
            f"The program was exported for images of {space[0]}x{space[1]} pixels. "
            "Use that size, or export it again for another."
        )
    height, width = (side or other for side, other in zip(space, size or DEFAULT_SIZE, strict=True))
    used = (height, width, sides[2] or 3) if last else (sides[0] or 3, height, width)
    pixels = not dtype.is_floating_point
    random = torch.randn(2, *used, generator=torch.Generator().manual_seed(0))
    example = random if pixels else random.to(dtype)
    batch = shape[0] if isinstance(shape[0], int) else None
    network = fusion.from_exported(program, tuple(example.shape[1:]))
    return Source(
        example,
        _runner(program, batch, dtype),
        network=network,
        notes=tuple(notes),
        metadata=metadata or {},
        channels_last=last,
        pixels=pixels,
    )


def _input(program: ExportedProgram) -> tuple[tuple[Any, ...], torch.dtype]:
    names = [
        name for name in program.graph_signature.user_inputs if isinstance(name, str)
    ]  # others are constants
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[name].meta.get("val") for name in names if name in nodes]
    if len(names) != 1 or len(values) != 1 or not isinstance(values[0], Tensor) or values[0].ndim != 4:
        raise BadFile(
            f"The program takes {len(names)} inputs; only one image batch [N, C, H, W] (or [N, H, W, C]) can be given. "
            "Wrap the network in a module that takes the image alone and export that."
        )
    return tuple(values[0].shape), values[0].dtype


def _runner(program: ExportedProgram, batch: int | None, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """The program's own module on the CPU, given the image as it was exported with it: by place or by keyword."""
    module = program.module()
    structure = program.call_spec.in_spec
    inputs = program.graph_signature.user_inputs

    def run(x: Tensor) -> Any:
        leaves = [x.detach().to("cpu", dtype, copy=True) if isinstance(n, str) else n for n in inputs]
        args, kwargs = pytree.tree_unflatten(leaves, structure) if structure is not None else (leaves, {})
        with torch.no_grad():
            return map_tensors(module(*args, **kwargs), lambda t: t.to(x.dtype))

    return run if batch is None else in_portions(run, batch)


def _is_flat(path: Path) -> bool:
    """Whether the archive is laid out as torch wrote it before 2.8: its entries in no folder."""
    with zipfile.ZipFile(path) as archive:
        return PROGRAM in archive.namelist()


@contextmanager
def _unheard(name: str) -> Iterator[None]:
    """What a logger says below an error is dropped: of the older layout, that it is none of the newer."""
    logger = logging.getLogger(name)

    def grave(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(grave)
    try:
        yield
    finally:
        logger.removeFilter(grave)


def _metadata(found: Contents, folder: str) -> dict[str, Any]:
    """JSON objects among the archive's extra files."""
    merged: dict[str, Any] = {}
    extra = found.named(lambda entry: entry.startswith(f"{folder}/"))
    for _, data in found.read_all(e for e in extra if found.entries[e].file_size <= MAX_METADATA_BYTES):
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            merged.update(value)
    return merged
