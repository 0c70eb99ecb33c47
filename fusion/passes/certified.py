"""The certificate of one fold: the part of the graph that it rewrites, run before and after on random values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fusion.network import Network, call, is_size_arithmetic
from fusion.passes.plan import Plan

# A batch norm's scale may shrink a channel to nothing, and sums may cancel: differences are relative to the largest
# value of the whole tensor.
_TINY = 1e-30


def carry_out_certified(network: Network, plan: Plan) -> float:
    """Carry the plan out and return by how much the values that it promises to leave alone changed: the largest
    difference, relative to the largest value, in the network's own type. The values that the rewritten part reads are
    random normal, for two samples, so the certificate holds whatever the rest of the network does."""
    boundary = _boundary(network, plan)
    random = torch.Generator().manual_seed(0)
    values = {node: _random(node, random) for node in boundary}
    # A node that reads what must not change follows every edit of its place.
    with network.graph.inserting_before(network.output_node):
        probe = network.graph.call_function(tuple, (list(plan.unchanged),))
    try:
        before = _evaluate(network, probe, values)
        plan.carry_out()
        after = _evaluate(network, probe, values)
    finally:
        network.graph.erase_node(probe)
    return max(_difference(old, new) for old, new in zip(before, after, strict=True))


def _boundary(network: Network, plan: Plan) -> list[fx.Node]:
    """What the rewritten part reads from the rest of the network."""
    found: dict[fx.Node, None] = {}
    for node in plan.region:
        for source in node.all_input_nodes:
            if source not in plan.region and source.op != "get_attr" and not is_size_arithmetic(source):
                found[source] = None
    return list(found)


def _random(node: fx.Node, random: torch.Generator) -> Tensor:
    example, dtype = node.meta["example"], node.meta["dtype"]
    if dtype.is_floating_point:
        return torch.randn(example, dtype=torch.promote_types(dtype, torch.float32), generator=random).to(
            dtype
        )
    # Positions and masks: zero is valid for both.
    return torch.zeros(example, dtype=dtype)


def _evaluate(network: Network, probe: fx.Node, given: dict[fx.Node, Tensor]) -> list[Tensor]:
    """The values that the probe reads, computed from the given ones."""
    values: dict[fx.Node, Any] = dict(given)
    todo = [probe]
    order: dict[fx.Node, None] = {}
    while todo:  # everything between the given values and the probe, sources first
        node = todo[-1]
        missing = [n for n in node.all_input_nodes if n not in values and n not in order]
        if node in order or node in values or not missing:
            order[todo.pop()] = None
            continue
        for source in missing:
            if source.op == "get_attr":
                values[source] = network.constants[str(source.target)]
            elif is_size_arithmetic(source):
                values[source] = source.meta["example"]
            else:
                todo.append(source)
    with torch.no_grad():
        for node in order:
            if node not in values:
                values[node] = call(node, values)
    return list(values[probe])


def _difference(old: Tensor, new: Tensor) -> float:
    scale = max(_largest(old), _TINY)
    difference = _largest(old - new) / scale
    return difference if difference == difference else float("inf")  # NaN must not pass as a small one


def _largest(t: Tensor) -> float:
    """The largest magnitude, NaN where there is one, in one pass and without a copy."""
    low, high = t.aminmax()
    return max(abs(float(low)), abs(float(high)))
