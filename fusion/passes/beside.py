"""Beside: a map that is added to a linear layer that reads the same values becomes a part of that layer.

S x + T + (W x + b) = (W + S I) x + (b + T): the identity branches of networks that are reparametrized for inference
(Ding et al. 2021, RepVGG, arXiv:2101.03697, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fusion.affine import AffineNode
from fusion.linear import LinearLayer, linear_layer_ending_at
from fusion.network import Network, op_name, reads_values
from fusion.normalize import argument
from fusion.passes.parallel import keeps_places
from fusion.passes.plan import Obstacle, Plan, fits_behind, fold_beside, name_of
from fusion.recognize import owner


def plan_beside(network: Network, start: AffineNode) -> Plan:
    """Move the map at `start` into a layer that reads the same values and is added to it. Raises Obstacle."""
    if start.strip is not None:
        raise Obstacle("it stands behind statistics of its input")
    sums: list[fx.Node] = []
    current, sign = start.node, 1
    while True:
        above = _sum_above(current)
        if above is None:
            raise Obstacle("nothing is added to it that reads the same values and can take it")
        sums.append(above)
        here = above.args.index(current)
        other: fx.Node = above.args[1 - here]  # type: ignore[assignment]
        if not sums[1:] and here == 0 and op_name(above) == "sub":
            raise Obstacle(f"'{name_of(above)}' subtracts from it")
        # a - b: what is known of b's sign in the sum turns around.
        sign *= -1 if here == 1 and op_name(above) == "sub" else 1
        turn = -1 if here == 0 and op_name(above) == "sub" else 1
        for layer, path, own in _layers(network, other, above, turn):
            if layer.source is start.source and keeps_places(layer):
                return _plan(network, start, sums, layer, path, sign * own)
        current = above


def _plan(
    network: Network,
    start: AffineNode,
    sums: list[fx.Node],
    layer: LinearLayer,
    path: list[fx.Node],
    sign: int,
) -> Plan:
    c = start.coefficients.map(lambda t: sign * t)
    fits_behind(network, layer.node, c)
    first = sums[0]

    def edit() -> None:
        fold_beside(network, layer.node, c)
        # The fold may have put a bias map behind the layer: what stands beside the map by now.
        rest: fx.Node = first.args[1 - first.args.index(start.node)]  # type: ignore[assignment]
        first.replace_all_uses_with(rest)
        network.graph.erase_node(first)
        start.node.replace_all_uses_with(start.source)  # sizes
        network.graph.erase_node(start.node)

    region = frozenset((start.node, *sums, *path, layer.node, layer.output))
    return Plan((edit,), (layer.name,), (owner(network, start),), region, (sums[-1],))


def _sum_above(node: fx.Node) -> fx.Node | None:
    """The sum of two signals of one shape that alone reads this node."""
    readers = [user for user in node.users if reads_values(user)]
    if len(readers) != 1 or readers[0].op != "call_function" or op_name(readers[0]) not in ("add", "sub"):
        return None
    above = readers[0]
    a, b = above.args[:2]
    if argument(above, "alpha", 1) != 1 or a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    return above if a.meta.get("shape") == b.meta.get("shape") == above.meta.get("shape") else None


def _layers(
    network: Network, node: fx.Node, reader: fx.Node, sign: int
) -> Iterator[tuple[LinearLayer, list[fx.Node], int]]:
    """The linear layers that end in this part of a sum and nowhere else, the sums on the way, and their signs."""
    if any(user is not reader for user in node.users if reads_values(user)):
        return
    layer = linear_layer_ending_at(network, node)
    if layer is not None:
        yield layer, [], sign
        return
    if node.op != "call_function" or op_name(node) not in ("add", "sub") or argument(node, "alpha", 1) != 1:
        return
    for place, part in enumerate(node.args[:2]):
        if isinstance(part, fx.Node) and part.meta.get("shape") == node.meta.get("shape"):
            turn = -1 if place == 1 and op_name(node) == "sub" else 1
            for layer, path, own in _layers(network, part, node, sign * turn):
                yield layer, [node, *path], own
