"""What relevance does not flow through: values that choose or scale a signal, held constant as numbers.

Attention weights, squeeze-and-excite gates, masks, and the statistics that normalizations divide by. What serves
nothing else needs no rule of its own: it is computed as the network computes it, and no gradient enters it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fusion.network import Network, is_size_arithmetic, op_name
from fusion.normalize import argument
from fusion.recognize import is_inverse, self_gate
from fusion.registry import Registry

HeldInputs = Callable[[Network, fx.Node], "list[fx.Node]"]
# The inputs that an operator's rule holds constant.
held_inputs: Registry[HeldInputs] = Registry()

_COMPARING = ("gt", "ge", "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_not", "logical_xor")
NORMS = ("linalg_vector_norm", "norm")
_MIXING = ("linear", "conv1d", "conv2d")
_CHOOSING = {"sigmoid", "hardsigmoid", "softmax", "_softmax", "sign", *_COMPARING}
_MOVING = set(
    "reshape expand expand_as unsqueeze squeeze transpose permute slice select flatten to _to_copy".split()
)


def held(network: Network, opened: Callable[[fx.Node], bool] = lambda node: False) -> set[fx.Node]:
    """The nodes whose every reader holds them constant, or is held constant itself. opened: the readers that hold
    nothing, because the composite says so (`attends`, `is_gated`)."""
    found: set[fx.Node] = set()
    for node in reversed(list(network.graph.nodes)):
        readers = [user for user in node.users if not is_size_arithmetic(user)]
        if (
            node.op == "call_function"
            and readers
            and all(u in found or (not opened(u) and node in _held_by(network, u)) for u in readers)
        ):
            found.add(node)
    return found


def _held_by(network: Network, reader: fx.Node) -> list[fx.Node]:
    function = held_inputs.get(op_name(reader)) if reader.op == "call_function" else None
    return [] if function is None else function(network, reader)


def attends(network: Network, node: fx.Node) -> bool:
    """Whether a node mixes values by attention weights."""
    if node.op != "call_function":
        return False
    op = op_name(node)
    return op == "scaled_dot_product_attention" or (
        op in ("matmul", "bmm", "einsum") and any(_is_softmax(network, f) for f in factors_of(node))
    )


def is_gated(network: Network, node: fx.Node) -> bool:
    """Whether a node multiplies a signal by a sigmoid (masks, statistics and attention weights are none)."""
    return (
        node.op == "call_function"
        and op_name(node) == "mul"
        and any(_is_sigmoid(network, f) for f in factors_of(node))
    )


def _is_sigmoid(network: Network, node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node) in ("sigmoid", "hardsigmoid") or is_hard_sigmoid(network, node):
            return True
        node = node.args[0] if op_name(node) in _MOVING else _scaled(network, node)
    return False


def is_gate(network: Network, node: Any) -> bool:
    """Attention weights, squeeze-and-excite gates, masks, signs and responses relative to their mean choose among
    signals or scale them; they are no signal themselves."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    op = op_name(node)
    if op in _CHOOSING or is_hard_sigmoid(network, node):
        return True
    if op in _MOVING or is_rounding(node):
        return is_gate(network, node.args[0])
    if op in _MIXING:
        return _is_softmax(network, node)
    if op in ("add", "sub", "rsub", "mul"):
        # 1 - g is a gate, and so are gates put together (ConViT's two attentions).
        terms = [n for n in node.args[:2] if isinstance(n, fx.Node) and network.constant(n) is None]
        return bool(terms) and all(is_gate(network, n) for n in terms)
    if op == "div":
        return is_gate(network, node.args[0]) or _is_share(network, node)
    return False


def is_hard_sigmoid(network: Network, node: Any) -> bool:
    """relu6(x + 3) and its relatives: x plus a number, cut off at 0 and above."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    bounds = {"hardtanh": ("min_val", "max_val"), "clamp": ("min", "max")}.get(op_name(node))
    source = node.args[0] if node.args else None
    shifted = (
        isinstance(source, fx.Node)
        and source.op == "call_function"
        and op_name(source) == "add"
        and any(_is_one_number(network, a) for a in source.args[:2])
    )
    if not shifted:
        return False
    if bounds is None:
        return op_name(node) == "relu6"
    low, high = (argument(node, name) for name in bounds)
    return low == 0 and isinstance(high, int | float)


def _is_one_number(network: Network, value: Any) -> bool:
    constant = network.constant(value)
    return isinstance(value, int | float) if constant is None else constant.numel() == 1


def _is_softmax(network: Network, node: Any) -> bool:
    """Whether these are attention weights: moved, scaled, or mixed over the heads by a layer of constant weights
    (Shazeer et al. 2020, arXiv:2003.02436)."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        op = op_name(node)
        if op in ("softmax", "_softmax"):
            return True
        mixed = op in _MIXING and network.constant(argument(node, "weight")) is not None
        node = node.args[0] if op in _MOVING or mixed else _scaled(network, node)
    return False


def _is_share(network: Network, node: fx.Node) -> bool:
    """Whether a quotient is e^x over something, as a softmax spelled out, or a norm over something computed from it, as
    global response normalization has it (Woo et al. 2023, arXiv:2301.00808)."""
    above, below = node.args[:2]
    if not isinstance(below, fx.Node) or network.constant(below) is not None:
        return False
    while isinstance(above, fx.Node) and above.op == "call_function" and op_name(above) in _MOVING:
        above = above.args[0]
    return isinstance(above, fx.Node) and above.op == "call_function" and op_name(above) in ("exp", *NORMS)


def _scaled(network: Network, node: fx.Node) -> Any:
    """What a node multiplies by a constant or rounds, None where it does neither."""
    if is_rounding(node):
        return node.args[0]
    if op_name(node) not in ("mul", "div"):
        return None
    a, b = node.args[:2]
    if not isinstance(b, fx.Node) or network.constant(b) is not None:
        return a
    constant = not isinstance(a, fx.Node) or network.constant(a) is not None
    return b if constant and op_name(node) == "mul" else None


def is_rounding(node: fx.Node) -> bool:
    """Rounding, and the bounds of what was rounded, as quantized networks have them."""
    if op_name(node) != "clamp":
        return op_name(node) == "round"
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "call_function" and op_name(source) == "round"


def unrounded(node: fx.Node) -> fx.Node:
    """What a node is the rounding of, clamp(round(x / s)) s; the node itself where it is none."""
    source = node
    for op in ("mul", "clamp", "round", "div"):
        if source.op != "call_function" or op_name(source) != op or not isinstance(source.args[0], fx.Node):
            return node
        source = source.args[0]
    return source


def factors_of(node: fx.Node) -> list[Any]:
    """The factors of a product."""
    return list(node.args[1]) if op_name(node) == "einsum" else list(node.args[:2])  # type: ignore[arg-type]


_FILLING = (
    "zeros",
    "new_zeros",
    "zeros_like",
    "ones",
    "new_ones",
    "ones_like",
    "full",
    "new_full",
    "full_like",
)


def _is_filled(node: fx.Node) -> bool:
    """Whether a tensor is the same whatever the image: a constant, or made of one number in the batch's size."""
    through = {*_MOVING, *_MIXING}
    while node.op == "call_function" and op_name(node) in through and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr" or (node.op == "call_function" and op_name(node) in _FILLING)


@held_inputs("mul", "matmul", "bmm", "einsum")
def held_factors(network: Network, node: fx.Node) -> list[fx.Node]:
    """The factor that is a gate, the inverse of a statistic, or AdaNorm's own gate; none where both are, or the other
    factor is a constant."""
    factors = factors_of(node)
    computed = all(isinstance(f, fx.Node) and not _is_filled(f) for f in factors)
    if len(factors) != 2 or not computed or factors[0] is factors[1]:
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
