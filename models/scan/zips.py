"""Zip archives as torch writes them: nothing hidden, nothing twice, nothing that unpacks to more than it may.

Two readers of one archive may see different files in it (a second directory, names that differ by case, entries that
overlap): what was scanned would not be what is loaded then. Torch's own archives leave no room for that, so all of it
is refused.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fusion.errors import BadFile, UnsafeFile
from models.formats.strangers import ACCEPTED, AGAIN

MAX_ENTRIES = 100_000
MAX_INFLATED = 256 * 1024 * 1024
MAX_RATIO = 200  # what torch compresses is code, which comes to a tenth or so
RATIO_MATTERS = 1024 * 1024  # bytes; small files may shrink by any factor

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_TAIL = _END_64.size + _LOCATOR.size + _END.size
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1


@dataclass(frozen=True)
class Contents:
    """An archive's entries by their names below its one top folder, or by their whole names in a flat one."""

    source: Path | bytes
    name: str
    entries: Mapping[str, zipfile.ZipInfo]

    def read(self, name: str) -> bytes:
        """An entry's bytes. Raises BadFile where it is damaged."""
        return next(self.read_all([name]))[1]

    def read_all(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of several entries, the archive opened once."""
        try:
            with _opened(self.source) as file, zipfile.ZipFile(file) as archive:
                for name in names:
                    yield name, archive.read(self.entries[name])
        except DAMAGE as error:
            raise damaged(self.name, error) from error

    def named(self, accepts: Callable[[str], bool]) -> list[str]:
        """The names that a test accepts, which is given them in lower case: torch's reader ignores case."""
        return [name for name in self.entries if accepts(name.lower())]


DAMAGE = (zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error, NotImplementedError, RuntimeError)


def contents(
    source: Path | bytes, name: str, may_be_compressed: Callable[[str], bool], flat_but: str | None = None
) -> Contents:
    """The entries of an archive, checked. `may_be_compressed` says of an entry's name in lower case whether torch
    compresses such an entry. `flat_but` is the one folder of an archive whose entries are in no top folder otherwise.
    Raises BadFile for a damaged archive, UnsafeFile for one that torch would not have written."""
    try:
        with _opened(source) as file:
            start, total = _directory(file, name)
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                if archive.start_dir != start or len(infos) != total:
                    raise zipfile.BadZipFile("its directory is not where it says")
            named = _named(infos, name) if flat_but is None else _flat(infos, flat_but, name)
            entries = _unique(named, name)
            _check_sizes(entries, may_be_compressed, name)
            _check_places(file, infos, start)
    except DAMAGE as error:
        raise damaged(name, error) from error
    return Contents(source, name, entries)


def _opened(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def damaged(name: str, error: BaseException) -> BadFile:
    return BadFile(f"'{name}' is damaged or truncated ({error}). {AGAIN}")


def _directory(file: BinaryIO, name: str) -> tuple[int, int]:
    """Where the directory begins, and of how many entries. Its end record has to be the last of the file, so that all
    readers find the same."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL).rjust(_TAIL, b"\0")
    signature, disk, first, here, total, length, start, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\x05\x06" or comment or disk or first or here != total:
        raise zipfile.BadZipFile("the end of the archive is not the end of the file")
    end = size - _END.size
    locator = _LOCATOR.unpack(tail[_END_64.size : -_END.size])
    if locator[0] == b"PK\x06\x07":
        end = size - _TAIL
        record = _END_64.unpack(tail[: _END_64.size])
        agree = zip((total, length, start), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), record[-3:], strict=True)
        if (
            record[0] != b"PK\x06\x06"
            or locator[2] != end
            or any(short not in (limit, long) for short, limit, long in agree)
        ):
            raise zipfile.BadZipFile("its end records contradict each other")
        total, length, start = record[-3:]
    if total > MAX_ENTRIES:
        raise UnsafeFile(f"'{name}' holds {total} entries", "No network has that many.")
    if start + length != end:
        raise zipfile.BadZipFile("its directory is not where it says")
    return int(start), int(total)


def _named(infos: list[zipfile.ZipInfo], name: str) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """The entries by their names below the one top folder."""
    folders: set[str] = set()
    for info in infos:
        folder, _, inner = info.orig_filename.partition("/")
        parts = PurePosixPath(info.orig_filename).parts
        if folder and not inner:
            raise BadFile(f"'{name}' is a zip archive, but none of torch's. {ACCEPTED}")
        odd = not folder or ".." in parts or "." in parts
        if odd or "\\" in info.orig_filename or "\0" in info.orig_filename or "//" in inner:
            raise _no_such_path(info, name)
        folders.add(folder)
        yield inner, info
    if len(folders) > 1:
        raise UnsafeFile(f"'{name}' holds more than one top folder", "An archive of torch's has one.")


def _flat(infos: list[zipfile.ZipInfo], folder: str, name: str) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """The entries by their whole names. None is deeper than the one folder, so that a reader that takes it for the top
    of an archive finds no network in it."""
    for info in infos:
        plain = info.orig_filename.removeprefix(f"{folder}/")
        if plain in ("", ".", "..") or any(odd in plain for odd in "/\\\0"):
            raise _no_such_path(info, name)
        yield info.orig_filename, info


def _no_such_path(info: zipfile.ZipInfo, name: str) -> UnsafeFile:
    return UnsafeFile(f"'{name}' holds the path '{info.orig_filename}'", "Torch writes no such path.")


def _unique(named: Iterable[tuple[str, zipfile.ZipInfo]], name: str) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    for inner, info in named:
        if inner.lower() in seen:
            raise UnsafeFile(f"'{name}' holds '{inner}' twice", "Readers could disagree which one counts.")
        seen.add(inner.lower())
        entries[inner] = info
    return entries


def _check_sizes(
    entries: Mapping[str, zipfile.ZipInfo], may_be_compressed: Callable[[str], bool], name: str
) -> None:
    inflated = 0
    for inner, info in entries.items():
        if info.flag_bits & _ENCRYPTED:
            raise UnsafeFile(f"'{name}' is encrypted ('{inner}')", "Save it without a password.")
        if info.compress_type == zipfile.ZIP_STORED:
            if info.file_size != info.compress_size:
                raise zipfile.BadZipFile(f"the sizes of '{inner}' contradict each other")
            continue
        if info.compress_type != zipfile.ZIP_DEFLATED or not may_be_compressed(inner.lower()):
            raise UnsafeFile(
                f"'{name}' holds compressed weights ('{inner}')",
                "Torch never compresses them, and they may unpack to any size.",
            )
        inflated += info.file_size
        if info.file_size > RATIO_MATTERS and info.file_size > MAX_RATIO * info.compress_size:
            raise UnsafeFile(
                f"'{name}' holds '{inner}', {info.compress_size} bytes that unpack to {info.file_size}",
                "It is made to fill the memory of whoever opens it.",
            )
    if inflated > MAX_INFLATED:
        raise UnsafeFile(
            f"'{name}' unpacks to {inflated >> 20} MiB of code", f"At most {MAX_INFLATED >> 20} MiB are read."
        )


def _check_places(file: BinaryIO, infos: list[zipfile.ZipInfo], start: int) -> None:
    """Each entry has bytes of its own, before the directory, under the name that the directory gives it."""
    free = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < free:
            raise zipfile.BadZipFile(f"'{info.filename}' lies over other entries")
        file.seek(info.header_offset)
        header = _LOCAL.unpack(file.read(_LOCAL.size).ljust(_LOCAL.size, b"\0"))
        if header[0] != b"PK\x03\x04" or header[3] != info.compress_type:
            raise zipfile.BadZipFile(f"'{info.filename}' is not where the directory says")
        name = file.read(header[9])
        if name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
            raise zipfile.BadZipFile(f"'{info.filename}' has another name in its place")
        free = info.header_offset + _LOCAL.size + header[9] + header[10] + info.compress_size
        if free > start:
            raise zipfile.BadZipFile(f"'{info.filename}' goes beyond its place")
