"""Reads changed files in a few confined processes: one that dies or hangs is the file's fault, and another goes on."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.specimens import Specimen, specimens

Row = dict[str, Any]

SECONDS = 60  # for one file
_STARTING = 180
_MOST_FILES = 250  # of one process, so that what torch keeps of each does not add up

_specimens = cache(specimens)


@dataclass(frozen=True)
class Mutant:
    """A changed file: what it was, and what was done to it."""

    index: int
    specimen: Specimen
    mutations: tuple[str, ...]
    data: bytes


def mutant(seed: int, index: int) -> Mutant:
    """The file of this number, the same on every run."""
    random = Random(f"{seed}/{index}")
    every = _specimens()
    specimen = every[index % len(every)]
    data, names = specimen.data, []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = random.choice(specimen.mutations)
        try:
            data = change(data, random)
        except (IndexError, ValueError):  # an earlier change has left nothing to change
            break
        names.append(change.__name__)
    return Mutant(index, specimen, tuple(names), data)


def run(seed: int, indices: Iterable[int], seconds: float = SECONDS) -> Iterator[Row]:
    """One row for each file: `outcome` is read, refused, unclear, crashed or hung."""
    with tempfile.TemporaryDirectory() as place:
        reader = _Reader(Path(place))
        try:
            for index in indices:
                made = mutant(seed, index)
                yield {
                    "index": index,
                    "specimen": made.specimen.name,
                    "mutations": list(made.mutations),
                    **reader.read(made, seconds),
                }
        finally:
            reader.end()


class _Reader:
    """A confined process that is asked for one file after another, started anew where it ended."""

    def __init__(self, place: Path) -> None:
        self._files, self._scratch = place / "files", place / "scratch"
        self._files.mkdir()
        self._scratch.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._count = 0

    def read(self, made: Mutant, seconds: float) -> Row:
        file = self._files / f"mutant{made.specimen.suffix}"
        file.write_bytes(made.data)
        if self._process is None or self._count >= _MOST_FILES:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._count += 1
        asked = {"file": file.name, "size": made.specimen.size}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(seconds)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self.end()
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuzz.reader", str(self._files), str(self._scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=root,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        self._count = 0
        if self._answer(_STARTING) != {"ready": True}:
            raise RuntimeError(
                "The process that reads files does not start: python -m benchmarks.fuzz.reader"
            )

    def _answer(self, seconds: float) -> Row:
        assert self._process is not None
        assert self._process.stdout is not None
        end, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.end()
                return {"outcome": "hung", "seconds": seconds}
            got = os.read(self._process.stdout.fileno(), 2**16)
            if not got:
                code = self._process.wait()
                self.end()
                return {"outcome": "crashed", "message": f"ended with {code}"}
            line += got
        answer: Row = json.loads(line)
        return answer
