"""Relevance of recurrent layers (LSTM): through time, with the gates held constant.

i, f, o = sigmoid(W x_t + U h_{t-1} + b), z = tanh(W_z x_t + U_z h_{t-1} + b_z), c_t = f c_{t-1} + i z and
h_t = o tanh(c_t). The products hand everything to the signal ("signal-take-all", Arras et al. 2017, arXiv:1706.07206;
2019, arXiv:1909.12114): i, f and o are numbers, tanh passes relevance unchanged, and W_z x + U_z h + b_z splits it by
contribution, its bias keeping a part (LRP-0).
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fusion.errors import UnsupportedOperator
from fusion.network import op_name
from lrp.graft import passed, ratio, received
from lrp.surrogate import operator_rule

if TYPE_CHECKING:
    from lrp.surrogate import Builder

aten = torch.ops.aten


def _identity(f: Tensor, x: Tensor) -> Tensor:
    """f(x), with the multiplier f(x) / x."""
    return x * ratio(f, x).detach()


def _direction(x: Tensor, weights: list[Tensor], reverse: bool) -> Tensor:
    """One direction of one layer over x [T, N, I], started at zero: the outputs [T, N, H], whose gradient is the rule.

    weights: W [4H, I], U [4H, H], then the two biases [4H] and the projection [P, H], as far as the layer has them; the
    rows are those of i, f, z and o, in this order.
    """
    matrices = [w for w in weights if w.ndim == 2]
    biases = [w for w in weights if w.ndim == 1]
    recurrent, projection = matrices[1], matrices[2] if len(matrices) > 2 else None
    hidden = recurrent.shape[0] // 4
    outside = torch.nn.functional.linear(x, matrices[0])
    bias = sum(biases[1:], biases[0]) if biases else x.new_zeros(4 * hidden)
    h = x.new_zeros(x.shape[1], recurrent.shape[1])
    c = x.new_zeros(x.shape[1], hidden)
    outputs: list[Tensor] = []
    steps = range(x.shape[0] - 1, -1, -1) if reverse else range(x.shape[0])
    for t in steps:
        i, f, z, o = (outside[t] + torch.nn.functional.linear(h, recurrent) + bias).chunk(4, -1)
        i, f, o = (gate.detach().sigmoid() for gate in (i, f, o))
        c = f * c + i * _identity(z.tanh(), z)
        h = o * _identity(c.tanh(), c)
        h = h if projection is None else torch.nn.functional.linear(h, projection)
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs)


def lstm_outputs(
    x: Tensor, weights: list[Tensor], layers: int, bidirectional: bool, batch_first: bool
) -> Tensor:
    """All outputs of an LSTM over x ([N, T, I] with batch_first, else [T, N, I]) in x's layout; its gradient is the
    rule. weights: as torch.lstm takes them."""
    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    size = len(weights) // (layers * directions)
    groups = [weights[i : i + size] for i in range(0, len(weights), size)]
    for layer in range(layers):
        own = groups[layer * directions : (layer + 1) * directions]
        x = torch.cat([_direction(x, group, reverse=bool(i)) for i, group in enumerate(own)], -1)
    return x.transpose(0, 1) if batch_first else x


def results(outputs: Tensor) -> tuple[Tensor]:
    """What an LSTM returns, as far as it has a rule."""
    return (outputs,)


@operator_rule("lstm")
def _lstm(builder: Builder, node: fx.Node) -> fx.Node:
    """The outputs at every step, started at zero; what the last states say is part of them."""
    if (
        node.target is not aten.lstm.input
        or len(node.users) != 1
        or any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users)
    ):
        raise _unsupported(node, "Its outputs have a rule; packed sequences and last states have none.")
    arguments: tuple[Any, ...] = node.args
    x, states, weights, _, layers, _, training, bidirectional, batch_first = arguments
    if any(builder.network.constant(w) is None for w in weights):
        raise _unsupported(node, "Its weights are computed from the image.")
    if training or any(not _is_zero(builder, n) for n in states):
        raise _unsupported(node, "It has a rule in evaluation mode where it starts at zero.")
    (output,) = node.users
    key, place = builder.key(node), builder.place(output)
    source = builder.emit(passed, builder.recorder, key, builder.values[x], builder.place(x))
    constants = [builder.values[w] for w in weights]
    value = builder.emit(lstm_outputs, source, constants, layers, bidirectional, batch_first)
    return builder.emit(results, builder.emit(received, builder.recorder, key, value, place))


def _is_zero(builder: Builder, state: Any) -> bool:
    """Whether a state is zero for every batch size: a constant, or one that is made by a filling operator."""
    constant = builder.network.constant(state)
    if constant is not None:
        return not bool(constant.any())
    return isinstance(state, fx.Node) and op_name(state) in ("zeros", "zeros_like", "new_zeros")


def _unsupported(node: fx.Node, hint: str) -> UnsupportedOperator:
    return UnsupportedOperator("aten::lstm", str(node.meta.get("layer") or node.name), hint)
