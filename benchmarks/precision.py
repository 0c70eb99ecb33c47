"""What rounding does to relevance: `python -m benchmarks.precision --json FILE [--markdown FILE] [--only STR]`.

For each network under "auto": the map in float32 against that in float64, as a share of the largest value, and how the
map in bfloat16 ranks the input's values beside float64's (Spearman). All explain the class that is best in float64.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

import fusion
from benchmarks import over_zoos
from benchmarks.architectures import calibrate
from benchmarks.networks import Architecture
from benchmarks.over_zoos import worst
from lrp import Explainer

IMAGES = 1
DIFFERENCE_GOAL = 2e-3  # float32 against float64, of the largest value
RANK_GOAL = 0.98  # bfloat16 against float64


def measure(architecture: Architecture) -> dict[str, Any]:
    """One network in three types: a row of the table, with `error` where one of them fails."""
    row: dict[str, Any] = {"network": architecture.name}
    try:
        module = calibrate(architecture.build(), architecture)
        x = architecture.example(IMAGES)
        network = fusion.capture(module, (architecture.example(2),))
        exact = Explainer(network, composite="auto", device="cpu", dtype=torch.float64, strict=False)
        row["composite"] = exact.composite.name
        expected = exact.explain(x)
        target = expected.target
        for dtype in (torch.float32, torch.bfloat16):
            explainer = Explainer(network, composite="auto", device="cpu", dtype=dtype, strict=False)
            found = explainer.explain(x, target)
            name = str(dtype).removeprefix("torch.")
            row[name] = {
                "difference": difference(found.relevance, expected.relevance),
                "rank_correlation": rank_correlation(found.relevance, expected.relevance),
                "pixel_rank_correlation": rank_correlation(found.heatmap(), expected.heatmap()),
                "score_difference": difference(found.score[:, None], expected.score[:, None]),
            }
    except Exception as error:  # one network that fails must not cost the others
        row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def difference(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected| over a map, of the worst image."""
    expected = expected.double().flatten(1)
    gap = (found.double().flatten(1) - expected).abs().amax(1)
    return float((gap / expected.abs().amax(1)).max())


def rank_correlation(found: Tensor, expected: Tensor) -> float:
    """Spearman's correlation of the values of two maps, of the worst image; NaN where a map is constant."""
    ranks = [t.double().flatten(1).argsort(1).argsort(1).double() for t in (found, expected)]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).min())


def is_right(row: dict[str, Any]) -> bool:
    return (
        "error" not in row
        and row["float32"]["difference"] <= DIFFERENCE_GOAL
        and row["bfloat16"]["rank_correlation"] >= RANK_GOAL
    )


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """networks: all that were tried; float32, bfloat16: those within each goal."""
    done = [row for row in rows if "error" not in row]
    differences = [row["float32"]["difference"] for row in done]
    ranks = [row["bfloat16"]["rank_correlation"] for row in done]
    return {
        "networks": len(rows),
        "float32": sum(found <= DIFFERENCE_GOAL for found in differences),
        "bfloat16": sum(found >= RANK_GOAL for found in ranks),
        "worst_float32_difference": worst(differences),
        "median_float32_difference": statistics.median(differences) if done else None,
        "worst_bfloat16_rank_correlation": -(worst([-found for found in ranks]) or 0.0) if done else None,
        "median_bfloat16_rank_correlation": statistics.median(ranks) if done else None,
        "refused": [row["network"] for row in rows if "error" in row],
        "beyond_goals": [row["network"] for row in done if not is_right(row)],
    }


def markdown(document: dict[str, Any]) -> str:
    """The table for docs/precision.md from the JSON document."""
    summary, rows = document["summary"], document["rows"]
    done = [row for row in rows if "error" not in row]
    count = summary["networks"]
    lines = [
        "# What rounding does to relevance",
        "",
        "Made by `python -m benchmarks.precision --json FILE --markdown docs/precision.md`. Random weights, statistics",
        f'calibrated on random images, {IMAGES} image(s) of noise each, `composite="auto"`, the class explained that',
        "is best in float64. *float32*: the largest difference from float64's map, as a share of its largest value.",
        "*bfloat16*: Spearman's rank correlation with float64's map, over all values of the input, and over pixels.",
        "",
        f"float32 within {DIFFERENCE_GOAL:g} on {summary['float32']} of {count} (median "
        f"{summary['median_float32_difference']:.1e}, worst {summary['worst_float32_difference']:.1e}); bfloat16 at "
        f"{RANK_GOAL:g} or above on {summary['bfloat16']} of {count} (median "
        f"{summary['median_bfloat16_rank_correlation']:.4f}, worst {summary['worst_bfloat16_rank_correlation']:.4f}).",
        "",
        "| network | composite | float32 | bfloat16, values | bfloat16, pixels |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in done:
        half = row["bfloat16"]
        lines.append(
            f"| {row['network']} | {row['composite']} | {row['float32']['difference']:.1e} | "
            f"{half['rank_correlation']:.4f} | {half['pixel_rank_correlation']:.4f} |"
        )
    refused = [row for row in rows if "error" in row]
    if refused:
        lines += ["", "## Refused", "", *[f"- {row['network']}: {row['error']}" for row in refused]]
    return "\n".join(lines) + "\n"


def main() -> None:
    over_zoos.run(over_zoos.parser(__doc__).parse_args(), measure, summarize, markdown)


if __name__ == "__main__":
    main()
