"""The folds, each one pattern and its replacement; `PASSES` is the order in which the driver tries them."""

from __future__ import annotations

from fusion.passes.affine import fold_into_next_affine
from fusion.passes.backward import fold_into_linear_before
from fusion.passes.fold import Fold, Pass
from fusion.passes.forward import fold_into_linears_after

# Backward first: it needs no bias map. A chain of normalizations is merged before it is pushed forward.
PASSES: tuple[Pass, ...] = (fold_into_linear_before, fold_into_next_affine, fold_into_linears_after)

__all__ = ["PASSES", "Fold", "Pass"]
