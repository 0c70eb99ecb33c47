"""Privileges: none can be gained any more, and what a server has that runs as root is laid down (capabilities(7))."""

import ctypes

from models.sandbox.kernel import Machine, Syscall, Unavailable
from models.sandbox.numbers import number

_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3 = 0x20080522
# Reading files whoever owns them stays: the interpreter may be another user's. Landlock says which.
_KEPT = 1 << 2  # CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def drop(machine: Machine, call: Syscall) -> None:
    """Keep only the right to read files, where it is held, and gain no other. Raises Unavailable."""
    kept = _permitted() & _KEPT
    sets = (_Sets * 2)(_Sets(kept, kept, 0), _Sets(0, 0, 0))
    try:
        # Without this, Landlock and seccomp are for privileged processes only.
        call(number("prctl", machine), _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call(number("capset", machine), ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(sets))
    except OSError as error:
        raise Unavailable(f"privileges could not be dropped ({error.strerror})") from error


def _permitted() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("CapPrm:"))
    except (OSError, StopIteration) as error:
        raise Unavailable("the system does not say which capabilities there are") from error
    return int(line.split()[1], 16)
