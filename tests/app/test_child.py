"""A child is not trusted: what it says and writes is bounded, and the process that listens goes on."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from app.child import Allowance, Child, Outcome
from tests.support.served import eventually

ALLOWANCE = Allowance(60, 2**26)


@pytest.fixture
def stderr(tmp_path: Path) -> Iterator[BinaryIO]:
    with (tmp_path / "stderr").open("w+b") as file:
        yield file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "scratch"
    made.mkdir()
    return made


def follow(
    code: str, folder: Path, stderr: BinaryIO, allowance: Allowance = ALLOWANCE
) -> tuple[Outcome, list[str]]:
    """What becomes of a child that runs this code, and the stages that were heard of."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import json, os, sys, time\n{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=folder,
        start_new_session=True,
    )
    stages: list[str] = []
    outcome = Child(process, folder, stderr).follow(allowance, stages.append)
    assert process.poll() is not None
    return outcome, stages


class TestWhatItSays:
    def test_is_heard_line_by_line(self, folder: Path, stderr: BinaryIO) -> None:
        code = """
print(json.dumps({"confined": {"layers": {"seccomp": "no network"}, "missing": {}}}))
print(json.dumps({"stage": "opening"}))
print(json.dumps({"result": {}}))
"""
        outcome, stages = follow(code, folder, stderr)
        assert (outcome.done, outcome.failure, outcome.code, outcome.ended_for) == (True, None, 0, None)
        assert outcome.confined is not None
        assert outcome.confined.layers == {"seccomp": "no network"}
        assert stages == ["opening"]

    @pytest.mark.parametrize(
        "line",
        [
            "'x' * 10**6",  # too long
            "'[' * 60000",  # too deep
            "'nonsense'",
            "json.dumps({'stage': '\\033[2J'})",  # a command to a terminal
            "json.dumps({'stage': 'x' * 1000})",
            "json.dumps({'result': 1})",
            "json.dumps({'error': {'code': '../../etc', 'message': ''}})",
            "json.dumps({'error': {'code': 'bad-file', 'message': 'x' * 5000}})",
            "json.dumps({'what': 'else'})",
            "json.dumps({'result': {}, 'unknown': 1})",
            "'{\"result\": {}, \"n\": ' + '9' * 50000 + '}'",
        ],
    )
    def test_nonsense_ends_it(self, line: str, folder: Path, stderr: BinaryIO) -> None:
        outcome, stages = follow(f"print({line}, flush=True); time.sleep(60)", folder, stderr)
        assert (outcome.done, outcome.failure, outcome.ended_for, stages) == (False, None, "talk", [])

    def test_without_end_ends_it(self, folder: Path, stderr: BinaryIO) -> None:
        code = 'while True: print(\'{"stage": "opening"}\', flush=True)'
        outcome, stages = follow(code, folder, stderr)
        assert outcome.ended_for == "talk"
        assert len(stages) <= 1000

    def test_a_second_confinement_is_not_believed(self, folder: Path, stderr: BinaryIO) -> None:
        code = """
for layers in ({}, {"landlock": "of course"}):
    print(json.dumps({"confined": {"layers": layers, "missing": {}}}))
"""
        confined = follow(code, folder, stderr)[0].confined
        assert confined is not None
        assert confined.layers == {}


class TestWhatItWrites:
    @pytest.mark.parametrize(
        "code",
        [
            "open('large', 'wb').write(bytes(100 * 2**20))",
            "[open(str(i), 'wb').write(bytes(2**20)) for i in range(100)]",
            "os.mkdir('a'); os.mkdir('a/b'); open('a/b/large', 'wb').write(bytes(100 * 2**20))",
            "file = open('large', 'wb'); os.unlink('large'); file.write(bytes(100 * 2**20)); file.flush()",
            "sys.stderr.write('x' * 100 * 2**20)",
            "[open(str(i), 'w') for i in range(3000)]",  # none of them large
        ],
        ids=["a file", "files", "in folders", "without a name", "complaints", "many"],
    )
    def test_too_much_ends_it(self, code: str, folder: Path, stderr: BinaryIO) -> None:
        outcome, _ = follow(f"import resource\n{code}\ntime.sleep(60)", folder, stderr)
        assert outcome.ended_for == "disk"

    def test_what_is_allowed_does_not(self, folder: Path, stderr: BinaryIO) -> None:
        code = "open('file', 'wb').write(bytes(2**20)); os.symlink('/', 'all'); time.sleep(1)"
        assert follow(code, folder, stderr)[0].ended_for is None


class TestItsEnd:
    def test_its_time_is_up(self, folder: Path, stderr: BinaryIO) -> None:
        start = time.monotonic()
        outcome, _ = follow("time.sleep(60)", folder, stderr, Allowance(0.5))
        assert (outcome.ended_for, outcome.code) == ("time", -9)
        assert time.monotonic() - start < 20

    def test_it_leaves_nobody_behind(self, folder: Path, stderr: BinaryIO) -> None:
        """Where the system has no seccomp a child could have children; they end with it."""
        code = """
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(300)
open("pid", "w").write(str(child))
"""
        follow(code, folder, stderr)
        pid = int((folder / "pid").read_text())
        eventually(lambda: not _runs(pid), seconds=20)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
