"""What fusion does for heatmaps, by where the batch norms stand: the question of Guillemot et al. 2020
(arXiv:2002.11018). `python -m benchmarks.fusion_effect --json FILE [--markdown docs/fusion-effect.md]`.

Small networks for MNIST and CIFAR-10 are trained (or their weights taken from a folder), explained with their batch
norms fused and under the three rules for batch norms that stay, and, where batch norms and linear layers meet, under
rules that could mend the fused bias.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusion
import lrp
from benchmarks import datasets
from benchmarks.datasets import Images, Name
from benchmarks.metrics import Flipping, mean_estimate, median_estimate, paired_difference
from benchmarks.placements import PLACEMENTS, TRAINING, Placement, accuracy, trained, unseen
from benchmarks.sections import write_section
from benchmarks.treatments import (
    FUSED,
    OMIT,
    TREATMENTS,
    Treatment,
    cell,
    heatmaps,
    qualities,
    table,
    visible,
    without_bias,
)
from lrp.composites import Composite
from lrp.rules import LinearRule

EPSILON = Composite("Epsilon", lrp.Epsilon(), lrp.Epsilon())
# 2 x 2 regions. A flipped pixel becomes black, the digits' background, in MNIST and the mean colour in CIFAR-10.
FLIPPING: dict[Name, Flipping] = {
    "mnist": Flipping(patch=2, steps=14, fill=-0.1307 / 0.3081),
    "cifar10": Flipping(patch=2, steps=16, fill=0.0),
}
FOREGROUND = 127  # MNIST: brighter pixels are the digit


def _linear(name: str, title: str, rule: LinearRule) -> Treatment:
    return Treatment(name, title, change=lambda composite: replace(composite, linear=rule))


# Rules for the linear layers of a fused network that deal otherwise with what its biases keep.
REMEDIES = (
    OMIT,
    _linear("epsilon 0.25", "fused, epsilon 0.25", lrp.Epsilon(0.25)),
    _linear("epsilon 1", "fused, epsilon 1", lrp.Epsilon(1.0)),
    _linear("gamma 0.25", "fused, gamma 0.25", lrp.Gamma(0.25)),
    _linear("gamma 1", "fused, gamma 1", lrp.Gamma(1.0)),
    Treatment(
        "gamma 0.25 omit",
        "fused, gamma 0.25, biases omitted",
        change=lambda composite: without_bias(replace(composite, linear=lrp.Gamma(0.25))),
    ),
    _linear("alpha2 beta1", "fused, alpha 2 beta 1", lrp.AlphaBeta(2.0, 1.0)),
    _linear("z+", "fused, z+", lrp.ZPlus()),
)


def composites(placement: Placement) -> tuple[Composite, ...]:
    """EpsilonPlus is Epsilon where there is no convolution."""
    return (lrp.build("EpsilonPlus"), EPSILON) if placement.widths else (EPSILON,)


def treatments(placement: Placement, composite: Composite) -> tuple[Treatment, ...]:
    """Without batch norms all treatments are one. The remedies are for the field's composite of a network."""
    base = TREATMENTS if placement.normalizes else (FUSED,)
    return (*base, *REMEDIES) if composite == composites(placement)[0] else base


def measure(placement: Placement, images: Images, weights: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """One placement: its accuracy, and every composite under every treatment."""
    found = trained(placement, images, replace(TRAINING[placement.dataset], seed=seed), weights)
    x, pixels, target = unseen(found.network, images, count)
    masks = pixels[:, 0] > FOREGROUND if placement.dataset == "mnist" else None
    network = fusion.capture(found.network, (x[:2],))
    started = time.perf_counter()
    rows = []
    for composite in composites(placement):
        fused: dict[str, Tensor] = {}
        for treatment in treatments(placement, composite):
            maps = heatmaps(treatment.explainer(network, composite), x, target)
            values = qualities(network, x, target, maps, FLIPPING[placement.dataset], masks)
            fused = fused or values
            rows.append(
                {
                    "composite": composite.name,
                    "treatment": treatment.name,
                    **{metric: mean_estimate(v).to_json() for metric, v in values.items()},
                    "kept": median_estimate(maps.kept).to_json(),
                    "kept_magnitude": median_estimate(maps.kept_magnitude).to_json(),
                    "amplification": median_estimate(maps.amplification).to_json(),
                    "kept_by_layer": {k: float(v.median()) for k, v in maps.kept_by_layer.items()},
                    "fused_minus_this": {}
                    if treatment is FUSED
                    else {m: paired_difference(fused[m], v).to_json() for m, v in values.items()},
                }
            )
    return {
        "placement": placement.name,
        "dataset": placement.dataset,
        "seed": seed,
        "accuracy": accuracy(found.network, images),
        "images": len(x),
        "training_seconds": round(found.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "maps": rows,
    }


_FIRST = (
    "EpsilonPlus (Epsilon for all-linear networks), with these rules at its linear layers; where biases are left out, "
    "they are at convolutions too."
)


def markdown(document: Mapping[str, Any]) -> str:
    """The tables of a document, one per question."""
    titles = {t.name: t.title for t in (*TREATMENTS, *REMEDIES)}
    rows = document["rows"]
    summary = document["summary"]
    lines = [
        f"{summary['networks']} networks, {summary['images']} test images each that the network names rightly, "
        f"seed {summary['seed']}, training {summary['training']}."
    ]
    if summary["absent"]:
        lines.append(f"Not measured, for want of data: {', '.join(summary['absent'])}.")
    lines += ["", "### Accuracy, and what biases keep when fused", ""]
    lines += table(
        ["placement", "accuracy", "composite", "kept", "magnitudes, layer by layer"],
        [[r["placement"], f"{r['accuracy']:.1%}", *kept] for r in rows for kept in _kept(r)],
    )
    normalized = [r for r in rows if _has(r, "identity")]
    unfused = [t.name for t in TREATMENTS]
    remedies = [t.name for t in REMEDIES]
    lines += ["", "### SRG, fused and not", ""]
    lines += table(["placement", "composite", *[titles[t] for t in unfused]], _by(rows, "srg", unfused))
    lines += ["", "### SRG, fused minus not fused, paired by image", ""]
    lines += table(
        ["placement", "composite", *[titles[t] for t in unfused[1:]]], _gains(normalized, "srg", unfused[1:])
    )
    localized = [r for r in normalized if "mass" in r["maps"][0]]
    for metric, name in (("mass", "Mass"), ("rank", "Rank")) if localized else ():
        lines += ["", f"### {name} accuracy against the digit's pixels, fused minus not fused", ""]
        lines += table(
            ["placement", "composite", "fused", *[titles[t] for t in unfused[1:]]],
            [
                [*head[:2], cell(_map(r, head[1], "fused")[metric]), *head[2:]]
                for r in localized
                for head in _gains([r], metric, unfused[1:])
            ],
        )
    lines += ["", "### Remedies for the fused bias: what of the score is kept", "", _FIRST, ""]
    lines += table(
        ["placement", titles["fused"], *[_short(titles[t]) for t in remedies]],
        [[r["placement"], *[cell(_first(r, t)["kept"], 2) for t in ("fused", *remedies)]] for r in rows],
    )
    lines += [
        "",
        "### Amplification: the sum of all pixels' magnitudes of relevance over |f|",
        "",
        _FIRST,
        "",
    ]
    lines += table(
        ["placement", "identity rule", "fused", *[_short(titles[t]) for t in remedies]],
        [
            [
                r["placement"],
                *[
                    cell(_first(r, t)["amplification"], 1) if _has(r, t) else "-"
                    for t in ("identity", "fused", *remedies)
                ],
            ]
            for r in rows
        ],
    )
    lines += ["", "### Remedies: SRG, remedy minus fused, paired by image", "", _FIRST, ""]
    lines += table(
        ["placement", "fused", *[_short(titles[t]) for t in remedies]],
        [
            [
                r["placement"],
                cell(_first(r, "fused")["srg"]),
                *[
                    cell(_negated(_first(r, t)["fused_minus_this"]["srg"]), sign=True, bold=True)
                    for t in remedies
                ],
            ]
            for r in rows
        ],
    )
    return "\n".join(lines)


def _map(row: Mapping[str, Any], composite: str, treatment: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(
        m for m in row["maps"] if (m["composite"], m["treatment"]) == (composite, treatment)
    )
    return found


def _first(row: Mapping[str, Any], treatment: str) -> Mapping[str, Any]:
    return _map(row, row["maps"][0]["composite"], treatment)


def _has(row: Mapping[str, Any], treatment: str) -> bool:
    return any(m["treatment"] == treatment for m in row["maps"])


def _kept(row: Mapping[str, Any]) -> list[list[str]]:
    return [
        [m["composite"], cell(m["kept"], 2), cell(m["kept_magnitude"], 2)]
        for m in row["maps"]
        if m["treatment"] == FUSED.name
    ]


def _composites_of(row: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(m["composite"] for m in row["maps"]))


def _by(rows: list[Mapping[str, Any]], metric: str, names: list[str]) -> list[list[str]]:
    return [
        [
            row["placement"],
            composite,
            *[cell(_map(row, composite, t)[metric]) if _has(row, t) else "-" for t in names],
        ]
        for row in rows
        for composite in _composites_of(row)
    ]


def _gains(rows: list[Mapping[str, Any]], metric: str, names: list[str]) -> list[list[str]]:
    return [
        [
            row["placement"],
            composite,
            *[cell(_map(row, composite, t)["fused_minus_this"][metric], sign=True, bold=True) for t in names],
        ]
        for row in rows
        for composite in _composites_of(row)
    ]


def _negated(estimate: Mapping[str, float]) -> dict[str, float]:
    return {
        "value": -estimate["value"],
        "low": -estimate["high"],
        "high": -estimate["low"],
        "images": estimate["images"],
    }


def _short(title: str) -> str:
    return title.removeprefix("fused, ")


def default_weights() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "clearfold" / "fusion-effect"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write rows and summary here")
    parser.add_argument(
        "--markdown", type=Path, help="put the tables into the section `placements` of this file"
    )
    parser.add_argument("--data", type=Path, default=datasets.FOLDER, help="default %(default)s")
    parser.add_argument(
        "--weights", type=Path, default=default_weights(), help="of trained networks (default %(default)s)"
    )
    parser.add_argument("--tables-of", type=Path, help="measure nothing: make the tables of this JSON file")
    parser.add_argument("--images", type=int, default=500, help="per network (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default %(default)s)")
    parser.add_argument("--only", default="", help="placements whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s")
    arguments = parser.parse_args()
    if arguments.tables_of and not arguments.markdown:
        parser.error("--tables-of needs --markdown")
    if arguments.tables_of:
        document = json.loads(arguments.tables_of.read_text())
        write_section(arguments.markdown, "placements", markdown(document))
        return
    torch.set_num_threads(arguments.threads)
    read = cache(lambda name: datasets.load(name, arguments.data))
    rows: list[dict[str, Any]] = []
    absent: list[str] = []
    for placement in PLACEMENTS:
        if arguments.only not in placement.name:
            continue
        images = read(placement.dataset)
        if images is None:
            print(f"{placement.name}: not measured, {placement.dataset} is not in {arguments.data}")
            absent.append(placement.name)
            continue
        rows.append(measure(placement, images, arguments.weights, arguments.images, arguments.seed))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "maps"}), flush=True)
    document = {"summary": summarize(rows, absent, arguments.images, arguments.seed), "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.markdown and rows:
        write_section(arguments.markdown, "placements", markdown(document))
    print(json.dumps(document["summary"]))


def summarize(rows: list[dict[str, Any]], absent: list[str], images: int, seed: int = 0) -> dict[str, Any]:
    used = {row["dataset"] for row in rows}
    runs = [f"{name}: {t.images} images, {t.epochs} epochs" for name, t in TRAINING.items() if name in used]
    unfused = {t.name for t in TREATMENTS if not t.fold}
    differences = [
        m["fused_minus_this"]["srg"] for row in rows for m in row["maps"] if m["treatment"] in unfused
    ]
    return {
        "networks": len(rows),
        "images": images,
        "seed": seed,
        "training": "; ".join(runs),
        "absent": absent,
        "comparisons": len(differences),
        "fused_better": sum(d["low"] > 0 and visible(d["value"]) for d in differences),
        "fused_worse": sum(d["high"] < 0 and visible(d["value"]) for d in differences),
    }


if __name__ == "__main__":
    main()
