"""The name of each layer: the one that the network's author gave it, wherever the file still has it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from models.formats.onnx.registry import Node

# What exporters append to a layer's name to name its weights.
_WEIGHT = re.compile(
    r"[._/](weight|bias|w|b|w_0|b_0|kernel|gamma|beta|scale|running_mean|running_var|in_proj_weight)(_quantized)?(:0)?$"
)
_WEIGHTED = {
    "Conv",
    "ConvTranspose",
    "Linear",
    "Gemm",
    "BatchNormalization",
    "LayerNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "PRelu",
}


def with_path(node: Node, weight: str | None) -> Node:
    """The node with the path of the module it belongs to; `weight` names its first constant operand."""
    return replace(node, layer=_path(node, weight))


def _path(node: Node, weight: str | None) -> str:
    of_weight = _weight_layer(weight) if node.op in _WEIGHTED else None
    scopes = node.scopes
    if len(scopes) >= 2 and not scopes[-2].startswith("_empty"):
        # A convolution that swallowed its normalization carries that one's scope; its weight knows better.
        swallowed = "batch_norm" in scopes[-1] and node.op != "BatchNormalization"
        return of_weight if swallowed and of_weight else scopes[-2]
    if "/" in node.name:
        return _join(node.name.split("/")[:-1])
    if of_weight:
        return of_weight
    return _clean(node.name) if node.name and not scopes else ""


def _join(segments: Sequence[str]) -> str:
    """`/layer1/layer1.0/conv1` is layer1.0.conv1: each segment repeats the one before that it extends."""
    parts: list[str] = []
    for segment in segments:
        if parts and segment.startswith(parts[-1] + "."):
            parts[-1] = segment
        elif segment:
            parts.append(segment)
    return _clean(".".join(parts))


def _weight_layer(weight: str | None) -> str | None:
    if not weight or "::" in weight:
        return None
    found = _WEIGHT.search(weight)
    return _clean(weight[: found.start()].replace("/", ".")) if found else None


def _clean(name: str) -> str:
    return ".".join(part for part in name.replace("/", ".").replace(":", "_").split(".") if part)


def unique(nodes: Sequence[Node]) -> list[str]:
    """One name per node: its module's path if the node is what that module does, else path and operator.

    A module's work is its only node, or its only one with weights. In `layer1.0`, which has children,
    an addition becomes `layer1.0.add`, the next one `layer1.0.add_1`.
    """
    members: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        members.setdefault(node.layer, []).append(i)
    parents = {path.rpartition(".")[0] for path in members}
    parents |= {".".join(path.split(".")[:k]) for path in members for k in range(1, path.count(".") + 1)}
    names = [""] * len(nodes)
    taken: set[str] = set()
    for path, indices in members.items():
        weighted = [i for i in indices if nodes[i].op in _WEIGHTED]
        sole = indices if len(indices) == 1 else weighted
        if path and path not in parents and len(sole) == 1:
            names[sole[0]] = path
            taken.add(path)
    counts: Counter[str] = Counter()
    for i, node in enumerate(nodes):
        base = f"{node.layer}.{_snake(node.op)}" if node.layer else _snake(node.op)
        while not names[i]:
            name = f"{base}_{counts[base]}" if counts[base] else base
            counts[base] += 1
            if name not in taken and name not in parents:
                names[i] = name
                taken.add(name)
    return names


def _snake(op: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", op).lower()
