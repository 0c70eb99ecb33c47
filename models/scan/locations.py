"""The data files that an ONNX file points at, by a walk over protobuf's wire format.

No library decodes anything of the file, so a process that leaves the reading to a confined one can find out what that
one has to be let at.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from models.beside import MOST_FILES, open_beside, plain
from models.scan import varint

# Message -> number of a field -> the message in it, of all that lead to a tensor's external data (onnx.proto).
WITHIN: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "StringStringEntryProto": {},
}

_DEEPEST = 100
_MOST_FIELDS = 5_000_000
_LONGEST = 4096  # bytes of a name
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def data_files(path: Path) -> tuple[str, ...]:
    """The names of the other plain files beside an ONNX file that it keeps data in, as far as they are there.

    Of any other file, and from where on a file is damaged, there are none: its reader says what is wrong with it.
    Raises OSError where the file itself cannot be read."""
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return ()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names = dict.fromkeys(filter(None, map(plain, _locations(data))))
    names.pop(path.name, None)
    return tuple(name for name in islice(names, MOST_FILES) if _is_there(path.parent, name))


def _is_there(folder: Path, name: str) -> bool:
    try:
        open_beside(folder, name).close()
    except OSError:
        return False
    return True


def _locations(data: mmap.mmap) -> Iterator[str]:
    message, end, position = "ModelProto", len(data), 0
    around: list[tuple[str, int]] = []
    texts: dict[int, bytes] = {}  # of the entry that is being read: 1 is its key, 2 its value
    for _ in range(_MOST_FIELDS):
        while position == end:
            if texts.get(1) == b"location":
                yield texts.get(2, b"").decode(errors="replace")
            if not around:
                return
            texts = {}
            message, end = around.pop()
        key = varint.read(data, position, end)
        if key is None:
            return
        number, wire, position = key[0] >> 3, key[0] & 7, key[1]
        found = varint.read(data, position, end) if wire in (_VARINT, _BYTES) else None
        if wire == _VARINT and found is not None:
            position = found[1]
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES and found is not None:
            length, position = found
        if length is None or not number or length > end - position:
            return
        inner = WITHIN[message].get(number) if wire == _BYTES else None
        if inner is not None and len(around) < _DEEPEST:
            around.append((message, end))
            message, end, texts = inner, position + length, {}
            continue
        if message == "StringStringEntryProto" and wire == _BYTES:
            texts[number] = data[position : position + min(length, _LONGEST)]
        position += length
