"""A confined child process that runs a piece of code and says what came of it."""

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

import models

ROOT = Path(models.__file__).parents[1]

_CHILD = """
import json, os, sys, tempfile
from pathlib import Path
sys.path.insert(0, {root!r})
from models import sandbox
from models.sandbox.kernel import syscall
tempfile.tempdir = {folder!r}
profile = sandbox.{profile}([Path({source!r})], [Path({folder!r})])
{before}
confinement = sandbox.confine(profile, sandbox.Limits({limits}), syscall)

def tried(work):
    try:
        return repr(work())
    except Exception as error:
        return type(error).__name__

said = {{"confinement": confinement.to_json()}}
{code}
sys.stdout.write(json.dumps(said))
"""


@dataclass(frozen=True)
class Cell:
    """Where confined code runs: the file that it may read, and the folder that it may write to."""

    source: Path
    folder: Path

    def run(self, code: str, **options: str) -> dict[str, str]:
        """What the code left in `said`. Raises CalledProcessError where it ended by itself."""
        done = self.start(code, **options)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def start(
        self, code: str, *, before: str = "", profile: str = "for_file", limits: str = "2**33, 2**33, 300"
    ) -> "subprocess.CompletedProcess[str]":
        """Run the code, with `before` ahead of the confinement."""
        filled = _CHILD.format(
            root=str(ROOT),
            folder=str(self.folder),
            source=str(self.source),
            profile=profile,
            limits=limits,
            before=textwrap.dedent(before),
            code=textwrap.dedent(code),
        )
        command = [sys.executable, "-c", filled]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, cwd=self.folder
        )

    def try_all(self, *expressions: str, **options: str) -> dict[str, str]:
        """Each expression's value as text, or the name of the error it ended with."""
        code = "\n".join(f"said[{expression!r}] = tried(lambda: {expression})" for expression in expressions)
        said = self.run(
            f"import ctypes, mmap, os, shutil, signal, socket, subprocess, threading\n{code}", **options
        )
        return {expression: said[expression] for expression in expressions}


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    source, folder = tmp_path / "upload.bin", tmp_path / "scratch"
    source.write_text("from outside")
    folder.mkdir()
    return Cell(source, folder)


@pytest.fixture
def landlock() -> None:
    """Only where the kernel has it."""
    from models.sandbox import kernel
    from models.sandbox.landlock import version

    try:
        version(kernel.machine(), kernel.syscall)
    except kernel.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def seccomp() -> None:
    """Only on machines whose system calls are known."""
    from models.sandbox import kernel

    try:
        kernel.machine()
    except kernel.Unavailable as error:
        pytest.skip(str(error))
