"""Runs the conversion process: one child per file, limited in time and memory, and gone with its parent."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import models
from fusion.errors import ClearfoldError

_log = logging.getLogger(__name__)

Say = Callable[[str], None]

# What a conversion may know of the server's environment. Secrets are not among it.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
# A zoo network comes from what the user has installed and downloaded, so it is told where that is.
_ZOO_ENVIRONMENT = (
    *("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_OFFLINE", "SSL_CERT_FILE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
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
        return options


class Converter:
    """Starts conversion processes and knows which ones are alive. Safe to use from several threads."""

    def __init__(self, seconds: float = 120, memory: int | None = None) -> None:
        self.seconds = seconds
        self.memory = memory
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def run(self, request: Request, folder: Path, say: Say = lambda stage: None) -> dict[str, Any]:
        """Write the artefact to `folder/artefact` and return its manifest. Raises ConversionFailed."""
        source, *options = request.arguments()
        arguments = ["models.convert", *options, *self._limits(), "--", source, str(folder / "artefact")]
        return self._work(arguments, folder, _environment(zoo=isinstance(request.source, str)), say)

    def export(self, artefact: Path, file: Path) -> None:
        """Write a stored network as a .onnx or .pt2 file. Raises ConversionFailed."""
        arguments = ["models.export", *self._limits(), "--", str(artefact), str(file)]
        self._work(arguments, file.parent, _environment(), lambda stage: None)

    def _work(
        self, arguments: list[str], folder: Path, environment: dict[str, str], say: Say
    ) -> dict[str, Any]:
        with (folder / "stderr").open("w+b") as stderr:
            child = _start(arguments, folder, {**environment, "TMPDIR": str(folder)}, stderr)
            self._alive.add(child)
            clock = threading.Timer(self.seconds, child.kill)
            clock.start()
            try:
                outcome = _listen(child, say)
                code = child.wait()
                timed_out = clock.finished.is_set() and code == -signal.SIGKILL
            finally:
                clock.cancel()
                _end(child)
                self._alive.discard(child)
            if "result" in outcome:
                return dict(outcome["result"])
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _LOGGED))
            last = stderr.read().decode(errors="replace")
            _log.warning("%s ended with %s: %s", arguments[0], code, last)
        if "error" in outcome:
            raise ConversionFailed(**outcome["error"])
        raise self._silence(code, timed_out)

    def close(self) -> None:
        """End all conversions."""
        self._closed = True
        for child in tuple(self._alive):
            child.kill()

    def _limits(self) -> list[str]:
        seconds = round(self.seconds * (os.cpu_count() or 1) + 1)
        memory = ["--memory", str(self.memory)] if self.memory else []
        return ["--seconds", str(seconds), *memory, "--lifeline"]

    def _silence(self, code: int, timed_out: bool) -> ConversionFailed:
        if self._closed:
            return ConversionFailed("model-not-ready", "The server is shutting down: upload it again later.")
        if timed_out or code == -signal.SIGXCPU:
            return ConversionFailed(
                "conversion-timeout",
                f"The conversion took longer than {self.seconds:g} seconds and was ended: raise "
                "CLEARFOLD_CONVERSION_SECONDS if the network is that large.",
            )
        if code == -signal.SIGKILL:
            return ConversionFailed(
                "conversion-out-of-memory",
                "The conversion was killed by the system, most likely for want of memory: "
                "give the server more memory, or upload a smaller network.",
            )
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ConversionFailed(
            "conversion-failed",
            f"The file crashed the process that read it ({how}); the server goes on. "
            "Check that the file runs in its own framework, and export it again.",
        )


def _environment(zoo: bool = False) -> dict[str, str]:
    known = _ENVIRONMENT + (_ZOO_ENVIRONMENT if zoo else ())
    return {name: os.environ[name] for name in known if name in os.environ} | {
        "PYTHONPATH": str(Path(models.__file__).resolve().parent.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _start(
    arguments: list[str], folder: Path, environment: dict[str, str], stderr: BinaryIO
) -> "subprocess.Popen[bytes]":
    # -P: the folder holds the file from outside, so it must not be a place to import from.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def _listen(child: "subprocess.Popen[bytes]", say: Say) -> dict[str, Any]:
    """Read what the child says until it says no more; the last word is the outcome."""
    assert child.stdout is not None
    outcome: dict[str, Any] = {}
    for line in child.stdout:
        try:
            message = json.loads(line)
        except ValueError:  # it died in the middle of a word
            break
        if "stage" in message:
            say(str(message["stage"]))
        else:
            outcome = message
    return outcome


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is None:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
