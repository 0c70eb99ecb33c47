"""The account of an explanation: what every node received, what it passed on, and what stayed where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One node's account, per sample (and target): tensors [N] or [N, T] in float64."""

    node: str
    layer: str
    op: str
    received: Tensor
    passed: Tensor

    @property
    def kept(self) -> Tensor:
        return self.received - self.passed


@dataclass(frozen=True)
class Ledger:
    """Every unit of relevance of an explanation: score = input + kept, up to rounding.

    score: the explained output; input: the relevance that arrived at the input; both [N] or [N, T]. `entries` lists
    the nodes at which relevance can stay (biases, stabilizers, constants, operations that do not conserve).
    """

    score: Tensor
    input: Tensor
    entries: tuple[Entry, ...]

    @property
    def kept(self) -> Tensor:
        """What stayed in the network in all: [N] or [N, T]."""
        return sum((entry.kept for entry in self.entries), torch.zeros_like(self.score))

    @property
    def error(self) -> Tensor:
        """|1 - (input + kept) / score|, the share of the score that is nowhere (absolute where the score is 0)."""
        gap = (self.score - self.input - self.kept).abs()
        return torch.where(self.score == 0, gap, gap / self.score.abs().clamp(min=1e-300))

    @property
    def turnover(self) -> Tensor:
        """All relevance that was moved, signs ignored: the scale of rounding errors."""
        return (
            self.score.abs()
            + self.input.abs()
            + sum((entry.received.abs() for entry in self.entries), torch.zeros_like(self.score))
        )

    @property
    def finite(self) -> bool:
        """Whether every amount of the balance is a finite number."""
        return all(bool(amount.isfinite().all()) for amount in (self.score, self.input, self.kept))

    def closes(self, tolerance: float) -> bool:
        """Whether nothing is missing but rounding: the gap stays below `tolerance` times the turnover."""
        gap = (self.score - self.input - self.kept).abs()
        return bool((gap <= tolerance * self.turnover).all())

    def kept_by(self) -> dict[str, Tensor]:
        """What stayed, by kind of operator."""
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros_like(self.score))
        for entry in self.entries:
            totals[entry.op] = totals[entry.op] + entry.kept
        return dict(totals)

    def summary(self) -> dict[str, Any]:
        """Plain numbers (lists per sample where there are several): score, input, kept, error, kept_by."""
        return {
            "score": _plain(self.score),
            "input": _plain(self.input),
            "kept": _plain(self.kept),
            "error": _plain(self.error),
            "kept_by": {op: _plain(kept) for op, kept in self.kept_by().items()},
        }

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "node": e.node,
                "layer": e.layer,
                "op": e.op,
                "received": _plain(e.received),
                "passed": _plain(e.passed),
                "kept": _plain(e.kept),
            }
            for e in self.entries
        ]
        return {**self.summary(), "entries": rows}

    def __str__(self) -> str:
        lines = [f"{'layer':40} {'operator':16} {'received':>12} {'kept':>12}"]
        for e in self.entries:
            received, kept = float(e.received.sum()), float(e.kept.sum())
            lines.append(f"{e.layer or e.node:40} {e.op:16} {received:12.5g} {kept:12.5g}")
        lines.append(
            f"score {float(self.score.sum()):.6g} = input {float(self.input.sum()):.6g} + kept "
            f"{float(self.kept.sum()):.6g}, error {float(self.error.max()):.2g}"
        )
        return "\n".join(lines)


def _plain(t: Tensor) -> Any:
    values = t.detach().cpu()
    return values.item() if values.numel() == 1 else values.tolist()


class Recording:
    """Collects the amounts of one explanation while its gradients are computed; belongs to one call.

    masks: what of the relevance of a watched node passes on (`lrp.inner`), by the node's name.
    """

    def __init__(self, count: int, masks: Mapping[str, Tensor] | None = None) -> None:
        self.count = count
        self._masks = masks or {}
        self._targets: list[dict[str, tuple[Tensor, Tensor]]] = []
        self._watched: list[dict[str, Tensor]] = []

    def next_target(self) -> None:
        """All that is recorded from now on belongs to the next target."""
        self._targets.append({})
        self._watched.append({})

    def record(self, key: str, received: Tensor, passed: Tensor) -> None:
        current = self._targets[-1]
        if key in current:
            received, passed = current[key][0] + received, current[key][1] + passed
        current[key] = (received, passed)

    def watch(self, key: str, relevance: Tensor) -> Tensor | None:
        """Take the relevance of a watched node; returns the mask of what passes on, None for all of it."""
        mask = self._masks.get(key)
        self._watched[-1][key] = relevance if mask is None else relevance * mask
        return mask

    def watched(self, key: str) -> list[Tensor | None]:
        """The relevance of a watched node for every target (behind a mask, what passed); None where none came."""
        return [target.get(key) for target in self._watched]

    def ledger(
        self, score: Tensor, relevance_sum: Tensor, layers: dict[str, tuple[str, str]], several: bool
    ) -> Ledger:
        """Close the account. `layers` maps node names to (layer, operator) in execution order."""
        entries = []
        directed = {
            f"{key}:through": (layers.get(key, (key, ""))[0] or key, "through") for key in self._masks
        }
        for node, (layer, op) in {**layers, **directed}.items():
            columns = [target.get(node) for target in self._targets]
            if all(column is None for column in columns):
                continue
            zero = torch.zeros(score.shape[0], dtype=torch.float64, device=score.device)
            pairs = [(zero, zero) if column is None else column for column in columns]
            received, passed = (torch.stack([pair[i] for pair in pairs], 1) for i in (0, 1))
            if not several:
                received, passed = received[:, 0], passed[:, 0]
            entries.append(Entry(node, layer, op, received, passed))
        return Ledger(score.double(), relevance_sum.double(), tuple(entries))
