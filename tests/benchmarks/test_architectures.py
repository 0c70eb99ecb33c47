"""The benchmark of architectures: its figures are those of the explanation, and a network that fails is a row too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion
import lrp
from benchmarks.architectures import (
    LEDGER_GOAL,
    RELEVANCE_GOAL,
    accounts,
    calibrate,
    gradient,
    is_right,
    markdown,
    measure,
    ratios_of_times,
    summarize,
)
from benchmarks.networks import Architecture

SMALL = Architecture("torchvision:resnet18", (3, 64, 64))


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return measure(SMALL, rounds=1)


def test_calibrated_batch_norms_leave_the_first_layer_standardized() -> None:
    module = calibrate(SMALL.build(), SMALL)
    assert not any(layer.training for layer in module.modules())
    # The statistics are those of the calibration images: standardized with them, these have mean 0 and variance 1.
    norm = module.bn1
    with torch.no_grad():
        y = (norm(module.conv1(SMALL.example(4))) - norm.bias[:, None, None]) / norm.weight[:, None, None]
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(64), atol=1e-3, rtol=0)


def test_a_row_has_the_figures_of_the_explanation(row: dict[str, Any]) -> None:
    module = calibrate(SMALL.build(), SMALL)
    x = SMALL.example(2)
    found = lrp.Explainer(
        fusion.capture(module, (x,)), composite="EpsilonPlusFlatSteady", device="cpu", dtype=torch.float64
    ).explain(x)
    top = module(x).amax(1).tolist()
    assert row["score"] == pytest.approx(top, rel=1e-4)
    assert row["composite"] == "EpsilonPlusFlatSteady"
    assert "piecewise linear" in row["reason"]
    share = float((found.relevance.flatten(1).sum(1) / found.score).mean())
    assert row["input_share"] == pytest.approx(share, rel=1e-3)
    assert row["input_share"] + row["kept_share"] == pytest.approx(1, abs=1e-4)
    largest = float((found.relevance.flatten(1).abs().amax(1) / found.score.abs()).max())
    assert row["relevance_over_score"] == pytest.approx(largest, rel=1e-3)
    assert row["time_over_gradient"] > 0
    assert is_right(row)


def test_accounts_report_the_worse_image_and_what_kept_how_much(row: dict[str, Any]) -> None:
    assert sum(row["kept_by"].values()) == pytest.approx(row["kept_share"], abs=1e-3)
    module = calibrate(SMALL.build(), SMALL)
    explainer = lrp.Explainer(fusion.capture(module, (SMALL.example(2),)), composite="auto", device="cpu")
    both = accounts(explainer.explain(SMALL.example(2)))
    single = [accounts(explainer.explain(SMALL.example(2)[i : i + 1])) for i in (0, 1)]
    assert both["relevance_over_score"] == pytest.approx(
        max(s["relevance_over_score"] for s in single), rel=1e-4
    )


def test_a_gradient_is_that_of_the_top_scores() -> None:
    layer = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    best = layer(x).argmax(1)
    torch.testing.assert_close(gradient(layer, x), layer.weight.detach()[best])


def test_times_are_ratios_and_none_without_rounds() -> None:
    def work() -> None:
        torch.randn(300, 300) @ torch.randn(300, 300)

    assert ratios_of_times(work, {"same": work}, 0) == {}
    ratios = ratios_of_times(work, {"same": work, "longer": lambda: [work() for _ in range(20)]}, 9)
    assert ratios["longer"] > 5
    assert ratios["same"] < ratios["longer"]


def test_a_network_that_fails_costs_only_its_own_row(row: dict[str, Any]) -> None:
    failed = measure(Architecture("torchvision:no_such_network", (3, 8, 8)), rounds=0)
    assert "no_such_network" in failed["error"]
    exploded = {**row, "network": "big", "relevance_over_score": 2 * RELEVANCE_GOAL}
    leaking = {**row, "network": "lost", "ledger_error": 2 * LEDGER_GOAL}
    summary = summarize([row, failed, exploded, leaking])
    assert (summary["networks"], summary["explained"]) == (4, 1)
    assert summary["refused"] == ["torchvision:no_such_network"]
    assert summary["beyond_goals"] == ["big", "lost"]
    assert summary["worst_ledger_error"] == 2 * LEDGER_GOAL
    assert summary["worst_relevance_over_score"] == 2 * RELEVANCE_GOAL
    text = markdown({"summary": summary, "rows": [row, failed]})
    assert "| torchvision:resnet18 | EpsilonPlusFlatSteady |" in text
    assert "## Refused" in text


def test_other_libraries_have_the_same_columns(row: dict[str, Any]) -> None:
    zennit, captum = row["peers"]["zennit"], row["peers"]["captum"]
    assert zennit["composite"] == "EpsilonPlusFlat + ResNetCanonizer"
    assert zennit["ledger_error"] < LEDGER_GOAL  # zennit is right on ResNets with its canonizer
    assert zennit["input_share"] == pytest.approx(1, abs=LEDGER_GOAL)
    assert captum["relevance_over_score"] > 1e6  # captum is not (its residual sums are no modules)
    assert set(zennit) == set(captum) <= set(row)
    failed = {
        **row,
        "network": "other",
        "peers": {"zennit": {"error": "TypeError: no rule"}, "captum": captum},
    }
    summary = summarize([row, failed])
    assert (summary["peers"]["zennit"]["answered"], summary["peers"]["zennit"]["explained"]) == (1, 1)
    assert (summary["peers"]["captum"]["answered"], summary["peers"]["captum"]["explained"]) == (2, 0)
    assert summary["peers"]["captum"]["exploded"] == 2
    lost = {**row, "peers": {"zennit": {**zennit, "finite": False, "ledger_error": float("nan")}}}
    found = summarize([row, lost])["peers"]["zennit"]
    assert (found["answered"], found["explained"], found["not_finite"]) == (2, 1, 1)
    assert found["worst_ledger_error"] == zennit["ledger_error"]
    text = markdown({"summary": summary, "rows": [row, failed]})
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "TypeError" in table[-1]


def test_a_lost_number_is_no_explanation(row: dict[str, Any]) -> None:
    lost = {**row, "ledger_error": float("nan")}
    assert not is_right(lost)
    assert str(summarize([row, lost, row])["worst_ledger_error"]) == "nan"
    assert not is_right({**row, "finite": False})


def test_the_command_writes_json_and_a_table(tmp_path: Path) -> None:
    out, table = tmp_path / "rows.json", tmp_path / "table.md"
    command = [sys.executable, "-m", "benchmarks.architectures", "--json", str(out), "--markdown", str(table)]
    subprocess.run(
        [*command, "--only", "squeezenet1_0", "--rounds", "0", "--no-peers"], check=True, capture_output=True
    )
    document = json.loads(out.read_text())
    assert [r["network"] for r in document["rows"]] == ["torchvision:squeezenet1_0"]
    assert document["summary"]["explained"] == 1
    assert document["rows"][0]["time_over_gradient"] is None
    assert "| torchvision:squeezenet1_0 |" in table.read_text()
