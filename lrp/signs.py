"""Which tensors of a network cannot be negative: half of a rule's terms vanish behind a ReLU."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fusion.network import Network, is_size_arithmetic, op_name
from fusion.normalize import argument

_ALWAYS = {
    "relu",
    "relu6",
    "sigmoid",
    "hardsigmoid",
    "softmax",
    "_softmax",
    "abs",
    "exp",
    "square",
}
# Non-negative if everything they read is.
_PRESERVING = set(
    """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool2d mean sum amax amin reshape flatten permute transpose squeeze unsqueeze
    expand slice select cat stack add mul div round maximum minimum getitem split chunk unbind pixel_shuffle roll flip
    index_select upsample_nearest2d upsample_bilinear2d to _to_copy prelu leaky_relu elu gelu silu hardswish
    dropout unflatten split_with_sizes""".split()
)


def _at_least_zero(bound: object) -> bool:
    return isinstance(bound, int | float) and bound >= 0


_BY_ARGUMENT: dict[str, Callable[[fx.Node], bool]] = {
    "hardtanh": lambda n: _at_least_zero(argument(n, "min_val")),
    "clamp": lambda n: _at_least_zero(argument(n, "min")),
    "clamp_min": lambda n: _at_least_zero(argument(n, "min")),
    "pow": lambda n: bool(n.args[1] == 2),
    "softplus": lambda n: _at_least_zero(argument(n, "beta")),
}


def non_negative(network: Network) -> set[fx.Node]:
    """The nodes whose values are >= 0 for every input."""
    found: set[fx.Node] = set()
    for node in network.graph.nodes:
        constant = network.constant(node)
        if constant is not None:
            if constant.is_floating_point() and bool((constant >= 0).all()):
                found.add(node)
        elif node.op == "call_function":
            op = op_name(node)
            by_argument = _BY_ARGUMENT.get(op)
            if (
                op in _ALWAYS
                or (by_argument is not None and by_argument(node))
                or (op == "clamp_max" and node.args[0] in found and _at_least_zero(argument(node, "max")))
                or _preserves(node, op, found)
            ):
                found.add(node)
    return found


def _preserves(node: fx.Node, op: str, found: set[fx.Node]) -> bool:
    if op not in _PRESERVING:
        return False
    tensors = [n for n in node.all_input_nodes if not is_size_arithmetic(n)]
    factors = [*node.args, node.kwargs.get("alpha", 1)] if op in ("add", "mul", "div") else []
    numbers = [a for a in factors if isinstance(a, int | float)]
    return bool(tensors) and all(n in found for n in tensors) and all(a >= 0 for a in numbers)
