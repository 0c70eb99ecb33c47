"""The driver: folds run to a fixed point on a copy, and a report says what became of every normalization."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from fusion.linear import affine
from fusion.network import Network, annotate, op_name
from fusion.normalize import argument
from fusion.passes import PASSES
from fusion.passes.affine import fold_into_next_affine
from fusion.report import Report, Row

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
    """Fold every channel-wise affine normalization into the linear layers around it.

    The network given is left as it is. Weights are computed in float64 and stored in the network's own dtype.
    """
    found = [node for node in network.graph.nodes if _is_normalization(node)]
    work = network.copy()
    # The copy keeps the order of nodes and their names.
    names = {node.name: _layer_name(node) for node in found}
    outcome: dict[str, Row] = {}
    merged: dict[str, str] = {}
    folded = True
    while folded:
        folded = False
        for node in [n for n in work.graph.nodes if n.name in names and n.name not in outcome]:
            row = _fold_one(work, node, merged)
            if row is not None:
                outcome[node.name] = row
                folded = True
    for node in [n for n in work.graph.nodes if n.name in names and n.name not in outcome]:
        outcome[node.name] = Row(_layer_name(node), op_name(node), "kept", (), _why_kept(work, node))
    work.graph.eliminate_dead_code()
    result = Network(work.graph, work.constants)
    result.graph.lint()
    annotate(result)
    return Fused(result, Report(_final_places(outcome, merged, names)))


def _final_places(rows: dict[str, Row], merged: dict[str, str], names: dict[str, str]) -> tuple[Row, ...]:
    """A normalization that was merged into the next one went where that one went. Keys are nodes: a layer that is
    used twice has two rows."""

    def place(node: str) -> tuple[str, ...]:
        while node in merged:
            node = merged[node]
        return rows[node].into or (names[node],)

    return tuple(replace(rows[n], into=place(n)) if rows[n].into else rows[n] for n in names)


def _fold_one(network: Network, node: fx.Node, merged: dict[str, str]) -> Row | None:
    bn = affine(network, node)
    if bn is None:
        return None
    for attempt in PASSES:
        layer, op = _layer_name(node), op_name(node)
        readers = [user.name for user in node.users]
        fold = attempt(network, bn)
        if fold.into:
            if attempt is fold_into_next_affine:
                merged[node.name] = readers[0]
            return Row(layer, op, "folded", fold.into, "")
    return None


def _why_kept(network: Network, node: fx.Node) -> str:
    bn = affine(network, node)
    if bn is None:
        if op_name(node) == "batch_norm" and not argument(node, "training"):
            return "its parameters are computed from the input"
        return NORMALIZATIONS[op_name(node)]
    return "; ".join(attempt(network, bn).reason for attempt in PASSES if attempt is not PASSES[1])


def _is_normalization(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in NORMALIZATIONS


def _layer_name(node: fx.Node) -> str:
    return str(node.meta.get("layer") or node.name)
