"""The disposable child process: confines itself, then does one piece of work on something from outside.

    python -m models.worker [--read PATH] [--write FOLDER] [--zoo] [--memory BYTES] [--seconds N] [--lifeline]
                            [--wait] convert|export ARGUMENTS

With --wait the program and its arguments come later, on stdin, as one line of JSON: the process has loaded by then
what it needs.

Nothing heavy is imported before the process is confined: torch starts threads, and those would stay free. What
the child has to say goes to stdout, one JSON object a line: {"confined": ...} first, {"stage": ...} while it
works, then {"result": ...} or {"error": {"code", "message"}}.
"""

import argparse
import errno
import importlib
import json
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from models import sandbox

Say = Callable[[str], None]
Work = Callable[[Sequence[str], Say], dict[str, Any]]

# What there is to do -> the module whose `work(arguments, say)` does it.
_PROGRAMS = {"convert": "models.convert", "export": "models.export"}

_MESSAGE = 4000  # characters; the parent listens to no more

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Confine this process, do the work and report what came of it; returns the exit code."""
    options = _arguments(arguments)
    tell = _own_stdout()
    confinement = sandbox.confine(
        _profile(options), sandbox.Limits(options.memory, options.memory, options.seconds)
    )
    tell({"confined": confinement.to_json()})
    program, given = options.program, options.arguments
    if options.wait:
        importlib.import_module("models.rehearsal").rehearse()
        program, *given = json.loads(
            sys.stdin.readline() or "[null]"
        )  # it may be that there is nothing to do
    if options.lifeline:
        _follow(sys.stdin)
    if program is None:
        return 0
    try:
        work: Work = importlib.import_module(_PROGRAMS[program]).work
        tell({"result": work(given, lambda stage: tell({"stage": stage}))})
    except Exception as error:
        traceback.print_exc()  # to stderr, for the server's log
        tell({"error": explained(error)})
        return 1
    return 0


def explained(error: Exception) -> dict[str, str]:
    """What to tell the user of an error."""
    from fusion.errors import BadFile, ClearfoldError

    text = _shortened(str(error).strip())
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


def _shortened(text: str) -> str:
    """Without its middle where it is long: files have names of any length, and the end says what to do."""
    half = _MESSAGE // 2 - 3
    return text if len(text) <= _MESSAGE else f"{text[:half]} ... {text[-half:]}"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.worker", description=__doc__)
    parser.add_argument("--read", type=Path, action="append", default=[], help="a file or folder to work on")
    parser.add_argument("--write", type=Path, help="the folder for results and temporary files")
    parser.add_argument("--zoo", action="store_true", help="a network by name: with caches and the network")
    parser.add_argument(
        "--memory", type=int, help="bytes of data that this process may hold, or write to a file"
    )
    parser.add_argument("--seconds", type=int, help="seconds of processor time")
    parser.add_argument("--lifeline", action="store_true", help="end when stdin is closed")
    parser.add_argument("--wait", action="store_true", help="read the program and its arguments from stdin")
    parser.add_argument("program", nargs="?", choices=_PROGRAMS, help="without one, only say what confines")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def _profile(options: argparse.Namespace) -> sandbox.Profile:
    folder: Path | None = options.write
    if folder is not None:
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)  # the only place for it
    profile = sandbox.for_zoo if options.zoo else sandbox.for_file
    return profile(options.read, [folder] if folder is not None else [])


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


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # taking the libraries down in order takes a second, and nothing here needs it
