"""BN -> BN becomes BN: s2 (s1 x + t1) + t2 = (s2 s1) x + (s2 t1 + t2)."""

from __future__ import annotations

import torch

from fusion.linear import Affine, affine
from fusion.network import Network
from fusion.passes.fold import Fold

aten = torch.ops.aten


def fold_into_next_affine(network: Network, bn: Affine) -> Fold:
    """Merge with the one normalization that reads it; the merged one stands in the second one's place."""
    following = [affine(network, user) for user in bn.node.users]
    if len(following) != 1 or following[0] is None:
        return Fold(reason="it is not followed by another normalization alone")
    second = following[0]
    merged = {
        "weight": second.scale * bn.scale,
        "bias": second.scale * bn.shift + second.shift,
        "running_mean": torch.zeros_like(bn.scale),
        "running_var": torch.ones_like(bn.scale),
    }
    layer = second.node.meta.get("layer") or second.node.name
    dtype = bn.source.meta["dtype"]
    constants = [
        network.add_constant(f"{layer}.{name}", value.to(dtype), before=second.node)
        for name, value in merged.items()
    ]
    second.node.target = aten.batch_norm.default
    second.node.args = (bn.source, *constants, False, 0.0, 0.0, False)
    second.node.kwargs = {}
    network.graph.erase_node(bn.node)
    return Fold(into=(str(layer),))
