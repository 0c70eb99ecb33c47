"""The folds: an affine map is moved backward into the layers that write it, or forward into those that read it."""

from fusion.passes.backward import plan_backward
from fusion.passes.forward import plan_forward
from fusion.passes.plan import Obstacle, Plan

# Backward first: it needs neither bias maps nor thresholds.
DIRECTIONS = (plan_backward, plan_forward)

__all__ = ["DIRECTIONS", "Obstacle", "Plan", "plan_backward", "plan_forward"]
