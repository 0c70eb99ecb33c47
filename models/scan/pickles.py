"""Pickles, opcode by opcode: which names they call for, and nothing else than torch's picklers write.

Nothing is unpickled. An opcode off the list, a name off the caller's list, or values nested deeper than any network's
are refused.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any

from fusion.errors import BadFile, UnsafeFile
from models.formats.strangers import AGAIN

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
_SILENT = frozenset({"PROTO", "FRAME"})


def scan_pickle(data: bytes, allowed: Allowed, where: str) -> None:
    """Raises UnsafeFile for what no network needs, BadFile for what is no pickle. `where` names file and entry."""
    if len(data) > MAX_BYTES:
        raise UnsafeFile(f"{where} is a pickle of {len(data) >> 20} MiB", "Weights are not kept in pickles.")
    machine = _Machine(allowed, where)
    stream = io.BytesIO(data)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise BadFile(f"{where} is damaged ({error}). {AGAIN}") from error
    if stream.read(1):
        raise UnsafeFile(
            f"{where} goes on after its end", "What follows would be read by nobody, or by surprise."
        )


class _Machine:
    """The pickle machine with depths in place of values: a value's depth is that of what it holds, plus one."""

    def __init__(self, allowed: Allowed, where: str) -> None:
        self.allowed = allowed
        self.where = where
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}

    def step(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            self.name(*str(argument).split(" ", 1))
        if name in _LEAVES:
            self.stack.append(0)
        elif name in _GATHERS:
            self.push(self.take(_GATHERS[name]))
        elif name in _MARKED:
            self.push(self.take_marked())
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

    def take(self, count: int) -> int:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("it takes what is not there")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return max(taken)

    def take_marked(self) -> int:
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return max(taken, default=-1)

    def push(self, depth: int) -> None:
        if depth + 1 > MAX_DEPTH:
            raise UnsafeFile(
                f"{self.where} nests values more than {MAX_DEPTH} deep", "It is made to overflow its reader."
            )
        self.stack.append(depth + 1)

    def fill(self, depth: int) -> None:
        self.push(max(self.take(1) - 1, depth))
