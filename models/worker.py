"""What the disposable child processes have in common: limits, a lifeline, and how they report.

What a child has to say goes to stdout, one JSON object a line: {"stage": ...} while it works, then
{"result": ...} or {"error": {"code", "message"}}.
"""

import argparse
import errno
import json
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from fusion.errors import BadFile, ClearfoldError

Say = Callable[[str], None]

# As libraries and the dynamic loader word it that raise no OSError with a number.
_FULL = ("No space left on device", "Disk quota exceeded")
_SHORT = (
    "can't allocate memory",
    "annot allocate memory",
    "bad_alloc",
    "bad allocation",
    "failed to map segment",
    "can't start new thread",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", type=int, help="bytes of data that this process may hold")
    parser.add_argument("--seconds", type=int, help="seconds of processor time")
    parser.add_argument("--lifeline", action="store_true", help="end when stdin is closed")


def run(options: argparse.Namespace, work: Callable[[Say], dict[str, Any]]) -> int:
    """Do the work within the limits and report what came of it; returns the exit code."""
    tell = _own_stdout()
    if options.lifeline:
        _follow(sys.stdin)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, options.memory)
    _limit(resource.RLIMIT_FSIZE, options.memory)
    _limit(resource.RLIMIT_CPU, options.seconds)
    try:
        tell({"result": work(lambda stage: tell({"stage": stage}))})
    except Exception as error:
        traceback.print_exc()  # to stderr, for the server's log
        tell({"error": explained(error)})
        return 1
    return 0


def explained(error: Exception) -> dict[str, str]:
    """What to tell the user of an error."""
    text = str(error).strip()
    if isinstance(error, ClearfoldError):
        return {"code": error.code, "message": text}
    short = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if short or any(words in text for words in _SHORT):
        return {
            "code": "conversion-out-of-memory",
            "message": "The network needs more memory than its conversion is allowed: raise the server's "
            "CLEARFOLD_CONVERSION_MEMORY, or state a smaller input size.",
        }
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or any(words in text for words in _FULL):
        return {
            "code": "disk-full",
            "message": "The disk of the model store is full, so nothing was stored: delete networks that are "
            "no longer needed, or give the server's data folder more room.",
        }
    first = text.splitlines()[0] if text else "no further word"
    return {
        "code": BadFile.code,
        "message": f"The file could not be converted ({type(error).__name__}: {first[:300]}). "
        "Check that it runs in its own framework, and export it again.",
    }


def _limit(kind: int, value: int | None) -> None:
    if value is not None:
        with suppress(ValueError, OSError):  # a stricter limit is already there, or the system knows none
            resource.setrlimit(kind, (value, value))


def _follow(stream: TextIO) -> None:
    """End with the process that holds the other end of stdin, however that one ends."""

    def wait() -> None:
        while stream.read(4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _own_stdout() -> Callable[[dict[str, Any]], None]:
    """A way to say things on stdout that no library's print gets mixed up with."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    return say
