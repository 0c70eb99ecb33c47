"""The files beside a network's file that hold its weights: what they may be called, how they are opened, and what they
and the network's file together are known by."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

MOST_FILES = 2000  # one for each tensor is the most that exporters write

_LONGEST = 1000  # characters of a name with its folders
_LONGEST_PART = 255  # bytes
_DEEPEST = 8

# Folders are only passed through, which a sandbox allows without the right to list them.
_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", 0)
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not keep anybody waiting


class NotPlain(OSError):
    """What is there is a link, a folder, a pipe or a device."""


def leads_outside(name: str) -> bool:
    """Whether a name is a path that leaves the folder it starts in, on this system or on another."""
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    return ".." in parts or PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)


def plain(name: str) -> str | None:
    """The name of a file in a folder or below it, with "/" between its parts; None for what is no such name."""
    if not name.isprintable() or "\\" in name or len(name) > _LONGEST or leads_outside(name):
        return None
    parts = PurePosixPath(name).parts
    if not 0 < len(parts) <= _DEEPEST or any(len(part.encode()) > _LONGEST_PART for part in parts):
        return None
    return "/".join(parts)


def open_beside(folder: Path, name: str) -> io.FileIO:
    """The plain file of this `plain` name, for reading. No link is followed on the way from the folder to it.

    Raises FileNotFoundError, NotPlain, and other OSErrors."""
    *folders, last = name.split("/")
    place = os.open(folder, _FOLDER)
    try:
        for part in folders:
            inner = _open(part, _FOLDER | os.O_NOFOLLOW, place, name)
            os.close(place)
            place = inner
        descriptor = _open(last, _FILE, place, name)
    finally:
        os.close(place)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotPlain(name)
    return io.FileIO(descriptor)


def _open(part: str, flags: int, place: int, name: str) -> int:
    try:
        return os.open(part, flags, dir_fd=place)
    except FileNotFoundError:
        raise
    except OSError as error:
        try:
            found = os.stat(part, dir_fd=place, follow_symlinks=False)
        except OSError:
            raise error from None
        wanted = stat.S_ISDIR if flags & os.O_DIRECTORY else stat.S_ISREG
        raise error if wanted(found.st_mode) else NotPlain(name) from error


def identity(network: str, data: Mapping[str, str]) -> str:
    """The SHA-256, in hex, that a network's file and its data files together are known by, from those of each; `data`
    has them by name. Without data files it is the network file's own."""
    if not data:
        return network
    return hashlib.sha256(json.dumps([network, sorted(data.items())]).encode()).hexdigest()


def identity_on_disk(network: Path, names: Sequence[str] = ()) -> str:
    """The same of a file and those of the data files of these names that are beside it."""
    with network.open("rb") as file:
        own = hashlib.file_digest(file, "sha256").hexdigest()
    data = {}
    for name in names:
        with open_beside(network.parent, name) as file:
            data[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return identity(own, data)
