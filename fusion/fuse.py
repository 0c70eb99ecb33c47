"""The driver: folds run to a fixed point on a copy, and a report says what became of every normalization."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from fusion.affine import AffineNode, affine_node
from fusion.linear import linear_layer_ending_at
from fusion.network import Network, annotate, op_name
from fusion.normalize import argument
from fusion.passes import DIRECTIONS, Obstacle
from fusion.report import Outcome, Report, Row

# Operators that normalize, and why those that are no affine map at inference stay.
_INPUT_STATISTICS = "its statistics come from the input itself, so no constant weights can replace it"
_BATCH_STATISTICS = (
    "it uses the statistics of the batch at hand (track_running_stats=False or training mode), so an image's answer "
    "depends on its neighbours; export it in evaluation mode with running statistics"
)
NORMALIZATIONS: dict[str, str] = {
    "batch_norm": _BATCH_STATISTICS,
    "instance_norm": _INPUT_STATISTICS,
    "layer_norm": _INPUT_STATISTICS,
    "group_norm": _INPUT_STATISTICS,
    "rms_norm": _INPUT_STATISTICS,
    "local_response_norm": _INPUT_STATISTICS,
}


@dataclass(frozen=True)
class Fused:
    """The equivalent network without the normalizations that could be folded, and what became of each."""

    network: Network
    report: Report


def fuse(network: Network) -> Fused:
    """Fold every constant affine map, normalizations first of all, into the linear layers around it.

    The network given is left as it is. Weights are computed in float64 and stored in the network's own dtype.
    """
    work = network.copy()
    # The copy keeps the order of nodes and their names.
    norms = {node.name: node for node in work.graph.nodes if _is_normalization(node)}
    kinds = {name: (_layer_name(node), op_name(node)) for name, node in norms.items()}
    taken: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    progress = True
    while progress:
        progress = False
        for node in [n for n in work.graph.nodes if n.op == "call_function"]:
            found = _candidate(work, node)
            if found is None:
                continue
            name, partial = node.name, found.strip is not None
            into, reason = _fold(work, found)
            reasons[name] = reason
            if into:
                taken[name] = (*taken.get(name, ()), *into)
                reasons[name] = _INPUT_STATISTICS if partial else ""
                progress = True
    work.graph.eliminate_dead_code()
    result = Network(work.graph, work.constants)
    result.graph.lint()
    annotate(result)
    left = {node.name for node in result.graph.nodes}
    rows = [
        Row(*kinds[name], _outcome(name, taken, left), taken.get(name, ()), reasons.get(name) or _why(node))
        for name, node in norms.items()
    ]
    return Fused(result, Report(_final_places(rows)))


def _candidate(network: Network, node: fx.Node) -> AffineNode | None:
    """The affine map at a node, where it is one to fold: bias maps belong to their layers, and constants in front of
    the first layer are preprocessing, whose zero is the zero of the explanation."""
    found = affine_node(network, node) if node.users else None
    if found is None or linear_layer_ending_at(network, node) is not None:
        return None
    if not _is_normalization(node):
        if _is_preprocessing(network, node) or not _is_uniform(found):
            return None
    return found


def _is_preprocessing(network: Network, node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen or network.constant(current) is not None:
            continue
        seen.add(current)
        if len(seen) > 20 or linear_layer_ending_at(network, current) is not None:
            return False
        todo += current.all_input_nodes
    return True


def _is_uniform(found: AffineNode) -> bool:
    """Whether a constant is one number, or one per channel: position embeddings are signals of their own."""
    for t in (found.coefficients.scale, found.coefficients.shift):
        if sum(size != 1 for size in t.shape) > 1:
            return False
    return True


def _fold(network: Network, found: AffineNode) -> tuple[tuple[str, ...], str]:
    """The layers that took the map, or () and why none could."""
    reasons = []
    for direction in DIRECTIONS:
        try:
            plan = direction(network, found)
        except Obstacle as obstacle:
            reasons.append(str(obstacle))
            continue
        plan.carry_out()
        return plan.into, ""
    return (), "; ".join(dict.fromkeys(reasons))


def _outcome(name: str, taken: dict[str, tuple[str, ...]], left: set[str]) -> Outcome:
    if name not in taken:
        return "kept"
    return "partly" if name in left else "folded"


def _why(node: fx.Node) -> str:
    if op_name(node) == "batch_norm" and not argument(node, "training"):
        return ""
    return NORMALIZATIONS[op_name(node)]


def _final_places(rows: list[Row]) -> tuple[Row, ...]:
    """A normalization that was merged into the next one went where that one went."""
    places = {row.layer: row.into for row in rows}

    def resolve(layer: str, seen: frozenset[str]) -> tuple[str, ...]:
        into = places.get(layer, ())
        if layer in seen or not into:
            return (layer,)
        return tuple(dict.fromkeys(place for name in into for place in resolve(name, seen | {layer})))

    return tuple(replace(row, into=resolve(row.layer, frozenset()) if row.into else ()) for row in rows)


def _is_normalization(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in NORMALIZATIONS


def _layer_name(node: fx.Node) -> str:
    return str(node.meta.get("layer") or node.name)
