"""The command that benchmarks over the zoos share: order, time limits, several processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.networks import Architecture
from benchmarks.over_zoos import kept, measured, worst

EVERY = [Architecture(f"zoo:{i}", (3, 8, 8)) for i in range(5)]


def named(architecture: Architecture) -> dict[str, Any]:
    time.sleep(0.2 if architecture is EVERY[0] else 0)
    return {"network": architecture.name}


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_come_in_the_order_of_the_networks(jobs: int) -> None:
    rows = measured(named, EVERY, jobs, end=float("inf"))
    assert [row["network"] for row in rows] == [architecture.name for architecture in EVERY]


def dies(architecture: Architecture) -> dict[str, Any]:
    if architecture == EVERY[1]:
        os._exit(9)
    return {"network": architecture.name}


def test_a_process_that_dies_costs_one_row() -> None:
    rows = list(measured(dies, EVERY, 2, end=float("inf")))
    assert [row["network"] for row in rows] == [architecture.name for architecture in EVERY]
    assert ["error" in row for row in rows] == [False, True, False, False, False]


def test_none_is_begun_after_the_end() -> None:
    assert list(measured(named, EVERY, 1, end=time.monotonic() - 1)) == []
    assert len(list(measured(named, EVERY, 1, end=time.monotonic() + 0.1))) == 1


def test_the_worst_figure_is_the_largest_or_no_number() -> None:
    assert worst([1.0, 3.0, 2.0]) == 3.0
    assert str(worst([1.0, float("nan"), 2.0])) == "nan"
    assert worst([]) is None


def test_a_resumed_run_keeps_the_rows_that_have_no_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    rows = [{"network": "zoo:1"}, {"network": "zoo:2", "error": "no"}, {"network": "zoo:99"}]
    file.write_text(json.dumps({"rows": rows}))
    assert kept(file, EVERY) == [{"network": "zoo:1"}]
    assert kept(tmp_path / "none.json", EVERY) == []
    assert kept(None, EVERY) == []
