"""What became of every normalization, and how far the fused network is from the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Outcome = Literal["folded", "partly", "kept"]


@dataclass(frozen=True)
class Row:
    """One normalization: its layer, its operator, what became of it, the layers that took it, and why."""

    layer: str
    op: str
    outcome: Outcome
    into: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Report:
    """Every normalization of a network, in execution order."""

    rows: tuple[Row, ...]

    def count(self, outcome: Outcome) -> int:
        return sum(row.outcome == outcome for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        counts = {outcome: self.count(outcome) for outcome in ("folded", "partly", "kept")}
        return {**counts, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines = [
            f"{r.layer:40} {r.op:14} {r.outcome:7} {', '.join(r.into) or '-':40} {r.reason}"
            for r in self.rows
        ]
        return "\n".join(lines) if lines else "no normalization layers"


@dataclass(frozen=True)
class Certificate:
    """The largest difference between two networks' outputs over a number of inputs.

    `max_relative` is the largest absolute difference of an input's outputs over the largest absolute output for
    that input.
    """

    inputs: int
    max_absolute: float
    max_relative: float
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def certify(
    original: Callable[[Tensor], Any], network: Callable[[Tensor], Any], inputs: Sequence[Tensor]
) -> Certificate:
    """Run both on the same inputs, each a batch [N, ...]; outputs may be one tensor or a tuple of them."""
    absolute = relative = 0.0
    with torch.no_grad():
        for x in inputs:
            for want, got in zip(_tensors(original(x)), _tensors(network(x)), strict=True):
                for w, g in zip(want.double().cpu(), got.double().cpu(), strict=True):
                    difference = float((w - g).abs().max())
                    # NaN must not pass as a small difference.
                    difference = difference if difference == difference else float("inf")
                    absolute = max(absolute, difference)
                    relative = max(relative, difference / max(float(w.abs().max()), 1e-30))
    count = sum(len(x) for x in inputs)
    return Certificate(count, absolute, relative, str(inputs[0].dtype).removeprefix("torch."))


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]
