"""One child process: started, listened to, watched and ended.

It is not trusted: whatever it says or writes is bounded.
"""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import models

Say = Callable[[str], None]

_LINES = 1000
_LINE = 2**16  # bytes
_ENTRIES = 2000  # files and folders at a time
_PERIOD = 0.25  # seconds between two looks at what it has written

# What a child may know of the server's environment. Secrets are not among it.
_ENVIRONMENT = (
    *("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV"),
    "OMP_NUM_THREADS",
)
# A zoo network comes from what the user has installed and downloaded, so it is told where that is.
_ZOO_ENVIRONMENT = (
    *("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_OFFLINE", "SSL_CERT_FILE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)


class Failure(BaseModel):
    """What a child says went wrong."""

    code: str = Field(pattern=r"^[a-z][a-z-]{0,39}$")
    message: str = Field(max_length=4000)


class Confined(BaseModel):
    """What holds a child, by layer, and why what is missing does not."""

    layers: dict[str, str] = Field(max_length=20)
    missing: dict[str, str] = Field(max_length=20)


class _Message(BaseModel):
    """One line of a child."""

    model_config = ConfigDict(extra="forbid", strict=True)

    confined: Confined | None = None
    stage: str | None = Field(None, pattern=r"^[a-z ]{1,40}$")
    result: dict[str, Any] | None = None
    error: Failure | None = None


@dataclass
class Outcome:
    """What became of a child: what it said, how it ended, and why it was ended, if it was."""

    confined: Confined | None = None
    done: bool = False
    failure: Failure | None = None
    code: int = 0
    ended_for: Literal["time", "disk", "talk"] | None = None


@dataclass(frozen=True)
class Allowance:
    """Seconds that a child may take, and bytes that it may have on the disk."""

    seconds: float
    disk: int | None = None


@dataclass(eq=False)
class Child:
    """A running child; `folder` is the one that it may write to."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    stderr: BinaryIO
    outcome: Outcome = field(default_factory=Outcome)

    def send(self, program: Sequence[str]) -> bool:
        """Give work to a child that waits for it; whether it is there to take it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(program).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return False
        return self.process.poll() is None

    def follow(self, allowance: Allowance, say: Say) -> Outcome:
        """Listen until it says no more, within the allowance, and end it."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(allowance, over), daemon=True)
        watch.start()
        try:
            self._listen(say)
            self.outcome.code = self.process.wait()
        finally:
            over.set()
            watch.join()
            self.end()
        return self.outcome

    def end(self) -> None:
        """Whatever of it still runs, runs no more."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, 9)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _listen(self, say: Say) -> None:
        assert self.process.stdout is not None
        for _ in range(_LINES):
            line = self.process.stdout.readline(_LINE)
            if not line.endswith(b"\n") and len(line) < _LINE:
                return  # that was all, or it died in the middle of a word
            try:
                message = _Message.model_validate_json(line)
            except ValidationError:
                break
            self._hear(message, say)
        self._stop("talk")

    def _hear(self, message: _Message, say: Say) -> None:
        outcome = self.outcome
        if message.stage is not None:
            say(message.stage)
        if message.confined is not None and outcome.confined is None:  # it can be believed before it reads
            outcome.confined = message.confined
        outcome.done = outcome.done or message.result is not None
        outcome.failure = message.error or outcome.failure

    def _watch(self, allowance: Allowance, over: threading.Event) -> None:
        deadline = time.monotonic() + allowance.seconds
        while not over.wait(min(_PERIOD, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return self._stop("time")
            if allowance.disk is not None and self._occupied() > allowance.disk:
                return self._stop("disk")

    def _stop(self, reason: Literal["time", "disk", "talk"]) -> None:
        if self.process.poll() is None:
            self.outcome.ended_for = reason
            self.process.kill()

    def _occupied(self) -> float:
        """Bytes on the disk in its folder, in what it says, and in files that have no name any more."""
        blocks: float = os.fstat(self.stderr.fileno()).st_blocks
        return 512 * (blocks + _blocks_in(self.folder) + _blocks_unnamed(self.process.pid))


def start(
    options: Sequence[str], program: Sequence[str], folder: Path, stderr: BinaryIO, *, zoo: bool = False
) -> Child:
    """Start the worker with its options and a program to run; `folder` is where it may write."""
    # -P: the folder holds files from outside, so it must not be a place to import from.
    command = [sys.executable, "-P", "-m", "models.worker", *options, "--write", str(folder), *program]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=folder,
        env=_environment(zoo) | {"TMPDIR": str(folder)},
        start_new_session=True,
    )
    return Child(process, folder, stderr)


def _environment(zoo: bool) -> dict[str, str]:
    known = _ENVIRONMENT + (_ZOO_ENVIRONMENT if zoo else ())
    return {name: os.environ[name] for name in known if name in os.environ} | {
        "PYTHONPATH": str(Path(models.__file__).resolve().parent.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # Weights go back to the system when they are freed: without, the C library keeps ever larger blocks.
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
    }


def _blocks_in(folder: Path) -> float:
    """Blocks of 512 bytes; infinity for what cannot be looked into, and for more entries than anybody needs."""
    blocks, entries, todo = 0, 0, [folder]
    while todo:
        try:
            with os.scandir(todo.pop()) as found:
                for entry in found:
                    entries += 1
                    if entries > _ENTRIES:
                        return float("inf")
                    with suppress(FileNotFoundError):  # removed meanwhile
                        blocks += entry.stat(follow_symlinks=False).st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(Path(entry.path))
        except FileNotFoundError:
            continue
        except OSError:
            return float("inf")
    return blocks


def _blocks_unnamed(pid: int) -> int:
    """Blocks of files that the process has open and that are in no folder."""
    blocks = 0
    with suppress(OSError):  # it has ended, or the system has no /proc
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found = os.stat(entry.path)
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
                    blocks += found.st_blocks
    return blocks
