"""The driver: folds run to a fixed point on a copy, and a report says what became of every normalization."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from fusion.affine import AffineNode, affine_node
from fusion.linear import linear_layer_ending_at
from fusion.network import Network, annotate, op_name
from fusion.normalize import argument
from fusion.passes import DIRECTIONS, Obstacle
from fusion.passes.plan import name_of
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
    kinds = {name: (name_of(node), op_name(node)) for name, node in norms.items()}
    taken: dict[str, tuple[str | fx.Node, ...]] = {}
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
    rows = []
    for name, node in norms.items():
        into = _places(taken.get(name, ()), taken)
        rows.append(Row(*kinds[name], _outcome(name, taken, left), into, reasons.get(name) or _why(node)))
    return Fused(result, Report(tuple(rows)))


def _candidate(network: Network, node: fx.Node) -> AffineNode | None:
    """The affine map at a node, where it is one to fold: bias maps belong to their layers, and constants in front of
    the first layer are preprocessing, whose zero is the zero of the explanation."""
    found = affine_node(network, node) if node.users else None
    if found is None or linear_layer_ending_at(network, node) is not None:
        return None
    if not _is_normalization(node) and (_is_preprocessing(network, node) or not _is_uniform(found)):
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
    both = (found.coefficients.scale, found.coefficients.shift)
    return all(sum(size != 1 for size in t.shape) <= 1 for t in both)


def _fold(network: Network, found: AffineNode) -> tuple[tuple[str | fx.Node, ...], str]:
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


def _outcome(name: str, taken: Collection[str], left: set[str]) -> Outcome:
    if name not in taken:
        return "kept"
    return "partly" if name in left else "folded"


def _why(node: fx.Node) -> str:
    if op_name(node) == "batch_norm" and not argument(node, "training"):
        return ""
    return NORMALIZATIONS[op_name(node)]


def _places(names: tuple[str | fx.Node, ...], taken: dict[str, tuple[str | fx.Node, ...]]) -> tuple[str, ...]:
    """The layers behind what took a map: a normalization that took it may itself have gone elsewhere. Keys are nodes: a
    layer that is used twice has two rows."""
    found: list[str] = []
    for name in names:
        if isinstance(name, str):
            found.append(name)
        else:
            found += _places(taken[name.name], taken) if name.name in taken else [name_of(name)]
    return tuple(dict.fromkeys(found))


def _is_normalization(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in NORMALIZATIONS
