"""Layer-wise relevance propagation as the gradient of a surrogate graph."""

from lrp import composites, heatmap
from lrp.composites import COMPOSITES, Composite, build
from lrp.explainer import Explainer, Explanation, explain, resolve_device
from lrp.grids import Grid
from lrp.inner import InnerLayer, InnerRelevance
from lrp.ledger import Entry, Ledger
from lrp.regions import Box
from lrp.rules import LRP0, AbsLRP, AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from lrp.targets import Contrast, Explained, Neurons, Output

__all__ = [
    "COMPOSITES",
    "LRP0",
    "AbsLRP",
    "AlphaBeta",
    "Box",
    "Composite",
    "Contrast",
    "Entry",
    "Epsilon",
    "Explained",
    "Explainer",
    "Explanation",
    "Flat",
    "Gamma",
    "Grid",
    "InnerLayer",
    "InnerRelevance",
    "Ledger",
    "Neurons",
    "Output",
    "WSquare",
    "ZBox",
    "ZPlus",
    "build",
    "composites",
    "explain",
    "heatmap",
    "resolve_device",
]
