"""Relevance on every architecture: `python -m benchmarks.architectures --json FILE [--markdown FILE] [--only STR]`.

For each network: the composite that "auto" picks, whether every unit of relevance is accounted for, how much of the
score biases keep, how large relevance grows, and what an explanation costs beside a gradient. The same for the LRP of
other libraries on the same network (`benchmarks.peers`), which keep no account: what does not arrive at the input is
missing.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fusion
from benchmarks import over_zoos
from benchmarks.networks import Architecture
from benchmarks.over_zoos import worst
from benchmarks.peers import PEERS, Peer, explainer, scores_of
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


def measure(architecture: Architecture, rounds: int, peers: bool = True) -> dict[str, Any]:
    """One network explained by "auto", in float32: a row of the table, with `error` where it is refused, and under
    `peers` the same of the other libraries."""
    row: dict[str, Any] = {"network": architecture.name}
    try:
        module = calibrate(architecture.build(), architecture)
        x = architecture.example(IMAGES)
        network = fusion.capture(module, (x,))
        ours = Explainer(network, composite="auto", device="cpu", strict=False)
        row |= accounts(ours.explain(x))
        row |= {"composite": ours.composite.name, "reason": ours.reason}
        theirs = {peer.name: by_peer(peer, module, x) for peer in PEERS} if peers else {}
        runs = {"": partial(ours.explain, x), **{name: run for name, (_, run) in theirs.items() if run}}
        times = ratios_of_times(lambda: gradient(module, x), runs, rounds)
        row["time_over_gradient"] = times.get("")
        row["peers"] = {
            name: {**found, "time_over_gradient": times.get(name)} for name, (found, _) in theirs.items()
        }
    except Exception as error:  # one network that fails must not cost the others
        row["error"] = _short(error)
    return row


def by_peer(peer: Peer, module: nn.Module, x: Tensor) -> tuple[dict[str, Any], Callable[[], Tensor] | None]:
    """The figures of another library's explanation, and a function that repeats it; the error alone where it has
    none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            composite, explain = explainer(peer, module)
            values = explain(x).double().flatten(1)
    except Exception as error:  # a library that refuses is a row too
        return {"error": _short(error)}, None
    with torch.no_grad():
        score = scores_of(module, x).amax(1).double()
    arrived = values.sum(1) / score
    return {
        "composite": composite,
        "ledger_error": float((1 - arrived).abs().max()),
        "input_share": float(arrived.mean()),
        "kept_share": None,
        "relevance_over_score": float((values.abs().amax(1) / score.abs()).max()),
        "finite": bool(torch.isfinite(values).all()),
    }, partial(explain, x)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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
    (found,) = torch.autograd.grad(scores_of(module, x).amax(1).sum(), x)
    return found


def ratios_of_times(
    reference: Callable[[], Any], runs: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """How many times as long as the reference each takes: the median of the ratios of interleaved runs; nothing
    without rounds."""
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        unit = _seconds(reference)
        for name, run in runs.items():
            ratios[name].append(_seconds(run) / unit)
    return {name: statistics.median(found) for name, found in ratios.items() if found}


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


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
    by_peers = {
        peer.name: _of_finite([row["peers"][peer.name] for row in rows if peer.name in row.get("peers", {})])
        for peer in PEERS
    }
    return {
        "networks": len(rows),
        **_summary(rows),
        "refused": [row["network"] for row in rows if "error" in row],
        "beyond_goals": [row["network"] for row in rows if "error" not in row and not is_right(row)],
        "peers": {name: found for name, found in by_peers.items() if found["answered"]},
    }


def _of_finite(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of the answers that are numbers, and how many are not."""
    lost = [row for row in rows if "error" not in row and not row["finite"]]
    found = _summary([row for row in rows if row not in lost])
    return {**found, "answered": found["answered"] + len(lost), "not_finite": len(lost)}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if "error" not in row]
    times = [row["time_over_gradient"] for row in done if row["time_over_gradient"] is not None]
    return {
        "answered": len(done),
        "explained": sum(is_right(row) for row in rows),
        "exploded": sum(not row["relevance_over_score"] <= RELEVANCE_GOAL for row in done),
        "worst_ledger_error": worst([row["ledger_error"] for row in done]),
        "worst_relevance_over_score": worst([row["relevance_over_score"] for row in done]),
        "median_time_over_gradient": statistics.median(times) if times else None,
    }


def markdown(document: dict[str, Any]) -> str:
    """The table for docs/architectures.md from the JSON document."""
    summary, rows = document["summary"], document["rows"]
    done = [row for row in rows if "error" not in row]
    lines: list[str] = [
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
        *[f"- {_of_peer(name, found, summary['networks'])}" for name, found in summary["peers"].items()],
        "",
        "Other libraries keep no account, so their *ledger* is |1 - input / score|: what does not arrive is missing.",
        "zennit runs EpsilonPlusFlat with its canonizer for the architecture (or SequentialMergeBatchNorm) and with",
        "biases left out of denominators, so that nothing may be kept; captum runs its default rules, whose biases",
        "keep a share that it does not tell. A kind of error in place of figures: the library refuses the network.",
        "",
        "| network | composite | ledger | input | most kept by | max | time "
        + "".join(f"| {peer.name}: ledger | input | max | time " for peer in PEERS)
        + "|",
        "| --- | --- | --- | --- | --- | --- | --- " + "| --- | --- | --- | --- " * len(PEERS) + "|",
    ]
    for row in done:
        most = sorted(row["kept_by"].items(), key=lambda item: -abs(item[1]))[:2]
        kept = ", ".join(f"{op} {share:.0%}" for op, share in most)
        figures = f"{row['ledger_error']:.0e} | {row['input_share']:.1%} | {kept}"
        lines.append(
            f"| {row['network']} | {row['composite']} | {figures} | {row['relevance_over_score']:.1g} | "
            f"{_g(row['time_over_gradient'])} | "
            + " | ".join(_cells(row, peer.name) for peer in PEERS)
            + " |"
        )
    refused = [row for row in rows if "error" in row]
    if refused:
        lines += ["", "## Refused", "", *[f"- {row['network']}: {row['error']}" for row in refused]]
    return "\n".join(lines) + "\n"


def _of_peer(name: str, found: dict[str, Any], networks: int) -> str:
    return (
        f"{name}: answers on {found['answered']} of {networks}, with the ledger closed on {found['explained']}; "
        f"a value above {RELEVANCE_GOAL:g} times the score on {found['exploded']}, the largest "
        f"{_g(found['worst_relevance_over_score'])}; no finite numbers on {found['not_finite']}; "
        f"median time {_g(found['median_time_over_gradient'])} gradients."
    )


def _cells(row: dict[str, Any], peer: str) -> str:
    """A peer's four cells."""
    found = row.get("peers", {}).get(peer)
    if found is None:
        return " | | | "
    if "error" in found:
        return f"{found['error'].split(':')[0]} | | | "
    share = found["input_share"]
    arrived = f"{share:.1%}" if abs(share) < 100 else f"{share:.0e}"
    return (
        f"{found['ledger_error']:.0e} | {arrived} | {found['relevance_over_score']:.1g} | "
        f"{_g(found['time_over_gradient'])}"
    )


def _g(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def main() -> None:
    parser = over_zoos.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs for the time, 0 for none")
    parser.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    arguments = parser.parse_args()
    over_zoos.run(
        arguments,
        partial(measure, rounds=arguments.rounds, peers=not arguments.no_peers),
        summarize,
        markdown,
    )


if __name__ == "__main__":
    main()
