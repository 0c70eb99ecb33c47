"""An ONNX file with all that belongs to it: decoded, checked, and open as one file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import BinaryIO

import onnx

from fusion.errors import BadFile
from models.scan.external import embed
from models.scan.onnx import check, parse


def open_whole(path: Path) -> tuple[onnx.ModelProto, BinaryIO]:
    """The decoded network, and a file open for reading that holds the same: the network's own, or an unnamed temporary
    one where data was in other files. So no tool behind this follows a path that stands in the network.

    Raises BadFile (MissingData for data files that are not beside it).
    """
    try:
        stored: BinaryIO = path.open("rb")
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    proto = parse(stored.read(), path.name)  # the bytes do not stay: large networks would be held twice
    gathered = embed(proto, path.parent, path.name)
    check(proto, path.name)
    if gathered:
        stored.close()
        stored = tempfile.TemporaryFile()  # noqa: SIM115 (the runtime reads it when it is first asked)
        stored.write(proto.SerializeToString())
        stored.flush()
    return proto, stored
