"""Heatmap quality with and without fusion, on images whose ground truth is known:
`python -m benchmarks.quality --json FILE [--markdown FILE] [--images 500]`.

The built-in network and its generator: every image has one object of a known class and the mask of its pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lrp
import models
from benchmarks.metrics import Flipping, mean_estimate, median_estimate, paired_difference
from benchmarks.sections import write_section
from benchmarks.treatments import (
    FUSED,
    OMIT,
    TREATMENTS,
    cell,
    correct_only,
    heatmaps,
    qualities,
    table,
    visible,
)
from fusion import Network
from models.zoo.network import normalize
from models.zoo.objects import batch
from models.zoo.seeds import Seed

COMPOSITES = ("EpsilonPlusFlat", "EpsilonPlus")
# 256 regions of 8 x 8 pixels, 16 at a time, painted in the mean colour (0 in the network's units).
FLIPPING = Flipping(patch=8, steps=16, fill=0.0)
METRICS = {"mass": "mass accuracy", "rank": "rank accuracy", "srg": "SRG"}


def unseen(network: Network, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` images of the evaluation set that the network names rightly: input [N, 3, H, W], class [N],
    mask [N, H, W]."""
    candidates = count + max(20, count // 20)
    images, labels, masks = batch(int(Seed.EVALUATION), range(candidates))
    x, target = normalize(images), torch.from_numpy(labels)
    chosen = correct_only(network, x, target, count)
    if len(chosen) < count:
        raise RuntimeError(f"Only {len(chosen)} of {candidates} images are named rightly.")
    return x[chosen], target[chosen], torch.from_numpy(masks)[chosen]


def measure(count: int, flipping: Flipping = FLIPPING) -> dict[str, Any]:
    """Every composite under every treatment: the JSON document."""
    network = models.open("builtin").network
    x, target, masks = unseen(network, count)
    rows: list[dict[str, Any]] = []
    for name in COMPOSITES:
        fused: dict[str, Tensor] = {}
        for treatment in (*TREATMENTS, OMIT):
            started = time.perf_counter()
            maps = heatmaps(treatment.explainer(network, lrp.build(name)), x, target)
            found = qualities(network, x, target, maps, flipping, masks)
            fused = fused or found
            rows.append(
                {
                    "composite": name,
                    "treatment": treatment.name,
                    "images": len(x),
                    **{metric: mean_estimate(values).to_json() for metric, values in found.items()},
                    "kept": median_estimate(maps.kept).to_json(),
                    "fused_minus_this": {
                        metric: paired_difference(fused[metric], values).to_json()
                        for metric, values in found.items()
                        if treatment is not FUSED
                    },
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    unfused = {treatment.name for treatment in TREATMENTS if not treatment.fold}
    better = [d for row in rows if row["treatment"] in unfused for d in row["fused_minus_this"].values()]
    summary = {
        "network": "builtin",
        "images": len(x),
        "object_share": float(masks.double().mean()),
        "comparisons": len(better),
        "fused_better": sum(d["low"] > 0 and visible(d["value"]) for d in better),
        "fused_worse": sum(d["high"] < 0 and visible(d["value"]) for d in better),
    }
    return {"summary": summary, "rows": rows}


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of a document: values, then paired differences."""
    titles = {t.name: t.title for t in (*TREATMENTS, OMIT)}
    summary, rows = document["summary"], document["rows"]
    values = [
        [
            row["composite"],
            titles[row["treatment"]],
            *[cell(row[metric]) for metric in METRICS],
            cell(row["kept"]),
        ]
        for row in rows
    ]
    differences = [
        [
            row["composite"],
            titles[row["treatment"]],
            *[cell(row["fused_minus_this"][metric], sign=True, bold=True) for metric in METRICS],
        ]
        for row in rows
        if row["fused_minus_this"]
    ]
    named = list(METRICS.values())
    return "\n".join(
        [
            f"{summary['images']} images, means with 95 % intervals; *kept* is the median of `1 - ΣR/f` with its "
            f"bootstrap interval. Objects cover {summary['object_share']:.1%} of an image, which is what a map without "
            "any information scores in mass and rank accuracy; its SRG is 0.",
            "",
            *table(["composite", "batch norms", *named, "kept"], values),
            "",
            "Fused minus not fused, paired by image; bold where the 95 % interval does not hold 0.",
            "",
            *table(["composite", "fused minus", *named], differences),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write rows and summary here")
    parser.add_argument(
        "--markdown", type=Path, help="put the tables into the section `quality` of this file"
    )
    parser.add_argument("--images", type=int, default=500, help="number of images (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    document = measure(arguments.images)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.markdown:
        write_section(arguments.markdown, "quality", markdown(document))
    print(json.dumps(document["summary"]))


if __name__ == "__main__":
    main()
