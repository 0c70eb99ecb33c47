"""Runs conversions and exports: one confined child per piece of work, limited in all it takes, gone with its parent."""

import json
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from app import admission
from app.child import Allowance, Child, Confined, Outcome, Say, start
from app.spare import Spare, Workspace
from fusion.errors import ClearfoldError
from models.store import BUILTIN

_log = logging.getLogger(__name__)

SHUTTING_DOWN = "model-not-ready"
_LOGGED = 4000  # characters of stderr


class ConversionFailed(ClearfoldError):
    """The conversion process found something wrong, or ended without a word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Request:
    """What to convert, and what the user says about it."""

    source: Path | str  # a str is the name of a zoo network
    data: tuple[str, ...] = ()  # of its data files in the same folder; no other file there is let in
    size: tuple[int, int] | None = None
    description: dict[str, Any] | None = None
    name: str | None = None
    refused: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        options = [str(self.source)]
        if isinstance(self.source, str):
            options.append("--zoo")
        if self.size:
            options += ["--size", f"{self.size[0]}x{self.size[1]}"]
        if self.description:
            options += ["--description", json.dumps(self.description)]
        if self.name:
            options += [f"--name={self.name}"]
        for format_name in self.refused:
            options += ["--refuse", format_name]
        options += [f"--data={name}" for name in self.data]
        return options


class Converter:
    """Starts conversion processes and knows which ones are alive. Safe to use from several threads."""

    def __init__(
        self, seconds: float = 120, memory: int | None = None, workspace: Workspace | None = None
    ) -> None:
        """workspace: where a spare child waits once `prepare` has been called; without, each is started anew."""
        self.seconds = seconds
        self.memory = memory
        self._spare = Spare(workspace, self._limits()) if workspace else None
        self._alive: set[Child] = set()
        self._closed = False

    def prepare(self) -> None:
        """Have a child ready for the next file."""
        if self._spare is not None:
            self._spare.prepare()

    def run(self, request: Request, folder: Path, say: Say = lambda stage: None) -> dict[str, Any]:
        """Write the artefact to `folder/artefact` and return its manifest.

        Raises ConversionFailed, and the errors of `admission.artefact` where what the child wrote is no artefact.
        """
        source, *described = request.arguments()

        def program(file: Path | str, scratch: Path) -> list[str]:
            return ["convert", *described, "--", str(file), str(scratch)]

        if isinstance(request.source, str):
            scratch = _scratch(folder)
            elsewhere = request.source != BUILTIN  # its weights come with the package
            options = ["--zoo"] if elsewhere else []
            self._work(options, program(source, scratch), folder, say, zoo=elsewhere)
            return admission.artefact(scratch, folder / "artefact", self.memory)
        with self._spare.taken() if self._spare else nullcontext() as waiting:
            if waiting is not None and waiting.take(request.source, request.data, program):
                scratch = waiting.scratch
                self._finish(waiting.child, "convert", say)
            else:
                scratch = _scratch(folder)
                files = [source, *(str(request.source.parent / name) for name in request.data)]
                readable = [option for file in files for option in ("--read", file)]
                self._work(readable, program(source, scratch), folder, say)
            return admission.artefact(scratch, folder / "artefact", self.memory)

    def export(self, artefact: Path, file: Path) -> None:
        """Write a stored network as a .onnx or .pt2 file. Raises ConversionFailed."""
        scratch = _scratch(file.parent)
        draft = scratch / file.name
        self._work(["--read", str(artefact)], ["export", "--", str(artefact), str(draft)], file.parent)
        admission.take(scratch, file.parent, {file.name: self.memory})

    def confinement(self) -> Confined:
        """What holds a conversion on this system. Raises ConversionFailed."""
        with TemporaryDirectory() as folder:
            outcome = self._work([], [], Path(folder))
        assert outcome.confined is not None  # it is the first that a child says
        return outcome.confined

    def close(self) -> None:
        """End all conversions."""
        self._closed = True
        if self._spare is not None:
            self._spare.close()
        for child in tuple(self._alive):
            child.process.kill()

    def _work(
        self,
        options: Sequence[str],
        program: Sequence[str],
        folder: Path,
        say: Say = lambda stage: None,
        *,
        zoo: bool = False,
    ) -> Outcome:
        with (folder / "stderr").open("w+b") as stderr:
            child = start([*options, *self._limits()], program, _scratch(folder), stderr, zoo=zoo)
            return self._finish(child, program[0] if program else None, say)

    def _finish(self, child: Child, program: str | None, say: Say) -> Outcome:
        self._alive.add(child)
        try:
            outcome = child.follow(Allowance(self.seconds, self.memory), say)
        finally:
            self._alive.discard(child)
        if _succeeded(outcome, program):
            return outcome
        child.stderr.seek(max(0, child.stderr.seek(0, os.SEEK_END) - _LOGGED))
        last = child.stderr.read().decode(errors="replace")
        _log.warning("%s ended with %s: %s", program or "worker", outcome.code, last)
        raise self._failed(outcome)

    def _limits(self) -> list[str]:
        seconds = round(self.seconds * (os.cpu_count() or 1) + 1)
        memory = ["--memory", str(self.memory)] if self.memory else []
        return ["--seconds", str(seconds), *memory, "--lifeline"]

    def _failed(self, outcome: Outcome) -> ConversionFailed:
        code = outcome.code
        if outcome.failure is not None:
            return ConversionFailed(outcome.failure.code, _plain(outcome.failure.message))
        if self._closed:
            return ConversionFailed(SHUTTING_DOWN, "The server is shutting down: upload it again later.")
        if outcome.ended_for == "time" or code == -signal.SIGXCPU:
            return ConversionFailed(
                "conversion-timeout",
                f"The conversion took longer than {self.seconds:g} seconds and was ended: raise "
                "CLEARFOLD_CONVERSION_SECONDS if the network is that large.",
            )
        if outcome.ended_for == "disk" or code == -signal.SIGXFSZ:
            return ConversionFailed(
                "conversion-out-of-memory",
                "The conversion wrote more than it is allowed and was ended: raise the server's "
                "CLEARFOLD_CONVERSION_MEMORY, which bounds that too, if the network is that large.",
            )
        if code == -signal.SIGKILL and outcome.ended_for is None:
            return ConversionFailed(
                "conversion-out-of-memory",
                "The conversion was killed by the system, most likely for want of memory: "
                "give the server more memory, or upload a smaller network.",
            )
        if outcome.ended_for == "talk":
            return ConversionFailed(
                "conversion-failed",
                "The process that read the file was ended, because what it reported made no sense; the server goes "
                "on. Check that the file runs in its own framework, and export it again.",
            )
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ConversionFailed(
            "conversion-failed",
            f"The file crashed the process that read it ({how}); the server goes on. "
            "Check that the file runs in its own framework, and export it again.",
        )


def _scratch(folder: Path) -> Path:
    """The only folder that a child may write to; the file that it reads is beside it."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return scratch


def _succeeded(outcome: Outcome, program: str | None) -> bool:
    if program is None:
        return outcome.confined is not None and outcome.code == 0
    return outcome.done and outcome.failure is None and outcome.ended_for is None


def _plain(text: str) -> str:
    """Text of a child's without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else " " for c in text)
