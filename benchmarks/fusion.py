"""What becomes of every normalization of every architecture: `python -m benchmarks.fusion --json FILE`."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fusion
from benchmarks.networks import TIMM_LIST, Architecture, architectures
from fusion.errors import ClearfoldError

EXACT = 1e-12  # a fold off by more than this, of the output's scale in float64, is wrong


def measure(architecture: Architecture) -> dict[str, Any]:
    """One network: its report, the certificate in float64, and how long fusion took."""
    row: dict[str, Any] = {"network": architecture.name}
    try:
        module = architecture.build().double()
        x = architecture.example(2, torch.float64)
        network = fusion.capture(module, (x,))
        started = time.perf_counter()
        fused = fusion.fuse(network)
        row["seconds"] = round(time.perf_counter() - started, 3)
        certificate = fusion.certify(module, fused.network, [x])
    except (ClearfoldError, RuntimeError) as error:
        return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    report = fused.report
    return {
        **row,
        "normalizations": len(report.rows),
        **{outcome: report.count(outcome) for outcome in ("folded", "partly", "kept")},
        "certificate": certificate.max_relative,
        "reasons": dict(Counter(r.reason for r in report.rows if r.outcome != "folded").most_common(3)),
        "rows": [asdict(r) for r in report.rows],
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if "error" not in row]
    totals = {key: sum(row[key] for row in done) for key in ("normalizations", "folded", "partly", "kept")}
    return {
        "networks": len(done),
        "failed": len(rows) - len(done),
        **totals,
        "wrong": sum(row["certificate"] > EXACT for row in done),
        "worst_certificate": max((row["certificate"] for row in done), default=0.0),
    }


def markdown(document: dict[str, Any]) -> str:
    """The table for docs/fusion.md from the JSON document."""
    summary, rows = document["summary"], document["rows"]
    lines = [
        "# What becomes of every normalization",
        "",
        "Made by `python -m benchmarks.fusion --json FILE --markdown docs/fusion.md`. Random weights and statistics,",
        "float64. *folded*: gone; *partly*: its affine part went into the layers that read it, the division by a",
        "statistic of the input stays; *certificate*: the largest difference of the outputs over their scale.",
        "",
        f"{summary['networks']} networks, {summary['normalizations']} normalizations: {summary['folded']} folded, "
        f"{summary['partly']} partly, {summary['kept']} kept; {summary['wrong']} wrong; worst certificate "
        f"{summary['worst_certificate']:.1e}; {summary['failed']} networks not captured.",
        "",
        "| network | found | folded | partly | kept | certificate | fusion, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['network']} | not captured | | | | | |")
            continue
        counts = " | ".join(str(row[key]) for key in ("normalizations", "folded", "partly", "kept"))
        lines.append(f"| {row['network']} | {counts} | {row['certificate']:.0e} | {row['seconds']:.2f} |")
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["", "## Not captured", "", *[f"- {row['network']}: {row['error']}" for row in failed]]
    kept = [(row["network"], r) for row in rows for r in row.get("rows", ()) if r["outcome"] == "kept"]
    if kept:
        lines += ["", "## Kept, and why", ""]
        lines += [f"- {network} `{r['layer']}` ({r['op']}): {r['reason']}" for network, r in kept]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write rows and summary here")
    parser.add_argument("--markdown", type=Path, help="write the table for people here")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--timm", type=Path, default=TIMM_LIST, help="a file with timm's architecture names")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no network after this long"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for architecture in architectures(arguments.timm, arguments.only):
        if time.perf_counter() - started > arguments.seconds:
            break
        row = measure(architecture)
        rows.append(row)
        shown = {key: value for key, value in row.items() if key not in ("rows", "reasons")}
        print(json.dumps(shown), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"summary": summarize(rows), "rows": rows}, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(markdown({"summary": summarize(rows), "rows": rows}))
    print(json.dumps(summarize(rows)))


if __name__ == "__main__":
    main()
