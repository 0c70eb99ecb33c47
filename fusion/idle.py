"""What changes nothing: reshapes to the shape that is there, permutations that cancel, casts to the type that is there.

Such nodes stand between the parts of a chain, and hide it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fusion.network import Network
from fusion.normalize import is_call

CASTING = ("to", "_to_copy")


def drop_idle(network: Network) -> None:
    """Read past nodes that change nothing, in place. Needs shapes, and leaves all of them."""
    for node in list(network.graph.nodes):
        source = _read_by(node)
        if source is not None:
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)  # or what it read would seem to have another reader


def sizes_of(node: fx.Node) -> list[tuple[int | None, int]]:
    """Each axis: its size (None where it follows the batch), and its size for two samples."""
    shape, example = node.meta.get("shape"), node.meta.get("example")
    return [] if shape is None or example is None else list(zip(shape, example, strict=True))


def _read_by(node: fx.Node) -> fx.Node | None:
    """What is there already, where a node changes nothing."""
    source: Any = node.args[0] if node.args else None
    if is_call(node, "reshape", "expand"):
        return source if node.meta.get("shape") is not None and sizes_of(source) == sizes_of(node) else None
    if is_call(node, "permute") and is_call(source, "permute"):
        first, second = _order(source), _order(node)
        return source.args[0] if [first[i] for i in second] == sorted(first) else None
    if is_call(node, *CASTING) and isinstance(source, fx.Node) and "device" not in node.kwargs:
        # Networks compute statistics in float32, whatever they are given.
        return source if source.meta.get("dtype") == node.meta["dtype"] else None
    return None


def _order(node: fx.Node) -> list[int]:
    order: Any = node.args[1]
    return [axis % len(order) for axis in order]
