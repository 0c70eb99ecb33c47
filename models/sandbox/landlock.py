"""Landlock: from here on this process opens only the files it is granted (Linux's userspace-api/landlock.rst).

Best effort by the kernel's ABI: what an older kernel cannot forbid, it is not asked to.
"""

import ctypes
import os
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path

from models.sandbox.kernel import Machine, Syscall, Unavailable
from models.sandbox.numbers import number

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1


class Access(IntFlag):
    """Rights on files and folders; what is not granted anywhere is denied everywhere."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Access.READ_FILE | Access.READ_DIR
# No links, devices, pipes or sockets: whoever takes the results meets files and folders only.
WRITE = (
    READ
    | Access.WRITE_FILE
    | Access.TRUNCATE
    | Access.MAKE_REG
    | Access.MAKE_DIR
    | Access.REMOVE_FILE
    | Access.REMOVE_DIR
    | Access.REFER
)
_ON_FILES = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV

_FIRST = Access(2 * Access.MAKE_SYM - 1)
_SINCE = {2: Access.REFER, 3: Access.TRUNCATE, 5: Access.IOCTL_DEV}  # ABI -> what it added
_TCP = 0b11  # bind, connect: since ABI 4
_SCOPES = 0b11  # abstract unix sockets, signals: since ABI 6


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def handled(abi: int) -> Access:
    """All rights that a kernel of this ABI can deny."""
    found = _FIRST
    for since, added in _SINCE.items():
        if abi >= since:
            found |= added
    return found


def version(machine: Machine, call: Syscall) -> int:
    """The kernel's ABI of Landlock, 1 or more. Raises Unavailable."""
    try:
        create = number("landlock_create_ruleset", machine)
        return call(create, None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        raise Unavailable(f"the kernel has no Landlock ({error.strerror})") from error


def restrict(
    machine: Machine,
    call: Syscall,
    *,
    readable: Iterable[Path],
    writable: Iterable[Path],
    network: bool = False,
) -> int:
    """Grant what is `readable` and `writable`, with all that is beneath, and nothing else; paths that do not
    exist are left out. Without `network` no TCP either. Returns the kernel's ABI; raises Unavailable."""
    abi = version(machine, call)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    rules = _Ruleset(handled(abi), 0 if network else _TCP, _SCOPES)
    try:
        ruleset = call(number("landlock_create_ruleset", machine), ctypes.byref(rules), size, 0)
        try:
            for paths, access in ((readable, READ), (writable, WRITE)):
                for path in paths:
                    _grant(machine, call, ruleset, path, access & handled(abi))
            call(number("landlock_restrict_self", machine), ruleset, 0)
        finally:
            os.close(ruleset)
    except OSError as error:
        raise Unavailable(f"Landlock could not be set up ({error.strerror})") from error
    return abi


def _grant(machine: Machine, call: Syscall, ruleset: int, path: Path, access: Access) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        allowed = access if path.is_dir() else access & _ON_FILES
        rule = _PathBeneath(allowed, place)
        call(number("landlock_add_rule", machine), ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(place)
