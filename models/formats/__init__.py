"""The formats that networks come in: each recognized by its content, not by its file name."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fusion.errors import BadFile
from models.formats.strangers import ACCEPTED, SAVED_MODEL, is_strange_archive, is_whole_zip, refuse
from models.scan import varint

if TYPE_CHECKING:
    from models.opened import Source

__all__ = ["ACCEPTED", "FORMATS", "Format", "Probe", "detect"]

HEAD_BYTES = 4096


@dataclass(frozen=True)
class Probe:
    """What is looked at to tell a format: the first bytes and, for zip archives, the names inside (those below a folder
    without it)."""

    path: Path
    head: bytes
    size: int
    entries: frozenset[str] | None

    @classmethod
    def of(cls, path: Path) -> Probe:
        try:
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
            entries = None
            if is_whole_zip(path):
                with zipfile.ZipFile(path) as archive:
                    entries = frozenset(name.partition("/")[2] or name for name in archive.namelist())
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise BadFile(f"'{path.name}' cannot be read ({error}). Export or copy it again.") from error
        return cls(path, head, path.stat().st_size, entries)


class Reader(Protocol):
    def __call__(self, path: Path, *, size: tuple[int, int] | None = None) -> Source: ...


@dataclass(frozen=True)
class Format:
    """A file format: how to recognize it, and how to read it (imported when first used)."""

    name: str
    recognizes: Callable[[Probe], bool]
    read: Reader


def _read_onnx(path: Path, *, size: tuple[int, int] | None = None) -> Source:
    from models.formats import onnx
    from models.opened import Source

    found = onnx.read(path, size=size)
    return Source(
        found.example,
        found.original,
        module=found.module,
        notes=tuple(found.notes),
        metadata=found.metadata,
        names=found.output_names,
        kinds=found.kinds,
        labels=found.labels,
        channels_last=found.channels_last,
        pixels=found.pixels,
    )


def _read_torchscript(path: Path, *, size: tuple[int, int] | None = None) -> Source:
    from models.formats import torchscript
    from models.opened import Source

    found = torchscript.read(path, size=size)
    return Source(
        found.example,
        found.original,
        module=found.module,
        notes=found.notes,
        metadata=found.metadata,
        channels_last=found.channels_last,
    )


def read_script(script: Any, *, size: tuple[int, int] | None = None) -> Source:
    """A torch.jit.ScriptModule in memory, as its file would be read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.pt"
        script.save(str(path))
        return _read_torchscript(path, size=size)


def _read_exported(path: Path, *, size: tuple[int, int] | None = None) -> Source:
    from models.formats import exported

    return exported.read(path, size=size)


def _is_exported(probe: Probe) -> bool:
    names = probe.entries or frozenset()
    return bool(names & {"models/model.json", "serialized_exported_program.json"})


def _is_zip(probe: Probe) -> bool:
    # Archives that are no TorchScript end here too, where nothing else is known of them: its reader refuses them.
    return probe.entries is not None and not is_strange_archive(probe.path)


# Top-level fields of an ONNX ModelProto (onnx.proto): number -> wire type.
_MODEL_PROTO = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}


def _is_onnx(probe: Probe) -> bool:
    """Whether the file starts as a protobuf message with ModelProto's fields; it may end early."""
    if probe.head.startswith(SAVED_MODEL):
        return False
    if not any(byte < 9 or 13 < byte < 32 for byte in probe.head):
        return False  # text: protobuf tags and lengths always bring control characters
    fields = 0
    for number, wire in _fields(probe.head, probe.size):
        if _MODEL_PROTO.get(number) != wire:
            return False
        fields += 1
    return fields > 0


def _fields(data: bytes, size: int) -> Iterator[tuple[int, int]]:
    """(field number, wire type) of the top-level fields within the bytes at hand; (0, 0) for nonsense."""
    position = 0
    while (key := varint.read(data, position, len(data))) is not None:
        number, wire = key[0] >> 3, key[0] & 7
        yield number, wire
        value = varint.read(data, key[1], len(data)) if wire in (0, 2) else None
        if value is None:
            return
        position = value[1] + (value[0] if wire == 2 else 0)
        if wire == 2 and value[0] > max(size, 1 << 31):
            yield 0, 0


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("export", _is_exported, _read_exported),
        Format("torchscript", _is_zip, _read_torchscript),
        Format("onnx", _is_onnx, _read_onnx),
    )
}


def detect(path: Path) -> Format:
    """The format of a file by its content. Raises BadFile that says what the file seems to be instead."""
    probe = Probe.of(path)
    for format in FORMATS.values():
        if format.recognizes(probe):
            return format
    raise refuse(path)
