"""Files changed at random are read, or refused by a clear error: never anything else."""

import json
from collections.abc import Iterable

import pytest

from app.problems import KINDS
from benchmarks.fuzz.__main__ import FINDINGS
from benchmarks.fuzz.messages import parse, write
from benchmarks.fuzz.mutations import ARCHIVES_CHANGED, MESSAGES_CHANGED
from benchmarks.fuzz.run import Row, mutant, run
from benchmarks.fuzz.specimens import specimens

# Chosen so that all kinds of files are among them, and few are read to the end, which takes a second each.
QUICK = range(0, 48)


def are_clear(rows: Iterable[Row]) -> None:
    found = [row for row in rows if row["outcome"] in FINDINGS or row.get("code", "bad-file") not in KINDS]
    assert found == [], json.dumps(found, indent=1)


def test_a_few_changed_files() -> None:
    rows = list(run(0, QUICK))
    assert len(rows) == len(QUICK)
    assert {"read", "refused"} >= {row["outcome"] for row in rows}
    are_clear(rows)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_changed_files() -> None:
    are_clear(run(0, range(2000), seconds=120))


def test_the_same_seed_makes_the_same_files() -> None:
    assert [mutant(3, i).data for i in range(16)] == [mutant(3, i).data for i in range(16)]
    assert mutant(3, 0).data != mutant(4, 0).data


def test_messages_are_written_as_they_were_read() -> None:
    import onnx

    for specimen in specimens():
        if specimen.suffix == ".onnx":
            assert write(parse(specimen.data, onnx.ModelProto.DESCRIPTOR)) == specimen.data


def test_every_change_changes() -> None:
    """Within a few tries: some find nothing in a file that they could change."""
    from random import Random

    first = {specimen.suffix: specimen for specimen in reversed(specimens())}
    for suffix, mutations in ((".onnx", MESSAGES_CHANGED), (".pt", ARCHIVES_CHANGED)):
        data = first[suffix].data
        for change in mutations:
            assert any(change(data, Random(i)) != data for i in range(5)), change.__name__
