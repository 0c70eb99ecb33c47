"""The driver: folds run to a fixed point on a copy, and a report says what became of every normalization."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial

from torch import fx

from fusion.affine import AffineNode, affine_node
from fusion.linear import linear_layer_ending_at
from fusion.network import Network, annotate, op_name
from fusion.normalize import argument
from fusion.passes import (
    DIRECTIONS,
    Obstacle,
    Plan,
    carry_out_certified,
    plan_centering,
    plan_forward,
    plan_parallel,
    sums_over,
)
from fusion.passes.plan import name_of
from fusion.recognize import normalizations
from fusion.report import Merged, Outcome, Report, Row

# Operators that normalize, and why those that are no affine map at inference stay.
_INPUT_STATISTICS = "its statistics come from the input itself, so no constant weights can replace it"
_CENTRED = "it reads centred values; its root mean square comes from the input, so no constant weights can replace it"
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
    # Spelled out in primitives (`fusion.recognize` names them).
    "local_response_norm": _INPUT_STATISTICS,
    "variance_norm": _INPUT_STATISTICS,
    "standardization": _INPUT_STATISTICS,
    "divisive_norm": _INPUT_STATISTICS,
    "l2_norm": _INPUT_STATISTICS,
    "ada_norm": _INPUT_STATISTICS,
    "mixture_norm": "its responsibilities come from the input itself, so no constant weights can replace it",
}

# What of a normalization there was no fold for.
_MAP, _CENTERING = "its scale and shift stay", "its centering stays"


@dataclass(frozen=True)
class Fused:
    """The equivalent network without the normalizations that could be folded, and what became of each."""

    network: Network
    report: Report


def fuse(network: Network, *, certified: bool = False) -> Fused:
    """Fold every constant affine map, normalizations first of all, into the linear layers around it, make one layer of
    those that read the same values and are added, and centre what layer norms read where it is written.

    The network given is left as it is. Weights are computed in float64 and stored in the network's own dtype.
    certified: measure every fold by itself too (see `carry_out_certified`), in about the time of a few runs of the
    network.
    """
    # On the CPU, so that every device gets the same numbers.
    work = network.to(device="cpu")
    # The copy keeps the order of nodes and their names.
    spelled = normalizations(work)
    norms = {node.name: node for node in work.graph.nodes if _is_normalization(node) or node in spelled}
    kinds = {name: (name_of(node), spelled.get(node) or op_name(node)) for name, node in norms.items()}
    driver = _Driver(work, certified)
    driver.run()
    work.graph.eliminate_dead_code()
    result = Network(work.graph, work.constants)
    result.graph.lint()
    annotate(result)
    left = {node.name for node in result.graph.nodes}
    report = Report(
        tuple(
            Row(
                *kinds[name],
                outcome=_outcome(name, driver.taken, left),
                into=driver.places(name),
                reason=_reason(name, kinds[name][1], node, driver, left),
                certificate=driver.certificates.get(name),
            )
            for name, node in norms.items()
        ),
        max(driver.certificates.values(), default=0.0) if certified else None,
        tuple(Merged(layer, driver.taker(layer)) for layer in driver.merged),
    )
    if network.device.type != "cpu":
        result = result.to(device=network.device)
    return Fused(result, report)


@dataclass
class _Driver:
    """Runs the folds over a network's graph, in place, to a fixed point. What is noted is noted under node names."""

    network: Network
    certified: bool
    taken: dict[str, tuple[str | fx.Node, ...]] = field(default_factory=dict)
    obstacles: dict[tuple[str, str], str] = field(default_factory=dict)
    certificates: dict[str, float] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)  # layers by name, with those that took them in
    blocks: set[fx.Node] = field(default_factory=set)  # layers that took others in

    def run(self) -> None:
        progress = True
        while progress:
            progress = self._parallels() or self._affine_maps() or self._centerings()

    def taker(self, layer: str) -> str:
        """The layer that a layer is part of by now: itself, where none took it in."""
        seen = {layer}
        while (into := self.merged.get(layer, layer)) not in seen:
            seen.add(layer := into)
        return layer

    def places(self, name: str) -> tuple[str, ...]:
        """The layers that have the map of a normalization now."""
        return tuple(
            dict.fromkeys(self.taker(layer) for layer in _places(self.taken.get(name, ()), self.taken))
        )

    def _affine_maps(self) -> bool:
        progress = False
        for node in self._calls():
            found = _candidate(self.network, node)
            if found is not None:
                # Nothing in front of statistics of the input can take what stands behind them.
                ways = DIRECTIONS if found.strip is None else (plan_forward,)
                progress |= self._try(node, _MAP, *(partial(way, self.network, found) for way in ways))
        return progress

    def _parallels(self) -> bool:
        return self._merged_at(node for node in self._calls() if op_name(node) == "add")

    def _merged_at(self, sums: Iterable[fx.Node]) -> bool:
        progress = False
        for node in sums:
            progress |= self._merge(node)
        return progress

    def _merge(self, node: fx.Node) -> bool:
        try:
            plan = plan_parallel(self.network, node, self.blocks)
        except Obstacle:
            return False
        difference = self._carry_out(plan)
        self.merged[plan.gone] = name_of(plan.taker)
        self.blocks.add(plan.taker)
        if difference is not None:
            self.certificates[f"merged {plan.gone}"] = difference
        return True

    def _centerings(self) -> bool:
        progress = False
        for node in self._calls():
            if op_name(node) == "layer_norm":  # an earlier one may have taken it along
                progress |= self._try(node, _CENTERING, partial(plan_centering, self.network, node))
        return progress

    def _calls(self) -> list[fx.Node]:
        return [n for n in self.network.graph.nodes if n.op == "call_function"]

    def _try(self, node: fx.Node, what: str, *planners: Callable[[], Plan]) -> bool:
        """Carry out the first plan that there is; note what of the node stays, and why, where there is none."""
        obstacles = []
        for planner in planners:
            try:
                plan = planner()
            except Obstacle as obstacle:
                obstacles.append(str(obstacle))
                continue
            near = plan.region.union(*(node.users for node in plan.region))
            difference = self._carry_out(plan)
            for folded in plan.folded:
                name = folded.name
                self.taken[name] = (*self.taken.get(name, ()), *plan.into)
                self.obstacles.pop((name, what), None)
                if difference is not None:
                    self.certificates[name] = max(difference, self.certificates.get(name, 0.0))
            # A sum whose parts are layers now becomes one, which takes what follows it.
            self._merged_at(sums_over(self.network, near))
            return True
        self.obstacles[node.name, what] = "; ".join(dict.fromkeys(obstacles))
        return False

    def _carry_out(self, plan: Plan) -> float | None:
        """By how much the values behind the plan's part changed, where certificates are wanted."""
        if self.certified:
            return carry_out_certified(self.network, plan)
        plan.carry_out()
        return None


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


def _outcome(name: str, taken: Collection[str], left: set[str]) -> Outcome:
    if name not in taken:
        return "kept"
    return "partly" if name in left else "folded"


def _reason(name: str, op: str, node: fx.Node, driver: _Driver, left: set[str]) -> str:
    """Why a normalization, or a part of it, is still there. `op` is what it was, `node` what it became."""
    if name not in left:
        return ""
    obstacles = {what: reason for (of, what), reason in driver.obstacles.items() if of == name}
    if op == "batch_norm" and not argument(node, "training"):
        return obstacles.get(_MAP, "")
    base = _CENTRED if op == "layer_norm" and op_name(node) == "rms_norm" else NORMALIZATIONS[op]
    return "; ".join([base, *(f"{what}: {reason}" for what, reason in obstacles.items())])


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
