"""The folds: an affine map is moved backward into the layers that write it, or forward into those that read it; what
layer norms read is centred where it is written; layers side by side become one."""

from fusion.passes.backward import plan_backward, plan_behind_activations
from fusion.passes.beside import plan_beside
from fusion.passes.centering import plan_centering
from fusion.passes.certified import carry_out_certified
from fusion.passes.forward import plan_forward
from fusion.passes.parallel import Merge, plan_parallel, sums_over
from fusion.passes.plan import Obstacle, Plan

# Backward first: it needs neither bias maps nor thresholds.
DIRECTIONS = (plan_backward, plan_forward, plan_beside, plan_behind_activations)

__all__ = [
    "DIRECTIONS",
    "Merge",
    "Obstacle",
    "Plan",
    "carry_out_certified",
    "plan_backward",
    "plan_behind_activations",
    "plan_beside",
    "plan_centering",
    "plan_forward",
    "plan_parallel",
    "sums_over",
]
