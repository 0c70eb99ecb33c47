"""Instance normalization as torch spells it out: the batch norm of one sample whose channels are all samples' channels.

Weights and running statistics are repeated once per sample for it; here they are one per channel again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion.network import Network
from fusion.normalize import argument, is_call, put

aten = torch.ops.aten


def recognize_instance_norms(network: Network) -> None:
    """Write instance_norm where a batch norm stands for it, in place. Needs shapes, and gives new nodes theirs."""
    for node in list(network.graph.nodes):
        norm: Any = node.args[0] if is_call(node, "reshape") else None
        if is_call(norm, "batch_norm") and len(norm.users) == 1 and is_call(norm.args[0], "reshape"):
            _write(network, node, norm)


def _write(network: Network, node: fx.Node, norm: fx.Node) -> None:
    folded: Any = norm.args[0]
    source: Any = folded.args[0]
    shape = source.meta["shape"]
    if node.meta["shape"] != shape or len(shape) < 3 or None in shape[1:]:
        return
    samples, channels = source.meta["example"][:2]
    if norm.meta["example"] != (1, samples * channels, *shape[2:]):
        return
    names = ("weight", "bias", "running_mean", "running_var")
    vectors = [_per_channel(network, argument(norm, name), channels, node) for name in names]
    if any(len(found) == 0 for found in vectors):
        return
    training, momentum, eps = (argument(norm, name) for name in ("training", "momentum", "eps"))
    given = (found[0] for found in vectors)
    new = put(network, node, aten.instance_norm.default, source, *given, training, momentum, eps, False)
    new.meta["layer"] = norm.meta.get("layer", "")


def _per_channel(network: Network, value: Any, channels: int, before: fx.Node) -> tuple[fx.Node | None, ...]:
    """(vector with one number per channel) where a value repeats it once per sample, (None) for None; () where it does
    something else."""
    if value is None:
        return (None,)
    if is_call(value, "repeat"):
        vector = network.constant(value.args[0])
        return (value.args[0],) if vector is not None and tuple(vector.shape) == (channels,) else ()
    # Of a program for one batch size: repeated already.
    vector = network.constant(value)
    if vector is None or vector.ndim != 1 or vector.numel() % channels:
        return ()
    rows = vector.reshape(-1, channels)
    if not bool((rows == rows[:1]).all()):
        return ()
    return (network.add_constant(str(value.target), rows[0].clone(), before=before),)
