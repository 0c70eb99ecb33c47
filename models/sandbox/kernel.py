"""Raw system calls: what the confinement asks of the kernel, by number, for the machines it knows."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A system call by its number and arguments: its result, or OSError.
Syscall = Callable[..., int]


@dataclass(frozen=True)
class Machine:
    """A processor architecture, as seccomp and the tables of system calls tell them apart."""

    audit: int  # AUDIT_ARCH_*, linux/audit.h
    column: int  # in `numbers.NUMBERS`
    foreign: int | None  # numbers from here on belong to another calling convention


MACHINES = {
    "x86_64": Machine(audit=0xC000003E, column=0, foreign=0x40000000),
    "aarch64": Machine(audit=0xC00000B7, column=1, foreign=None),
}


class Unavailable(Exception):
    """A layer of confinement that this system does not have; says why."""


def machine() -> Machine:
    """This process's. Raises Unavailable."""
    if sys.platform != "linux":
        raise Unavailable("this system is not Linux")
    name = platform.machine()
    if name not in MACHINES or sys.maxsize < 2**32:
        raise Unavailable(f"no table of system calls for {name}")
    return MACHINES[name]


def syscall(number: int, *arguments: Any) -> int:
    """Call the kernel: arguments are ints, None (a null pointer) or ctypes references. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(libc.syscall(ctypes.c_long(number), *converted))
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
