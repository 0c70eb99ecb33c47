"""What relevance does not flow through: values that choose or scale a signal, held constant as numbers.

Attention weights, squeeze-and-excite gates, masks, and the statistics that normalizations divide by. What serves
nothing else needs no rule of its own: it is computed as the network computes it, and no gradient enters it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fusion.network import Network, is_size_arithmetic, op_name
from fusion.recognize import is_inverse, self_gate
from fusion.registry import Registry

HeldInputs = Callable[[Network, fx.Node], "list[fx.Node]"]
# The inputs that an operator's rule holds constant.
held_inputs: Registry[HeldInputs] = Registry()

_COMPARING = ("gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_not", "logical_xor")
_CHOOSING = {"sigmoid", "hardsigmoid", "softmax", "_softmax", *_COMPARING}
_MOVING = set(
    "reshape expand expand_as unsqueeze squeeze transpose permute slice select flatten to _to_copy".split()
)


def held(network: Network) -> set[fx.Node]:
    """The nodes whose every reader holds them constant, or is held constant itself."""
    found: set[fx.Node] = set()
    for node in reversed(list(network.graph.nodes)):
        readers = [user for user in node.users if not is_size_arithmetic(user)]
        if (
            node.op == "call_function"
            and readers
            and all(u in found or node in _held_by(network, u) for u in readers)
        ):
            found.add(node)
    return found


def _held_by(network: Network, reader: fx.Node) -> list[fx.Node]:
    function = held_inputs.get(op_name(reader)) if reader.op == "call_function" else None
    return [] if function is None else function(network, reader)


def is_gate(network: Network, node: Any) -> bool:
    """Attention weights, squeeze-and-excite gates and masks choose among signals; they are no signal themselves."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        op = op_name(node)
        if op in _CHOOSING:
            return True
        source = node.args[0] if op in _MOVING else _scaled(network, node)
        if source is None:
            return False
        node = source
    return False


def _scaled(network: Network, node: fx.Node) -> Any:
    """What a node multiplies by a constant, None where it does not."""
    if op_name(node) not in ("mul", "div"):
        return None
    a, b = node.args[:2]
    if not isinstance(b, fx.Node) or network.constant(b) is not None:
        return a
    constant = not isinstance(a, fx.Node) or network.constant(a) is not None
    return b if constant and op_name(node) == "mul" else None


@held_inputs("mul", "matmul", "bmm")
def held_factors(network: Network, node: fx.Node) -> list[fx.Node]:
    """The factor that is a gate, the inverse of a statistic, or AdaNorm's own gate; none where both are, or the other
    factor is a constant."""
    factors: list[Any] = list(node.args[:2])
    if any(not isinstance(f, fx.Node) or f.op == "get_attr" for f in factors) or factors[0] is factors[1]:
        return []
    own = [self_gate(network, user) for user in node.users]
    chosen = [f for f in factors if is_gate(network, f) or is_inverse(network, f) or f in own]
    return chosen if len(chosen) == 1 else []


@held_inputs("div")
def _divisor(network: Network, node: fx.Node) -> list[fx.Node]:
    dividend, divisor = node.args[:2]
    return [divisor] if isinstance(divisor, fx.Node) and divisor is not dividend else []


@held_inputs("where")
def _condition(network: Network, node: fx.Node) -> list[fx.Node]:
    condition, *choices = node.args
    return [condition] if condition not in choices else []  # type: ignore[list-item]


@held_inputs("scaled_dot_product_attention")
def _query_and_key(network: Network, node: fx.Node) -> list[fx.Node]:
    value = node.args[2]
    return [n for n in node.args[:2] if n is not value]  # type: ignore[misc]


@held_inputs("expand_as", "type_as")
def _shape(network: Network, node: fx.Node) -> list[fx.Node]:
    return [node.args[1]] if node.args[1] is not node.args[0] else []  # type: ignore[list-item]


@held_inputs(*_COMPARING)
def _compared(network: Network, node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)
