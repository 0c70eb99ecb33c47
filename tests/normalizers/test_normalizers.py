"""Every normalizer of the literature: captured, folded as far as it can be, explained, and in the committed table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fusion
from benchmarks.normalizers import BALANCED, COMPOSITES, markdown, measure, summarize
from fusion.affine import affine_node
from fusion.errors import UnsupportedOperator
from fusion.linear import linear_layer_ending_at
from fusion.network import op_name
from lrp.explainer import Explainer
from tests.normalizers.networks import NORMALIZERS, Normalizer, built, images

EXACT = 1e-12
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "normalizers.md"
explained = [n for n in NORMALIZERS if not n.refused]
by_name = {n.name: n for n in NORMALIZERS}


def _id(normalizer: Normalizer) -> str:
    return normalizer.name


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=_id)
def test_it_is_captured_and_folded_exactly_and_the_report_names_it(normalizer: Normalizer) -> None:
    module, x = built(normalizer), images()
    fused = fusion.fuse(fusion.capture(module, (x,)), certified=True)
    assert tuple((row.op, row.outcome) for row in fused.report.rows) == normalizer.report
    assert fusion.certify(module, fused.network, [x, images(2, seed=5)]).max_relative <= EXACT
    assert fused.report.certificate is not None
    assert fused.report.certificate <= EXACT
    for row in fused.report.rows:
        assert row.layer
        assert bool(row.into) == (row.outcome != "kept")
        assert bool(row.reason) == (row.outcome != "folded")


@pytest.mark.parametrize("composite", COMPOSITES, ids=lambda c: c.name)
@pytest.mark.parametrize("normalizer", explained, ids=_id)
def test_its_explanations_are_finite_and_balance(normalizer: Normalizer, composite: object) -> None:
    x = images()
    explainer = Explainer(
        built(normalizer), composite=composite, dtype=torch.float64, device="cpu", example=x
    )  # type: ignore[arg-type]
    explanation = explainer.explain(x)
    assert torch.isfinite(explanation.relevance).all()
    assert (explanation.relevance.abs().sum((1, 2, 3)) > 1e-3 * explanation.score.abs()).all()
    assert explanation.ledger is not None
    assert float(explanation.ledger.error.max()) <= BALANCED


@pytest.mark.parametrize("normalizer", [n for n in NORMALIZERS if n.refused], ids=_id)
def test_what_cannot_be_explained_says_why_and_what_to_do(normalizer: Normalizer) -> None:
    network = fusion.capture(built(normalizer), (images(),))
    with pytest.raises(UnsupportedOperator, match=normalizer.refused) as caught:
        Explainer(network)
    assert "track_running_stats=True" in str(caught.value)
    assert all(normalizer.refused in row.reason for row in fusion.fuse(network).report.rows)


@pytest.mark.parametrize(
    "name",
    [
        "Weight normalization",
        "Weight normalization, hook",
        "Weight standardization",
        "Scaled weight standardization",
        "Spectral normalization",
        "DropConnect with weight normalization",
        "Binary weights",
    ],
)
def test_what_normalizes_weights_leaves_nothing_but_linear_layers(name: str) -> None:
    module = built(by_name[name])
    network = fusion.fuse(fusion.capture(module, (images(),))).network
    ops = {op_name(node) for node in network.calls()}
    assert ops <= {"conv2d", "linear", "relu", "mean", "flatten", "reshape", "add"}


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("GroupNorm", 0),
        ("LayerNorm over channels", 0),
        ("Filter Response Norm", 0),
        ("Variance normalization", 2),  # eps
        ("AdaNorm", 6),  # eps, twice each, and k inside the gate
        ("EvoNorm-S0", 4),  # eps, and v inside the sigmoid
        ("DyT", 2),  # alpha inside tanh
    ],
)
def test_no_constant_map_is_left_but_those_inside(name: str, left: int) -> None:
    network = fusion.fuse(fusion.capture(built(by_name[name]), (images(),))).network
    maps = [n for n in network.calls() if affine_node(network, n) and not linear_layer_ending_at(network, n)]
    assert len(maps) == left


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=_id)
def test_it_is_stored_and_loaded_as_it_is(normalizer: Normalizer, tmp_path: Path) -> None:
    x = images()
    fused = fusion.fuse(fusion.capture(built(normalizer), (x,))).network
    fusion.save(fused, tmp_path, {})
    loaded, _ = fusion.load(tmp_path)
    # Not bit by bit: stored weights are contiguous, and a matrix product sums in the order of its strides.
    assert fusion.certify(fused, loaded, [x]).max_relative <= 1e-14


def test_the_user_s_network_stays_as_it_is() -> None:
    for normalizer in explained:
        module = built(normalizer)
        before = {name: t.clone() for name, t in module.state_dict().items()}
        fusion.fuse(fusion.capture(module, (images(),)))
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_the_committed_table_has_a_row_for_every_normalizer() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    table = {cells[0].removeprefix("| "): cells for cells in rows}
    for normalizer in NORMALIZERS:
        cells = table[normalizer.name]
        assert cells[1] == normalizer.foldable
        for op, outcome in normalizer.report:
            assert f"{op} {outcome}" in cells[2]
        assert cells[4] == normalizer.rule
    assert "0 wrong" in text
    assert "0 ledgers out of balance" in text


def test_the_table_is_what_is_measured() -> None:
    row = measure(by_name["Variance normalization"])
    summary = summarize([row])
    assert summary["partly"] == 2
    assert summary["wrong"] == summary["unbalanced"] == 0
    text = markdown({"summary": summary, "rows": [row]})
    assert "| Variance normalization | affine part | variance_norm partly, 2 times |" in text
    wrong = summarize([{**row, "certificate": 1e-3, "ledgers": {"LRP-0": float("nan")}}])
    assert wrong["wrong"] == wrong["unbalanced"] == 1
