"""log sum e^x as torch spells it out, with the maximum taken out of the sum, as one operator: it has its own rule.

log sum e^(x - m) + m is log sum e^x for every m that is the same along the sum, whatever m is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion.network import Network
from fusion.normalize import argument, is_call, put

aten = torch.ops.aten


def recognize_logsumexp(network: Network) -> None:
    """Write logsumexp where it is spelled out, in place. Needs shapes, and gives new nodes theirs."""
    for node in list(network.graph.nodes):
        if not is_call(node, "add") or argument(node, "alpha", 1) != 1:
            continue
        args = next(
            (a for pair in (node.args[:2], node.args[1::-1]) if (a := _read(*pair)) is not None), None
        )
        if args is not None:
            put(network, node, aten.logsumexp.default, *args)


def _read(logarithm: Any, added: Any) -> tuple[fx.Node, list[int], bool] | None:
    """(x, axes, whether they stay) where the values are log sum e^(x - m) over these axes, and m."""
    total: Any = logarithm.args[0] if is_call(logarithm, "log") else None
    power: Any = total.args[0] if is_call(total, "sum") else None
    difference: Any = power.args[0] if is_call(power, "exp") else None
    if not is_call(difference, "sub") or argument(difference, "alpha", 1) != 1:
        return None
    x, m = difference.args[:2]
    same = added is m or (is_call(added, "squeeze", "reshape") and added.args[0] is m)
    if (
        not same
        or not isinstance(x, fx.Node)
        or not isinstance(m, fx.Node)
        or x.meta.get("shape") != difference.meta["shape"]
    ):
        return None
    rank = len(x.meta["shape"])
    axes = [axis % rank for axis in argument(total, "dim") or range(rank)]
    if total.target is not aten.sum.dim_IntList or len(m.meta["shape"]) != rank:
        return None
    alike = all(m.meta["shape"][axis] == 1 for axis in axes)
    alike = alike and added.meta["shape"] == logarithm.meta["shape"]
    return (x, axes, bool(argument(total, "keepdim"))) if alike else None
