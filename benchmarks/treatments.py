"""What can be done with batch norms before relevance is propagated, and the heatmaps that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import lrp
from benchmarks.metrics import Estimate, Flipping, flip_pixels, mass_accuracy, rank_accuracy
from fusion import Network
from lrp.batch_norm import BatchNormRule
from lrp.composites import Composite


def unchanged(composite: Composite) -> Composite:
    return composite


def without_bias(composite: Composite) -> Composite:
    """The composite with every bias left out of its denominators: no linear layer keeps relevance."""
    return replace(
        composite,
        convolution=replace(composite.convolution, bias="omit"),
        linear=replace(composite.linear, bias="omit"),
    )


@dataclass(frozen=True)
class Treatment:
    """Batch norms folded into their neighbours, or left in the network with a rule of their own; `change` is what else
    is done to the composite."""

    name: str
    title: str
    fold: bool = True
    batch_norm: BatchNormRule = "magnitude"
    change: Callable[[Composite], Composite] = unchanged

    def explainer(self, network: Network, composite: Composite) -> lrp.Explainer:
        """An explainer in float64, so that no rounding stands between the treatments."""
        return lrp.Explainer(
            network,
            composite=replace(self.change(composite), batch_norm=self.batch_norm),
            dtype=torch.float64,
            device="cpu",
            fold=self.fold,
        )


FUSED = Treatment("fused", "fused")
OMIT = Treatment("omit", "fused, biases omitted", change=without_bias)
TREATMENTS = (
    FUSED,
    Treatment("identity", "identity rule", fold=False, batch_norm="identity"),
    Treatment("epsilon", "ε rule (captum)", fold=False, batch_norm="epsilon"),
    Treatment("magnitude", "magnitude rule (Hui & Binder)", fold=False, batch_norm="magnitude"),
)


@dataclass(frozen=True)
class Maps:
    """Heatmaps [N, H, W], and per image [N] where the relevance went.

    kept: what of the score stayed in the network, over the score (1 - sum R / f). kept_by_layer: the same for each
    layer that keeps any. kept_magnitude: the sum of the layers' magnitudes. amplification: the sum of the pixels' |R|
    over |f|.
    """

    heat: Tensor
    kept: Tensor
    kept_by_layer: dict[str, Tensor]
    kept_magnitude: Tensor
    amplification: Tensor


def heatmaps(explainer: lrp.Explainer, x: Tensor, target: Tensor, batch: int = 100) -> Maps:
    """Explain images [N, C, H, W] for the classes [N]. The ledger balances, or this raises UnbalancedLedger."""
    heats: list[Tensor] = []
    scores: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {}
    for images, classes in zip(torch.split(x, batch), torch.split(target, batch), strict=True):
        answer = explainer.explain(images, classes)
        assert answer.ledger is not None
        heats.append(answer.heatmap())
        scores.append(answer.ledger.score)
        for entry in answer.ledger.entries:
            kept.setdefault(f"{entry.layer or entry.node} {entry.op}", []).append(entry.kept)
    heat, score = torch.cat(heats), torch.cat(scores)
    shares = {layer: torch.cat(parts) / score for layer, parts in kept.items()}
    return Maps(
        heat,
        torch.stack(list(shares.values())).sum(0),
        shares,
        torch.stack(list(shares.values())).abs().sum(0),
        heat.abs().sum((1, 2)) / score.abs(),
    )


def qualities(
    scores: Network,
    x: Tensor,
    target: Tensor,
    maps: Maps,
    flipping: Flipping,
    masks: Tensor | None,
    batch: int = 100,
) -> dict[str, Tensor]:
    """Every metric of one set of maps, each [N]. scores: the network in the dtype of x."""
    parts = zip(torch.split(x, batch), torch.split(target, batch), torch.split(maps.heat, batch), strict=True)
    gains = [flip_pixels(scores, images, classes, heat, flipping).gain for images, classes, heat in parts]
    found = {"srg": torch.cat(gains)}
    if masks is not None:
        found["mass"] = mass_accuracy(maps.heat, masks)
        found["rank"] = rank_accuracy(maps.heat, masks)
    return found


def correct_only(network: Network, x: Tensor, labels: Tensor, count: int, batch: int = 200) -> Tensor:
    """The indices of the first `count` images that the network names rightly (fewer where there are not so many)."""
    with torch.no_grad():
        right = torch.cat([network(part).argmax(1) for part in torch.split(x, batch)]) == labels
    return right.nonzero()[:count, 0]


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """A markdown table."""
    return [
        "| " + " | ".join(headings) + " |",
        "|" + " --- |" * len(headings),
        *["| " + " | ".join(row) + " |" for row in rows],
    ]


def visible(difference: float, digits: int = 3) -> bool:
    """Whether a difference is more than rounding makes of it in a table."""
    return abs(difference) >= 0.5 * 0.1**digits


def cell(estimate: Mapping[str, float], digits: int = 3, sign: bool = False, bold: bool = False) -> str:
    """An estimate read back from JSON. bold: set it in bold where its interval does not hold 0."""
    found = Estimate(**estimate)  # type: ignore[arg-type]
    text = found.text(digits, sign)
    return f"**{text}**" if bold and found.differs_from_zero and visible(found.value, digits) else text
