"""What became of every normalization, and how far the fused network is from the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fusion.outputs import tensors_in

Outcome = Literal["folded", "partly", "kept"]


@dataclass(frozen=True)
class Row:
    """One normalization: its layer, its operator, what became of it, the layers that took it, why what is left stays,
    and the certificate of its fold: by how much the values behind it differ, relative to the largest (None: not
    measured).
    """

    layer: str
    op: str
    outcome: Outcome
    into: tuple[str, ...]
    reason: str
    certificate: float | None = None


@dataclass(frozen=True)
class Merged:
    """A layer that became a part of the layer `into`, which reads the same values and was added to it; or, by the name
    of the sum, the values themselves."""

    layer: str
    into: str


@dataclass(frozen=True)
class Report:
    """Every normalization of a network, in execution order, and the layers that others took in.

    certificate: the largest of all folds, those of constants and merged layers included (None: not measured).
    """

    rows: tuple[Row, ...]
    certificate: float | None = None
    merged: tuple[Merged, ...] = ()

    def count(self, outcome: Outcome) -> int:
        return sum(row.outcome == outcome for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        counts = {outcome: self.count(outcome) for outcome in ("folded", "partly", "kept")}
        rows, merged = ([asdict(item) for item in items] for items in (self.rows, self.merged))
        return {**counts, "certificate": self.certificate, "rows": rows, "merged": merged}

    def __str__(self) -> str:
        lines = [
            f"{r.layer:40} {r.op:14} {r.outcome:7} {', '.join(r.into) or '-':40} {r.reason}"
            for r in self.rows
        ]
        lines += [f"{m.layer:40} {'':14} {'merged':7} {m.into}" for m in self.merged]
        return "\n".join(lines) if lines else "no normalization layers"


@dataclass(frozen=True)
class Certificate:
    """The largest difference between two networks' outputs over a number of inputs.

    `max_relative` is the largest absolute difference over the scale of the output, its largest absolute value. In
    float32 it cannot be expected below what the original's own rounding makes of its answers.
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
    pairs = [pair for x in inputs for pair in _outputs(original, network, x)]
    count = len(pairs) // len(inputs)  # outputs per input
    differences, scales = [0.0] * count, [0.0] * count
    for i, (want, got) in enumerate(pairs):
        difference = float((want - got).abs().max())
        # NaN must not pass as a small difference.
        difference = difference if difference == difference else float("inf")
        differences[i % count] = max(differences[i % count], difference)
        scales[i % count] = max(scales[i % count], float(want.abs().max()))
    relative = max(d / max(s, 1e-30) for d, s in zip(differences, scales, strict=True))
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    return Certificate(sum(len(x) for x in inputs), max(differences), relative, dtype)


def _outputs(
    original: Callable[[Tensor], Any], network: Callable[[Tensor], Any], x: Tensor
) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        pairs = zip(tensors_in(original(x)), tensors_in(network(x)), strict=True)
        return [(want.double().cpu(), got.double().cpu()) for want, got in pairs]
