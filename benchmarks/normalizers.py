"""What becomes of every normalizer of the literature: `python -m benchmarks.normalizers --json FILE`."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import fusion
from benchmarks import documents
from benchmarks.fusion import EXACT
from fusion.errors import ClearfoldError
from lrp.composites import Composite, build
from lrp.explainer import Explainer
from lrp.rules import LRP0
from tests.normalizers.networks import NORMALIZERS, Normalizer, built, images

BALANCED = 1e-10  # a ledger off by more than this share of the score, in float64, has lost relevance
COMPOSITES: tuple[Composite, ...] = (
    build("EpsilonPlusFlat"),
    Composite("LRP-0", convolution=LRP0(), linear=LRP0()),
)


def measure(normalizer: Normalizer) -> dict[str, Any]:
    """One network in float64: its report, its certificates, and how far its ledgers are off."""
    module, x = built(normalizer), images()
    network = fusion.capture(module, (x,))
    fused = fusion.fuse(network, certified=True)
    row: dict[str, Any] = {
        "normalizer": normalizer.name,
        "foldable": normalizer.foldable,
        "rule": normalizer.rule,
        "outcomes": [f"{r.op} {r.outcome}" for r in fused.report.rows],
        "certificate": fusion.certify(module, fused.network, [x]).max_relative,
        "worst_fold": fused.report.certificate,
        "rows": [asdict(r) for r in fused.report.rows],
    }
    try:
        row["ledgers"] = {c.name: _ledger_error(network, c, x) for c in COMPOSITES}
    except ClearfoldError as error:
        row["refused"] = str(error)
    return row


def _ledger_error(network: fusion.Network, composite: Composite, x: Tensor) -> float:
    """The largest share of a score that is nowhere; NaN where a relevance is no finite number."""
    explainer = Explainer(network, composite=composite, dtype=torch.float64, device="cpu")
    explanation = explainer.explain(x)
    assert explanation.ledger is not None
    finite = bool(torch.isfinite(explanation.relevance).all())
    return float(explanation.ledger.error.max()) if finite else math.nan


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    outcomes = Counter(r["outcome"] for row in rows for r in row["rows"])
    errors = [error for row in rows for error in row.get("ledgers", {}).values()]
    certificates = [row[key] for row in rows for key in ("certificate", "worst_fold")]
    return {
        "normalizers": len(rows),
        "normalizations": outcomes.total(),
        **{outcome: outcomes[outcome] for outcome in ("folded", "partly", "kept")},
        "refused": sum("refused" in row for row in rows),
        "wrong": sum(max(row["certificate"], row["worst_fold"]) > EXACT for row in rows),
        "unbalanced": sum(not error <= BALANCED for error in errors),
        "worst_certificate": max(certificates, default=0.0),
        "worst_ledger": max(errors, default=0.0),
    }


INTRODUCTION = """
# What becomes of every normalizer

Made by `python -m benchmarks.normalizers --json FILE --markdown docs/normalizers.md`. Every normalizer stands twice in
a small network (`tests/normalizers/`) with random weights, parameters and statistics, in float64.

- *foldable*: how much of it is a map with constant coefficients, and so goes into the layers around it.
- *report*: its rows in the fusion report. *folded*: gone; *partly*: its scale, shift or centering is gone, the division
  by a statistic of the input stays; *kept*: all of it stays. What normalizes weights, and what is an activation, has no
  row: effective weights are computed once, when a network is captured.
- *certificate*: the largest difference of the network's outputs, or of the values behind one fold, over their scale.
- *rule*: how relevance passes what is left.
- *ledger*: the largest share of a score that is neither at the input nor accounted for by a layer, under
  EpsilonPlusFlat / LRP-0.
"""

REMARKS = """
## Remarks

- **Statistics are numbers.** What a signal is divided by is held constant (`lrp.held`), however the network spells the
  division: as one operator, by `rsqrt`, by `std + eps`, by a pooled sum of squares. The same holds for gates and masks:
  EvoNorm's sigmoid, AdaNorm's 1 - k y, the responsibilities of Mixture Normalization, the area of interest of a focused
  convolution. What serves nothing else needs no rule of its own.
- **Chains of primitives** are recognized by what they compute (`fusion.recognize`): LayerNorm and RMSNorm over any axes
  become one operator (Filter Response Norm is an RMS norm over space), frozen batch norms become batch norms, the rest
  is named in the report. A chain that differs in one operand is left alone.
- **AdderNet** (`fusion.distances`, `lrp.distances`): a sum of distances is written as |x - w| and a convolution of size
  one with a group per filter, so that the batch norm folds into its weights. Each input adds
  c = v (|x - w| - |w|), nothing where it is zero; the rules read c where they have a w.
- **Centered softplus** (`fusion.centred`): the constant log 2 stays with its activation. Folded into the layer behind,
  it would be a bias, and an input of zero would have relevance.
- **Filter Response Norm** keeps, at its threshold, the relevance of what is clamped: there the answer is a constant.
"""


def markdown(document: dict[str, Any]) -> str:
    """docs/normalizers.md from the JSON document."""
    summary, rows = document["summary"], document["rows"]
    found = ", ".join(f"{summary[outcome]} {outcome}" for outcome in ("folded", "partly", "kept"))
    lines = [
        INTRODUCTION.strip(),
        "",
        f"{summary['normalizers']} normalizers with {summary['normalizations']} rows: {found}; "
        f"{summary['wrong']} wrong, worst certificate {summary['worst_certificate']:.0e}; "
        f"{summary['unbalanced']} ledgers out of balance, worst {summary['worst_ledger']:.0e}; "
        f"{summary['refused']} refused.",
        "",
        "| normalizer | foldable | report | certificate | rule | ledger |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_line(row) for row in rows),
    ]
    reasons: dict[str, dict[str, None]] = {}
    for r in (r for row in rows for r in row["rows"] if r["reason"]):
        reasons.setdefault(r["reason"], {})[r["op"]] = None
    lines += ["", "## Why what stays stays", ""]
    lines += [f"- {', '.join(f'`{op}`' for op in ops)}: {reason}" for reason, ops in reasons.items()]
    refused = [f"- {row['normalizer']}: {row['refused']}" for row in rows if "refused" in row]
    lines += ["", "## Refused", "", *refused] if refused else []
    return "\n".join([*lines, "", REMARKS.strip()]) + "\n"


def _line(row: dict[str, Any]) -> str:
    report = ", ".join(f"{name}, {n} times" for name, n in Counter(row["outcomes"]).items()) or "none"
    certificate = max(row["certificate"], row["worst_fold"])
    ledgers = " / ".join(f"{error:.0e}" for error in row.get("ledgers", {}).values()) or "refused"
    return f"| {row['normalizer']} | {row['foldable']} | {report} | {certificate:.0e} | {row['rule']} | {ledgers} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    documents.add_outputs(parser)
    parser.add_argument("--only", default="", help="normalizers whose name contains this")
    arguments = parser.parse_args()
    rows = []
    for normalizer in NORMALIZERS:
        if arguments.only.lower() in normalizer.name.lower():
            rows.append(measure(normalizer))
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "rows"}), flush=True)
    document = {"summary": summarize(rows), "rows": rows}
    documents.write_json(arguments, document)
    documents.write_page(arguments, document, markdown)


if __name__ == "__main__":
    main()
