"""Relevance on every architecture: `python -m benchmarks.architectures --json FILE [--markdown FILE] [--only STR]`.

For each network: the composite that "auto" picks, whether every unit of relevance is accounted for, how much of the
score biases keep, how large relevance grows, and what an explanation costs beside a gradient.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fusion
from benchmarks import over_zoos
from benchmarks.networks import Architecture
from lrp import Explainer
from lrp.explainer import Explanation

CALIBRATION_IMAGES = 4
IMAGES = 2
LEDGER_GOAL = 1e-3  # the share of the score that may be nowhere
RELEVANCE_GOAL = 100.0  # the largest relevance of one input value, over the score


def calibrate(module: nn.Module, architecture: Architecture) -> nn.Module:
    """The module with the statistics of a random batch in its batch norms, as training would leave them: without, the
    signal of deep networks drowns in their biases."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        with torch.no_grad():
            module(architecture.example(CALIBRATION_IMAGES))
    return module.eval()


def measure(architecture: Architecture, rounds: int) -> dict[str, Any]:
    """One network explained by "auto", in float32: a row of the table, with `error` where it is refused."""
    row: dict[str, Any] = {"network": architecture.name}
    try:
        module = calibrate(architecture.build(), architecture)
        x = architecture.example(IMAGES)
        network = fusion.capture(module, (x,))
        explainer = Explainer(network, composite="auto", device="cpu", strict=False)
        explanation = explainer.explain(x)
        row |= accounts(explanation)
        row |= {"composite": explainer.composite.name, "reason": explainer.notes[-1]}
        row["time_over_gradient"] = ratio_of_times(
            lambda: explainer.explain(x), lambda: gradient(module, x), rounds
        )
    except Exception as error:  # one network that fails must not cost the others
        row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def accounts(explanation: Explanation) -> dict[str, Any]:
    """The figures of an explanation, each of the image that is worst (the shares: the mean)."""
    ledger, score = explanation.ledger, explanation.score.double()
    assert ledger is not None
    values = explanation.relevance.double().flatten(1)
    kept = {op: float((amount / score).mean()) for op, amount in ledger.kept_by().items()}
    return {
        "score": score.tolist(),
        "ledger_error": float(ledger.error.max()),
        "input_share": float((ledger.input / score).mean()),
        "kept_share": float((ledger.kept / score).mean()),
        "kept_by": {op: share for op, share in kept.items() if abs(share) > 1e-4},
        "relevance_over_score": float((values.abs().amax(1) / score.abs()).max()),
        "finite": bool(torch.isfinite(values).all()),
    }


def gradient(module: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the top class scores by the input, as anyone would write it."""
    x = x.clone().requires_grad_()
    scores = module(x)
    scores = scores if isinstance(scores, Tensor) else scores[0]
    (found,) = torch.autograd.grad(scores.amax(1).sum(), x)
    return found


def ratio_of_times(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> float | None:
    """How many times as long the first takes as the second: the median of interleaved runs' ratios; None without."""
    ratios = []
    for _ in range(rounds):
        seconds = []
        for run in (other, one):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios) if ratios else None


def is_right(row: dict[str, Any]) -> bool:
    """Whether every unit is accounted for and nothing has exploded."""
    return bool(
        "error" not in row
        and row["finite"]
        and row["ledger_error"] <= LEDGER_GOAL
        and row["relevance_over_score"] <= RELEVANCE_GOAL
    )


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """networks: all that were tried; explained: those with every unit accounted for and nothing exploded."""
    done = [row for row in rows if "error" not in row]
    times = [row["time_over_gradient"] for row in done if row["time_over_gradient"] is not None]
    return {
        "networks": len(rows),
        "explained": sum(is_right(row) for row in rows),
        "refused": [row["network"] for row in rows if "error" in row],
        "beyond_goals": [row["network"] for row in done if not is_right(row)],
        "worst_ledger_error": _worst([row["ledger_error"] for row in done]),
        "worst_relevance_over_score": _worst([row["relevance_over_score"] for row in done]),
        "median_time_over_gradient": statistics.median(times) if times else None,
    }


def _worst(figures: list[float]) -> float | None:
    """The largest, or what is no number at all; None of nothing."""
    return max(figures, key=lambda figure: math.inf if math.isnan(figure) else figure, default=None)


def markdown(document: dict[str, Any]) -> str:
    """The table for docs/architectures.md from the JSON document."""
    summary, rows = document["summary"], document["rows"]
    done = [row for row in rows if "error" not in row]
    lines = [
        "# Relevance on every architecture",
        "",
        "Made by `python -m benchmarks.architectures --json FILE --markdown docs/architectures.md`. Random weights,",
        f"statistics calibrated on {CALIBRATION_IMAGES} random images, float32, {IMAGES} images of noise each, the top",
        'class explained, `composite="auto"`. *ledger*: the share of the score that is nowhere, |1 - (input + kept) /',
        "score|, of the worse image. *input*: the share that arrives at the input; biases and what does not conserve",
        "keep the rest, *most kept by* says which operators. *max*: the largest relevance of one input value over the",
        "score. *time*: an explanation over a gradient of the original network, the median of interleaved runs.",
        "",
        f"{summary['networks']} networks, {summary['explained']} explained with the ledger closed to {LEDGER_GOAL:g} "
        f"and no value above {RELEVANCE_GOAL:g} times the score; worst ledger {_g(summary['worst_ledger_error'])}, "
        f"largest value {_g(summary['worst_relevance_over_score'])} of the score, median time "
        f"{_g(summary['median_time_over_gradient'])} gradients.",
        "",
        "| network | composite | ledger | input | most kept by | max | time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in done:
        most = sorted(row["kept_by"].items(), key=lambda item: -abs(item[1]))[:2]
        kept = ", ".join(f"{op} {share:.0%}" for op, share in most)
        figures = f"{row['ledger_error']:.0e} | {row['input_share']:.1%} | {kept}"
        lines.append(
            f"| {row['network']} | {row['composite']} | {figures} | {row['relevance_over_score']:.1g} | "
            f"{_g(row['time_over_gradient'])} |"
        )
    refused = [row for row in rows if "error" in row]
    if refused:
        lines += ["", "## Refused", "", *[f"- {row['network']}: {row['error']}" for row in refused]]
    return "\n".join(lines) + "\n"


def _g(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def main() -> None:
    parser = over_zoos.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs for the time, 0 for none")
    arguments = parser.parse_args()
    over_zoos.run(arguments, partial(measure, rounds=arguments.rounds), summarize, markdown)


if __name__ == "__main__":
    main()
