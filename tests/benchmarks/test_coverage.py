"""The benchmark of coverage: every form is written, run by its own runtime, opened, and held against it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import coverage
from benchmarks.coverage import (
    DIFFERENCE_GOAL,
    answer,
    difference,
    is_mistaken,
    markdown,
    measure,
    scores,
    summarize,
)
from benchmarks.forms import FORMS, Form
from benchmarks.networks import Architecture, randomize


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class NotScriptable(Small):
    """`any` over a generator is Python that TorchScript does not compile."""

    def forward(self, x: Tensor) -> Tensor:
        assert any(side > 1 for side in x.shape)
        return super().forward(x)


class Own(Architecture):
    """An architecture that no zoo has."""

    kind: type[nn.Module] = Small

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        module = self.kind()
        randomize(module)
        return module.eval()


class OwnNotScriptable(Own):
    kind = NotScriptable


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    return measure(Own("own:small", (3, 16, 16)))


def test_every_form_of_a_small_network_comes_in(row: dict[str, Any]) -> None:
    assert list(row["forms"]) == list(FORMS)
    assert "error" not in row
    for name, found in row["forms"].items():
        assert [found[key] for key in ("attempted", "runs_in_original", "converted")] == [True] * 3
        assert found["difference"] <= DIFFERENCE_GOAL
        assert (found["missing"], found["error"]) == ([], None)
        assert found["batch"] == (1 if name == "exported" else None)  # for one image, as it is by default


def test_a_form_that_cannot_be_written_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "FORMS", {name: FORMS[name] for name in ("traced", "scripted")})
    row = measure(OwnNotScriptable("own:not_scriptable", (3, 16, 16)))
    assert "error" not in row
    traced, scripted = row["forms"].values()
    assert (traced["attempted"], traced["converted"]) == (True, True)
    assert (scripted["attempted"], scripted["runs_in_original"]) == (False, False)
    assert scripted["error"]
    summary = summarize([row])
    assert (summary["attempted"], summary["runs_in_original"], summary["right"]) == (1, 1, 1)
    assert summary["beyond_goals"] == []
    assert "## Not written by the exporter" in markdown({"summary": summary, "rows": [row]})


def test_single_forms_are_put_into_the_rows_of_an_earlier_run(row: dict[str, Any]) -> None:
    old = {name: {**found, "old": True} for name, found in row["forms"].items() if name != "exported"}
    earlier = {"own:small": {**row, "forms": old}}
    merged = measure(Own("own:small", (3, 16, 16)), forms=("exported", "legacy"), earlier=earlier)
    assert list(merged["forms"]) == list(FORMS)
    new = {name for name, found in merged["forms"].items() if "old" not in found}
    assert new == {"exported", "legacy"}
    assert merged["forms"]["exported"]["difference"] <= DIFFERENCE_GOAL


def test_what_comes_in_as_another_network_is_found_out(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(module: nn.Module) -> Any:
        return lambda x: 2 * module(x)

    monkeypatch.setattr(coverage, "FORMS", {"module": Form(FORMS["module"].write, doubled)})
    wrong = measure(Own("own:wrong", (3, 16, 16)))
    found = wrong["forms"]["module"]
    assert found["converted"]
    assert found["difference"] == pytest.approx(0.5)
    assert found["original_rounding"] == pytest.approx(1.0)
    assert found["converted_in_float64"] < 1e-12
    assert wrong["error"].startswith("module:")
    summary = summarize([row, wrong])
    assert summary["beyond_goals"] == summary["mistaken"] == ["own:wrong module"]
    assert (summary["converted"], summary["right"]) == (9, 8)
    assert summary["worst_relative_difference"] == found["difference"]
    assert "own:wrong, module: differs by 5.0e-01" in markdown({"summary": summary, "rows": [row, wrong]})


def test_a_difference_that_is_the_runtimes_own_is_no_mistake(row: dict[str, Any]) -> None:
    rough = {**row["forms"]["legacy"], "difference": 3e-3, "converted_in_float64": 1e-9}
    rounded, wrong = ({**rough, "original_rounding": own} for own in (1e-3, 1e-5))
    assert not is_mistaken(rounded)
    assert is_mistaken(wrong)
    rows = [
        {"network": name, "forms": {**row["forms"], "legacy": found}}
        for name, found in (("rounded", rounded), ("wrong", wrong))
    ]
    summary = summarize(rows)
    assert summary["by_form"]["legacy"]["rounding"] == 1
    assert summary["beyond_goals"] == ["rounded legacy", "wrong legacy"]
    assert summary["mistaken"] == ["wrong legacy"]
    page = markdown({"summary": summary, "rows": rows})
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert [len({line.count("|") for line in table}) for table in tables] == [1, 1]
    assert page.index("- wrong, legacy") < page.index("own rounding") < page.index("- rounded, legacy")


def test_a_network_that_cannot_be_built_is_told() -> None:
    row = measure(Architecture("torchvision:no_such_network", (3, 8, 8)))
    summary = summarize([row])
    assert (summary["networks"], summary["attempted"]) == (1, 0)
    assert summary["failed"] == ["torchvision:no_such_network"]
    assert "## Not measured to the end" in markdown({"summary": summary, "rows": [row]})


def test_a_network_whose_process_died_is_told(row: dict[str, Any]) -> None:
    rows = [row, {"network": "own:large", "error": "the process died, as of too little memory"}]
    summary = summarize(rows)
    assert (summary["networks"], summary["attempted"]) == (2, 8)
    assert summary["failed"] == ["own:large"]
    assert "- own:large: the process died" in markdown({"summary": summary, "rows": rows})


def test_a_runtime_of_single_images_answers_one_by_one() -> None:
    def single(x: Tensor) -> Tensor:
        assert len(x) == 1
        return x.flatten(1)

    x = torch.randn(2, 3, 4, 4)
    found, batch = answer(single, x)
    assert batch == 1
    assert torch.equal(found, x.flatten(1))
    assert answer(lambda x: x.flatten(1), x)[1] is None


def test_scores_are_the_first_table_of_an_answer() -> None:
    table, maps = torch.randn(2, 5), torch.randn(2, 5, 1, 1)
    assert torch.equal(scores((torch.tensor(1.0), [None, table], maps)), table)
    assert torch.equal(scores([maps]), maps.flatten(1))
    assert torch.equal(scores({"boxes": torch.tensor(0.0), "scores": table}), table)


def test_the_difference_is_of_the_outputs_scale() -> None:
    expected = torch.tensor([[1.0, -4.0]])
    assert difference(torch.tensor([[1.0, -3.0]]), expected) == pytest.approx(0.25)
    assert difference(torch.tensor([[float("nan"), -3.0]]), expected) == float("inf")


@pytest.mark.slow
def test_the_command_writes_json(tmp_path: Path) -> None:
    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.coverage", "--json", str(out), "--markdown", str(page)]
    subprocess.run([*command, "--only", "torchvision:squeezenet1_0"], check=True, capture_output=True)
    summary = json.loads(out.read_text())["summary"]
    assert (summary["networks"], summary["attempted"], summary["right"]) == (1, 8, 8)
    assert "| torchvision:squeezenet1_0 |" in page.read_text()
