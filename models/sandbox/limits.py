"""Limits on what this process may use, by setrlimit(2), which the kernel holds it to."""

import os
import resource
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20

_GRACE = 5  # seconds of processor time between the signal that says why and the one that ends it
_STACK = 64 * MIB
_OPEN_FILES = 512
_THREADS = 512  # more than were running


@dataclass(frozen=True)
class Limits:
    """Bytes of data in memory, bytes of each file written, seconds of processor time; None is no limit."""

    memory: int | None = None
    written: int | None = None
    seconds: int | None = None


def apply(limits: Limits) -> tuple[str, ...]:
    """Lower the limits, for good; returns the names of those that hold."""
    wanted = {
        "core": (resource.RLIMIT_CORE, 0, 0),
        "memory": (resource.RLIMIT_DATA, limits.memory, limits.memory),
        "stack": (resource.RLIMIT_STACK, _STACK, _STACK),
        "written": (resource.RLIMIT_FSIZE, limits.written, limits.written),
        "seconds": (resource.RLIMIT_CPU, limits.seconds, limits.seconds and limits.seconds + _GRACE),
        "files": (resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES),
    }
    held = [name for name, (kind, soft, hard) in wanted.items() if _lower(kind, soft, hard)]
    return (*held, "threads") if _limit_threads() else tuple(held)


def _lower(kind: int, soft: int | None, hard: int | None) -> bool:
    """Never raises a limit that is stricter already."""
    if soft is None or hard is None:
        return False
    now_soft, now_hard = resource.getrlimit(kind)
    hard = hard if now_hard == resource.RLIM_INFINITY else min(hard, now_hard)
    soft = min(soft, hard) if now_soft == resource.RLIM_INFINITY else min(soft, hard, now_soft)
    with suppress(ValueError, OSError):  # the system knows none of this kind
        resource.setrlimit(kind, (soft, hard))
        return True
    return False


def _limit_threads() -> bool:
    """The kernel counts all threads of the user together, also those that are not visible from here, as in
    another container; so the limit is tried before it is for good."""
    if os.getuid() == 0:
        return False  # the kernel holds everyone to it but root
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    most = _threads_of(os.getuid()) + _THREADS
    if hard != resource.RLIM_INFINITY and hard <= most:
        return True
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NPROC, (most, hard))
        if _can_start_one():
            return _lower(resource.RLIMIT_NPROC, most, most)
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    return False


def _can_start_one() -> bool:
    thread = threading.Thread(target=lambda: None)
    try:
        thread.start()
    except RuntimeError:
        return False
    thread.join()
    return True


def _threads_of(user: int) -> int:
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if process.stat().st_uid == user:
                count += sum(1 for _ in (process / "task").iterdir())
    return count
