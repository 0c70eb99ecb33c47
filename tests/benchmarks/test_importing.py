"""The benchmark of an import: it uploads to a real server, and counts what a conversion takes beyond its libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.importing import markdown, memory, summarize, upload
from tests.support.served import save_onnx, tiny_network

ROWS = [
    {"waits": waits, "seconds": seconds, "first_heatmap_seconds": 0.5, "difference": 1e-6}
    for waits, seconds in ((True, 4.0), (False, 8.0), (True, 5.0), (False, 7.0), (True, 9.0), (False, 6.0))
]
USED = {"file": 100, "peak": 1000, "libraries": 650}


def test_medians_and_multiples_of_the_file() -> None:
    summary = summarize(ROWS, USED)
    assert summary["seconds"] == 5.0
    assert summary["seconds_without_a_waiting_process"] == 7.0
    assert summary["memory_over_file"] == 3.5
    assert summary["memory_over_file_with_libraries"] == 10.0
    page = markdown({"summary": summary, "memory": USED, "rows": ROWS})
    assert "| 5.0 s | 6 s |" in page
    assert "medians of 3 rounds" in page


@pytest.mark.slow
def test_it_measures(tmp_path: Path) -> None:
    onnx_file = save_onnx(tiny_network(), tmp_path / "tiny.onnx")
    row = upload(onnx_file, waits=True)
    assert 0 < row["seconds"] < 100
    assert row["difference"] < 1e-5
    used = memory(onnx_file)
    assert used["file"] == onnx_file.stat().st_size
    assert used["peak"] > used["libraries"] // 2 > 2**25
    json.dumps([row, used])
