"""Pickles, opcode by opcode: which names they call for, and nothing else than torch's picklers write.

Nothing is unpickled. An opcode off the list, a name off the caller's list, or values nested deeper than any network's
are refused.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fusion.errors import BadFile, UnsafeFile
from models.formats.strangers import AGAIN
from models.scan.zips import Contents

MAX_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 200

Allowed = Callable[[str, str], bool]

# What each opcode takes from the stack, and whether it leaves a value that holds what it took.
_MARKED = frozenset({"TUPLE", "LIST", "DICT"})
_LEAVES = frozenset(
    """
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING
    SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_TUPLE EMPTY_LIST EMPTY_DICT GLOBAL
    """.split()
)
_GATHERS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1}
_FILLS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_FILLS_MARKED = frozenset({"APPENDS", "SETITEMS"})
_STORES = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_FETCHES = frozenset({"GET", "BINGET", "LONG_BINGET"})
_OF_STORAGE = 5
_SILENT = frozenset({"PROTO", "FRAME"})


# Bytes of one element of a storage; those of which two or four share a byte are not counted.
_SIZES = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32", "ComplexHalf"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool", "QInt8", "QUInt8", "Untyped"), 1),
    **dict.fromkeys(("QUInt4x2", "QUInt2x4"), 0),
    "ComplexDouble": 16,
}


@dataclass(frozen=True)
class Storage:
    """The elements of tensors, kept beside the pickle under `key`, of so many bytes."""

    key: str
    size: int


def scan_entries(
    found: Contents, entries: Iterable[str], allowed: Allowed, unread: Container[str] = ()
) -> None:
    """Pickles of an archive, with the storages that they name: these have to be there, and as large as it says. Torch
    takes a pickle's word for it, and would read what is missing out of memory that belongs to others. `unread` are
    pickles whose storages nobody reads."""
    for entry, data in found.read_all(entries):
        where = f"'{found.name}' ({entry})"
        storages = scan_pickle(data, allowed, where)
        folder = entry.rpartition(".")[0]
        for storage in storages if entry not in unread else ():
            beside = found.entries.get(f"{folder}/{storage.key}")
            if beside is None or beside.file_size < storage.size:
                raise BadFile(
                    f"{where} lacks weights ('{storage.key}'): {storage.size} bytes are not there. {AGAIN}"
                )


def scan_pickle(data: bytes, allowed: Allowed, where: str) -> list[Storage]:
    """The storages that a pickle names. Raises UnsafeFile for what no network needs, BadFile for what is no pickle.
    `where` names file and entry."""
    if len(data) > MAX_BYTES:
        raise UnsafeFile(f"{where} is a pickle of {len(data) >> 20} MiB", "Weights are not kept in pickles.")
    machine = _Machine(allowed, where)
    stream = io.BytesIO(data)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise BadFile(f"{where} is damaged: it is no pickle. {AGAIN}") from error
    if stream.read(1):
        raise UnsafeFile(
            f"{where} goes on after its end", "What follows would be read by nobody, or by surprise."
        )
    return machine.storages


@dataclass(frozen=True)
class _Item:
    """What stands for a value: how deep it is nested, and what it is where a storage may be named by it."""

    depth: int
    value: Any = None


_PLAIN = _Item(0)


class _Machine:
    """The pickle machine with depths in place of values: a value's depth is that of what it holds, plus one."""

    def __init__(self, allowed: Allowed, where: str) -> None:
        self.allowed = allowed
        self.where = where
        self.stack: list[_Item] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Item] = {}
        self.storages: list[Storage] = []

    def step(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            module, _, found = str(argument).partition(" ")
            self.name(module, found)
            self.stack.append(_Item(0, found))
        elif name in _LEAVES:
            self.stack.append(_Item(0, argument) if isinstance(argument, str | int) else _PLAIN)
        elif name in _GATHERS:
            items = self.take(_GATHERS[name])
            if name == "BINPERSID":
                self.store(items[0].value)
            self.push(items)
        elif name in _MARKED:
            items = self.take_marked()
            self.push(items, tuple(item.value for item in items) if len(items) == _OF_STORAGE else None)
        elif name in _FILLS:
            self.fill(self.take(_FILLS[name]))
        elif name in _FILLS_MARKED:
            self.fill(self.take_marked())
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _STORES:
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = self.stack[-1]
        elif name in _FETCHES:
            self.stack.append(self.memo[int(argument)])
        elif name in ("POP", "STOP"):
            self.take(1)
        elif name not in _SILENT:
            raise UnsafeFile(
                f"{self.where} uses the pickle opcode {name}", "Torch's picklers write no such thing."
            )

    def name(self, module: str, name: str) -> None:
        if not self.allowed(module, name):
            raise UnsafeFile(
                f"{self.where} calls for {module}.{name}", "No network needs it, and unpickling would run it."
            )

    def store(self, named: Any) -> None:
        """("storage", type, key, device, elements), as torch names a storage."""
        word, kind, key, _, count = named if isinstance(named, tuple) else (None,) * _OF_STORAGE
        size = _SIZES.get(str(kind).removesuffix("Storage"))
        if (
            word != "storage"
            or not isinstance(key, str)
            or not isinstance(count, int)
            or size is None
            or count < 0
        ):
            raise UnsafeFile(
                f"{self.where} names something that is no storage", "Torch keeps nothing else beside."
            )
        self.storages.append(Storage(key, count * size))

    def take(self, count: int) -> list[_Item]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("it takes what is not there")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def take_marked(self) -> list[_Item]:
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def push(self, held: Sequence[_Item], value: Any = None) -> None:
        depth = max((item.depth for item in held), default=-1) + 1
        if depth > MAX_DEPTH:
            raise UnsafeFile(
                f"{self.where} nests values more than {MAX_DEPTH} deep", "It is made to overflow its reader."
            )
        self.stack.append(_Item(depth, value))

    def fill(self, held: Sequence[_Item]) -> None:
        container = self.take(1)[0]
        self.push([*held, _Item(container.depth - 1)])
