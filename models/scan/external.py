"""Data of tensors that an ONNX file keeps in other files: found, held against bounds, and taken into the network.

Where a tensor's data is stands in the file as text, so it may be anything: only plain files in the network's own folder
are opened, nothing is read before all of it is known to be there and to be as much as the tensors declare, and what is
read in all is bounded by what the data files hold.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from fusion.errors import BadFile, MissingData
from models.beside import MOST_FILES, NotPlain, leads_outside, open_beside, plain
from models.scan.tensors import broken, declared_bytes, tensors

_LARGEST = 2**31 - 2**20  # protobuf's bound on one message, with room for lengths and tags
_MOST_TIMES = 8  # that a byte may be read: tensors may share their data
_ANYWAY = 16 * 2**20  # bytes that are read however often they are shared
_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class _Span:
    """Where a tensor's data is: `length` bytes from `offset` on in the file of a plain name."""

    tensor: onnx.TensorProto
    file: str
    offset: int
    length: int


def embed(proto: onnx.ModelProto, folder: Path | None, name: str) -> bool:
    """Take the data that is in files of the folder into the decoded network; whether there was any.

    `name` is the network file's, for messages; without a folder no other file is read. Raises MissingData for data
    files that are not there, and BadFile for what is no data of the network's."""
    spans = [_span(tensor, name) for tensor in tensors(proto) if _is_external(tensor)]
    if not spans:
        return False
    files = defaultdict(list)
    for span in spans:
        files[span.file].append(span)
    if folder is None:
        raise _missing(list(files), name)
    if len(files) > MOST_FILES:
        raise BadFile(
            f"{name} keeps its weights in {len(files):,} files; up to {MOST_FILES:,} are read. "
            "Save it with one data file."
        )
    sizes = _sizes(list(files), folder, name)
    for span in spans:
        _check_span(span, sizes[span.file], name)
    _check_total(sum(span.length for span in spans), sum(sizes.values()), proto.ByteSize(), name)
    for file, within in files.items():
        _read(file, within, folder, name)
    return True


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _span(tensor: onnx.TensorProto, name: str) -> _Span:
    keys = [entry.key for entry in tensor.external_data]
    if len(set(keys)) < len(keys):  # tools differ in which of them they take
        raise broken(tensor, "says twice where its data is", name)
    found = {entry.key: entry.value for entry in tensor.external_data}
    place = found.get("location", "")
    file = plain(place)
    if file is None and leads_outside(place):
        raise BadFile(
            f"{name} points at a file outside of its folder ({place[:200]!r}, for the weights '{tensor.name}'). "
            "Such files are not read. Save the network as a single file, or with its data beside it."
        )
    if file is None:
        raise BadFile(
            f"{name} keeps the weights '{tensor.name}' in a file of a name that is not taken ({place[:200]!r}). "
            "Save it with another name for its data, or as a single file."
        )
    needed = declared_bytes(tensor, name)
    offset = _number(found.get("offset", "0"), "offset", tensor, name)
    length = _number(found.get("length", str(needed)), "length", tensor, name)
    if length != needed:
        raise broken(tensor, f"declares {needed:,} bytes and has {length:,} in '{file}'", name)
    return _Span(tensor, file, offset, length)


def _number(text: str, what: str, tensor: onnx.TensorProto, name: str) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise broken(
            tensor, f"gives {text[:40]!r} as the {what} of its data, which is no number of bytes", name
        )
    return int(text)


def _sizes(files: Sequence[str], folder: Path, name: str) -> dict[str, int]:
    sizes, missing = {}, []
    for file in files:
        try:
            with open_beside(folder, file) as found:
                sizes[file] = os.fstat(found.fileno()).st_size
        except FileNotFoundError:
            missing.append(file)
        except OSError as error:
            raise _unreadable(file, error, name) from error
    if missing:
        raise _missing(missing, name)
    return sizes


def _check_span(span: _Span, size: int, name: str) -> None:
    if span.offset + span.length > size:
        raise BadFile(
            f"{name} is not readable: the data of its tensor '{span.tensor.name}' is {span.length:,} bytes from "
            f"{span.offset:,} on in '{span.file}', which has {size:,} bytes. The data file is truncated or of another "
            "export: copy or export both again."
        )


def _check_total(total: int, held: int, own: int, name: str) -> None:
    if total > _MOST_TIMES * held + _ANYWAY:
        raise BadFile(
            f"{name} takes {total:,} bytes of weights from data files of {held:,}, so its tensors share their data "
            f"more than {_MOST_TIMES} times over. The file is damaged or hostile."
        )
    if total + own > _LARGEST:
        raise BadFile(
            f"{name} has {(total + own) / 2**30:.1f} GiB of weights with its data files; up to 2 GiB are read, the "
            "most that one ONNX file can hold. Save it in half precision, or open it as a module or torch.export "
            "program."
        )


def _read(file: str, spans: Sequence[_Span], folder: Path, name: str) -> None:
    try:
        with open_beside(folder, file) as found:
            for span in spans:
                found.seek(span.offset)
                data = found.read(span.length) if span.length else b""
                while len(data) < span.length and (more := found.read(span.length - len(data))):
                    data += more  # one call of the system's reads no more than 2 GB
                if len(data) != span.length:
                    raise BadFile(f"'{file}' became shorter while {name} was read. Open it again.")
                _hold(span.tensor, data)
    except OSError as error:
        raise _unreadable(file, error, name) from error


def _hold(tensor: onnx.TensorProto, data: bytes) -> None:
    """The data takes the place of all that said where it is, and of values that do not count beside it."""
    kept = {"dims", "data_type", "name", "doc_string", "metadata_props"}
    for field, _ in tensor.ListFields():
        if field.name not in kept:
            tensor.ClearField(field.name)
    tensor.raw_data = data


def _missing(files: Sequence[str], name: str) -> MissingData:
    shown = ", ".join(f"'{file}'" for file in files[:3])
    more = f" and {len(files) - 3:,} others" if len(files) > 3 else ""
    return MissingData(
        f"{name} keeps its weights in {shown}{more}, which {'is' if len(files) == 1 else 'are'} not beside it. "
        "Put the data files into the folder of the network's file, send them along with it, or save the network as "
        "a single file (onnx.save, or torch.onnx.export with external_data=False)."
    )


def _unreadable(file: str, error: OSError, name: str) -> BadFile:
    if isinstance(error, NotPlain):
        return BadFile(
            f"{name} keeps its weights in '{file}', which is no plain file but a link, a folder, a pipe or a device, "
            "or is reached through one. Put the data itself there (cp -L copies what links stand for)."
        )
    return BadFile(f"'{file}', the data of {name}, cannot be read: {error.strerror}. Check its permissions.")
