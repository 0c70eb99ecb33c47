"""What becomes of every normalization of every architecture: `python -m benchmarks.fusion --json FILE`."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import fusion
from benchmarks import over_zoos
from benchmarks.networks import Architecture

EXACT = 1e-12  # a fold off by more than this, of the output's scale in float64, is wrong


def measure(architecture: Architecture) -> dict[str, Any]:
    """One network: its report, the certificate in float64, and how long fusion took."""
    row: dict[str, Any] = {"network": architecture.name}
    try:
        module = architecture.build().double()
        x = architecture.example(2, torch.float64)
        network = fusion.capture(module, (x,))
        started = time.perf_counter()
        fusion.fuse(network)
        row["seconds"] = round(time.perf_counter() - started, 3)
        fused = fusion.fuse(network, certified=True)
        certificate = fusion.certify(module, fused.network, [x])
        # Only where it matters: five runs of the original.
        own = own_rounding(module, x) if certificate.max_relative > EXACT else None
    except Exception as error:  # one network that fails must not cost the others
        return {**row, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    report = fused.report
    return {
        **row,
        "normalizations": len(report.rows),
        **{outcome: report.count(outcome) for outcome in ("folded", "partly", "kept")},
        "worst_fold": max((r.certificate or 0.0 for r in report.rows), default=0.0),
        "certificate": certificate.max_relative,
        "own_rounding": own,
        "reasons": dict(Counter(r.reason for r in report.rows if r.outcome != "folded").most_common(3)),
        "rows": [asdict(r) for r in report.rows],
    }


def own_rounding(module: nn.Module, x: Tensor, runs: int = 5) -> float:
    """By how much the original's own answers change, relative to their scale, when every input value changes by its
    last digit at most: the largest of a few random changes. Random weights make some networks chaotic; no equivalent
    network can be expected nearer than this."""
    random = torch.Generator().manual_seed(2)
    digit = torch.finfo(x.dtype).eps
    found = 0.0
    for _ in range(runs):
        noise = torch.rand(x.shape, dtype=x.dtype, generator=random) * 2 - 1
        found = max(
            found, fusion.certify(module, lambda y, n=noise: module(y * (1 + digit * n)), [x]).max_relative
        )  # type: ignore[misc]
    return found


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a fold is: by its own certificate, or by an end-to-end difference beyond the network's own rounding."""
    return bool(row["worst_fold"] > EXACT or row["certificate"] > max(EXACT, row["own_rounding"] or 0.0))


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if "error" not in row]
    totals = {key: sum(row[key] for row in done) for key in ("normalizations", "folded", "partly", "kept")}
    return {
        "networks": len(done),
        "failed": len(rows) - len(done),
        **totals,
        "wrong": sum(is_wrong(row) for row in done),
        "worst_fold": max((row["worst_fold"] for row in done), default=0.0),
        "worst_certificate": max((row["certificate"] for row in done), default=0.0),
        "beyond_exact": [row["network"] for row in done if row["certificate"] > EXACT],
    }


def markdown(document: dict[str, Any]) -> str:
    """The table for docs/fusion.md from the JSON document."""
    summary, rows = document["summary"], document["rows"]
    lines = [
        "# What becomes of every normalization",
        "",
        "Made by `python -m benchmarks.fusion --json FILE --markdown docs/fusion.md`. Random weights and statistics,",
        "float64. *folded*: gone; *partly*: its affine part went into the layers that read it, its centering into",
        "those that write it, or both; the division by a statistic of the input stays. *Certificates* are largest",
        "differences over the scale of what differs: *fold*, of the worst fold by itself; *outputs*, of the whole",
        "network's; *own*, of the original's outputs when its input changes by the last digit, below which no",
        "equivalent network can be expected (measured where *outputs* is above 1e-12). Wrong is a fold above 1e-12, or",
        "outputs above that and above *own*.",
        "",
        f"{summary['networks']} networks, {summary['normalizations']} normalizations: {summary['folded']} folded, "
        f"{summary['partly']} partly, {summary['kept']} kept; {summary['wrong']} wrong; worst fold "
        f"{summary['worst_fold']:.1e}, worst outputs {summary['worst_certificate']:.1e}; {summary['failed']} networks "
        "not captured.",
        "",
        "| network | found | folded | partly | kept | fold | outputs | own | fusion, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['network']} | not captured | | | | | | | |")
            continue
        counts = " | ".join(str(row[key]) for key in ("normalizations", "folded", "partly", "kept"))
        figures = (row[key] for key in ("worst_fold", "certificate", "own_rounding"))
        measured = " | ".join("" if figure is None else f"{figure:.0e}" for figure in figures)
        lines.append(f"| {row['network']} | {counts} | {measured} | {row['seconds']:.2f} |")
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["", "## Not captured", "", *[f"- {row['network']}: {row['error']}" for row in failed]]
    kept = [(row["network"], r) for row in rows for r in row.get("rows", ()) if r["outcome"] == "kept"]
    if kept:
        lines += [
            "",
            "## Kept, and why",
            "",
            "Grouped by reason; layers' names do not count, and one is named.",
        ]
        groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
        for network, r in kept:
            groups.setdefault((r["op"], re.sub(r"'[^']*'", "…", r["reason"])), []).append((network, r))
        for (op, _), members in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
            networks = ", ".join(f"{name} ({n})" for name, n in Counter(name for name, _ in members).items())
            first, example = members[0]
            lines += [
                "",
                f"**{op}, {len(members)}**: {networks}.",
                f"For example {first} `{example['layer']}`: {example['reason']}.",
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = over_zoos.parser(__doc__).parse_args()
    over_zoos.run(arguments, measure, summarize, markdown, hidden=("rows", "reasons"))


if __name__ == "__main__":
    main()
