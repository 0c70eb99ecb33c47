"""A network as the service has it, ready to explain."""

from dataclasses import dataclass

import lrp
from models.preprocess import InputSpec


@dataclass(frozen=True)
class Subject:
    """A network, ready to explain: what it takes, how its classes are called (or the channels of the output that is
    explained by default), how many there are scores for (None: none), and its explainer."""

    id: str
    input: InputSpec
    labels: tuple[str, ...] | None
    classes: int | None
    explainer: lrp.Explainer

    def label(self, index: int) -> str | None:
        return self.labels[index] if self.labels and index < len(self.labels) else None
