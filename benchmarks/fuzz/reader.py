"""The process that reads changed files, as confined as that of a conversion, but for many files.

    python -m benchmarks.fuzz.reader FOLDER SCRATCH

A line on stdin asks for a file: {"file": name in FOLDER, "size": [height, width] or null}; a line on stdout answers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from models import sandbox  # all that may be imported before a process is confined

MEMORY = 4 * 2**30


def main(folder: Path, scratch: Path) -> None:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    sandbox.confine(sandbox.for_file([folder], [scratch]), sandbox.Limits(MEMORY, MEMORY))
    from models.rehearsal import rehearse

    rehearse()
    _say(channel, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        _say(channel, attempt(folder / asked["file"], scratch, asked["size"]))


def attempt(file: Path, scratch: Path, size: list[int] | None) -> dict[str, Any]:
    """Convert a file, and what came of it: the error's code and text as a user would see them, where one was raised,
    and by what."""
    from fusion.errors import ClearfoldError
    from models.convert import convert
    from models.worker import explained

    began = time.monotonic()
    artefact = scratch / "artefact"
    outcome: dict[str, Any] = {"outcome": "read"}
    try:
        convert(file, artefact, size=(size[0], size[1]) if size else None)
    except Exception as error:
        said = explained(error)
        clear = isinstance(error, ClearfoldError) or said["code"] == "conversion-out-of-memory"
        root = _root(error)
        outcome = {
            "outcome": "refused" if clear and not _is_slip(root, said["message"]) else "unclear",
            **said,
            "raised": type(root).__name__,
            "where": _where(root),
        }
    shutil.rmtree(artefact, ignore_errors=True)
    return {**outcome, "seconds": round(time.monotonic() - began, 2)}


# What is raised where a value was used before it was looked at, also if somebody caught it and said "damaged": these,
# and Python's words of calls and values that do not fit, where they reach the user.
_SLIPS = (
    AttributeError,
    KeyError,
    AssertionError,
    RecursionError,
    NameError,
    StopIteration,
    ZeroDivisionError,
)
_WORDS = re.compile(
    r"positional argument|keyword argument|unpack|zip\(\) argument|subscriptable|unsupported operand|not iterable"
    r"|index out of range|has no (attribute|len)|is not in (list|tuple)|invalid literal|object (is|has)|not supported "
    r"between|must be (str|bytes|int)|cannot be interpreted as an integer|is not a valid|NoneType"
)


# What an operator's own function says of indices and lengths, once the layer is named and said not to fit.
_FITTING = "do not fit together"


def _is_slip(error: BaseException, message: str) -> bool:
    if isinstance(error, TypeError | ValueError | IndexError) and _FITTING not in message:
        return bool(_WORDS.search(message))
    return isinstance(error, _SLIPS)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _where(error: BaseException) -> str:
    """The last lines of our own that led to it, and the very last."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).resolve().parents[2])
    own = [f for f in frames if f.filename.startswith(root) and "site-packages" not in f.filename]
    shown = [*own[-2:], *frames[-1:]]
    return " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in shown)


def _say(channel: Any, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
