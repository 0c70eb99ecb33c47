"""The benchmark of precision: its figures are those of explanations in three types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.networks import Architecture
from benchmarks.precision import (
    DIFFERENCE_GOAL,
    RANK_GOAL,
    difference,
    is_right,
    markdown,
    measure,
    rank_correlation,
    summarize,
)


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return measure(Architecture("torchvision:resnet18", (3, 64, 64)))


def ranks(t: torch.Tensor) -> list[int]:
    values = t.flatten().tolist()
    return [sorted(values).index(value) for value in values]


def test_rank_correlation_is_spearmans() -> None:
    a, b = torch.randn(1, 3, 5, 5), torch.randn(1, 3, 5, 5)
    n = a.numel()
    apart = sum((i - j) ** 2 for i, j in zip(ranks(a), ranks(b), strict=True))
    expected = 1 - 6 * apart / (n * (n**2 - 1))  # the formula for values without ties
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(torch.cat([a, a]), torch.cat([a, b])) == pytest.approx(expected, abs=1e-12)


def test_the_difference_is_of_the_largest_value_of_the_same_image() -> None:
    expected = torch.tensor([[1.0, -4.0], [100.0, 0.0]])
    found = torch.tensor([[1.0, -3.0], [100.0, 1.0]])
    assert difference(found, expected) == pytest.approx(0.25)


def test_a_small_network_is_within_the_goals(row: dict[str, Any]) -> None:
    assert row["float32"]["difference"] <= DIFFERENCE_GOAL
    assert row["bfloat16"]["rank_correlation"] >= RANK_GOAL
    assert row["bfloat16"]["difference"] > row["float32"]["difference"] > 0
    assert is_right(row)


def test_the_summary_counts_what_is_beyond_a_goal(row: dict[str, Any]) -> None:
    rough = {**row, "network": "rough", "bfloat16": {**row["bfloat16"], "rank_correlation": 0.5}}
    failed = measure(Architecture("torchvision:no_such_network", (3, 8, 8)))
    summary = summarize([row, rough, failed])
    assert (summary["networks"], summary["float32"], summary["bfloat16"]) == (3, 2, 1)
    assert summary["worst_bfloat16_rank_correlation"] == 0.5
    assert summary["beyond_goals"] == ["rough"]
    assert summary["refused"] == ["torchvision:no_such_network"]
    text = markdown({"summary": summary, "rows": [row, rough, failed]})
    assert "| rough | EpsilonPlusFlatSteady |" in text
    assert "## Refused" in text


def test_the_command_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.precision",
        "--json",
        str(out),
        "--only",
        "torchvision:squeezenet1_0",
    ]
    subprocess.run(command, check=True, capture_output=True)
    document = json.loads(out.read_text())
    assert document["summary"]["networks"] == 1
    assert document["rows"][0]["float32"]["difference"] <= DIFFERENCE_GOAL
