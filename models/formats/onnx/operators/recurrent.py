"""Recurrent layers: torch's LSTM where it is the same, else one step after the other.

x is [T, N, I] (or [N, T, I] with `layout=1`), W [D, gates * H, I], R [D, gates * H, H], B [D, 2 * gates * H] with D the
number of directions. The formulas are those of the ONNX specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.errors import UnsupportedOperator
from models.formats.onnx.registry import Node, operator

Activation = Callable[[Tensor], Tensor]

# Functions of (x, alpha, beta), and the values of alpha and beta where the file leaves them out.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float, float], Tensor], tuple[float, ...]]] = {
    "relu": (lambda x, a, b: F.relu(x), ()),
    "tanh": (lambda x, a, b: torch.tanh(x), ()),
    "sigmoid": (lambda x, a, b: torch.sigmoid(x), ()),
    "softsign": (lambda x, a, b: F.softsign(x), ()),
    "softplus": (lambda x, a, b: F.softplus(x), ()),
    "affine": (lambda x, a, b: a * x + b, (1.0, 0.0)),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), (1.0, 1.0)),
    "hardsigmoid": (lambda x, a, b: F.hardtanh(a * x + b, 0.0, 1.0), (0.2, 0.5)),
    "leakyrelu": (lambda x, a, b: F.leaky_relu(x, a), (0.01,)),
    "thresholdedrelu": (lambda x, a, b: F.threshold(x, a, 0.0), (1.0,)),
    "elu": (lambda x, a, b: F.elu(x, a), (1.0,)),
}


@dataclass(frozen=True)
class Direction:
    """One direction's weights and how it steps; `backwards` from the last step to the first."""

    w: Tensor
    r: Tensor
    b: Tensor | None
    states: tuple[Tensor, ...]
    activations: tuple[Activation, ...]
    backwards: bool
    peephole: Tensor | None = None


# (node, direction, a step's W x + b, the states before) -> the states after; the first state is the output.
Cell = Callable[[Node, Direction, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


@operator("RNN", since=7)
def rnn(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _recurrent(node, _rnn_cell, ("Tanh",), x, w, r, b, lengths, (start,))


@operator("GRU", since=7)
def gru(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return _recurrent(node, _gru_cell, ("Sigmoid", "Tanh"), x, w, r, b, lengths, (start,))


@operator("LSTM", since=7)
def lstm(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    cell: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    plain = lengths is None and peepholes is None and node.get("clip") is None
    usual = ("sigmoid", "tanh", "tanh")
    named = tuple(name.lower() for name in node.get("activations") or usual * w.shape[0])
    if plain and named == usual * w.shape[0] and not node.get("input_forget", 0):
        return _torch_lstm(node, x, w, r, b, start, cell)
    return _recurrent(
        node, _lstm_cell, ("Sigmoid", "Tanh", "Tanh"), x, w, r, b, lengths, (start, cell), peepholes
    )


def _rnn_cell(node: Node, d: Direction, z: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (h,) = states
    return (d.activations[0](_clipped(node, z + F.linear(h, d.r, _half(d.b, 1)))),)


def _gru_cell(node: Node, d: Direction, z: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The reset gate before or behind the recurrent product of the candidate (`linear_before_reset`)."""
    (h,), (gate, candidate) = states, d.activations
    update, reset, new = z.chunk(3, -1)
    ru, rr, rn = d.r.chunk(3)
    bu, br, bn = (None,) * 3 if d.b is None else _half(d.b, 1).chunk(3)  # type: ignore[union-attr]
    update = gate(_clipped(node, update + F.linear(h, ru, bu)))
    reset = gate(_clipped(node, reset + F.linear(h, rr, br)))
    behind = node.get("linear_before_reset", 0)
    past = reset * F.linear(h, rn, bn) if behind else F.linear(reset * h, rn, bn)
    return ((1 - update) * candidate(_clipped(node, new + past)) + update * h,)


def _lstm_cell(node: Node, d: Direction, z: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (h, c), (gate, candidate, output) = states, d.activations
    i, o, f, new = (z + F.linear(h, d.r, _half(d.b, 1))).chunk(4, -1)
    pi, po, pf = (None,) * 3 if d.peephole is None else d.peephole.chunk(3)
    i = gate(_clipped(node, i if pi is None else i + pi * c))
    f = 1 - i if node.get("input_forget", 0) else gate(_clipped(node, f if pf is None else f + pf * c))
    c = f * c + i * candidate(_clipped(node, new))
    o = gate(_clipped(node, o if po is None else o + po * c))
    return o * output(c), c


def _clipped(node: Node, z: Tensor) -> Tensor:
    bound = node.get("clip")
    return z if bound is None else F.hardtanh(z, -bound, bound)


def _half(b: Tensor | None, which: int) -> Tensor | None:
    """The bias of W (0) or of R (1)."""
    return None if b is None else b.chunk(2)[which]


def _recurrent(
    node: Node,
    cell: Cell,
    usual: tuple[str, ...],
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    starts: tuple[Tensor | None, ...],
    peepholes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """All outputs, then the last states, in the layout that the node asks for."""
    batch_first = bool(node.get("layout", 0))
    x = x.transpose(0, 1) if batch_first else x
    activations = list(_activations(node, usual * w.shape[0]))
    outputs, ends = [], []
    for d in range(w.shape[0]):
        states = tuple(_start(s, d, x, r.shape[2], batch_first) for s in starts)
        direction = Direction(
            w[d], r[d], None if b is None else b[d], states,
            tuple(activations[d * len(usual) : (d + 1) * len(usual)]),
            backwards=d == 1 or node.get("direction", "forward") == "reverse",
            peephole=None if peepholes is None else peepholes[d],
        )  # fmt: skip
        y, end = _through_time(node, cell, direction, x, lengths)
        outputs.append(y)
        ends.append(end)
    y = torch.stack(outputs, 1)  # [T, D, N, H]
    last = [torch.stack([end[k] for end in ends]) for k in range(len(starts))]
    if batch_first:
        return y.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in last)
    return y, *last


def _through_time(
    node: Node, cell: Cell, d: Direction, x: Tensor, lengths: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs [T, N, H] and the last states. Samples beyond their own length stand still and give zeros."""
    steps = F.linear(x, d.w, _half(d.b, 0)).unbind(0)
    states, outputs = d.states, []
    for t in reversed(range(len(steps))) if d.backwards else range(len(steps)):
        after = cell(node, d, steps[t], states)
        if lengths is None:
            states = after
            outputs.append(after[0])
            continue
        running = (t < lengths).unsqueeze(1)
        states = tuple(torch.where(running, a, s) for a, s in zip(after, states, strict=True))
        outputs.append(torch.where(running, after[0], torch.zeros_like(after[0])))
    return torch.stack(outputs[::-1] if d.backwards else outputs), states


def _start(state: Tensor | None, d: int, x: Tensor, hidden: int, batch_first: bool) -> Tensor:
    if state is None:
        return x.new_zeros(x.shape[1], hidden)
    return (state[:, d] if batch_first else state[d]).expand(x.shape[1], hidden)


def _activations(node: Node, usual: tuple[str, ...]) -> Iterator[Activation]:
    """One per gate and direction; alpha and beta are taken from their lists by those that have them."""
    alphas, betas = iter(node.get("activation_alpha") or ()), iter(node.get("activation_beta") or ())
    for name in node.get("activations") or usual:
        if name.lower() not in _ACTIVATIONS:
            raise UnsupportedOperator(f"{node.title} with the activation {name}", node.called)
        function, defaults = _ACTIVATIONS[name.lower()]
        alpha = next(alphas, defaults[0]) if defaults else 0.0
        beta = next(betas, defaults[1]) if len(defaults) > 1 else 0.0
        yield lambda x, f=function, a=alpha, b=beta: f(x, a, b)  # type: ignore[misc]


def _torch_lstm(
    node: Node, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, start: Tensor | None, cell: Tensor | None
) -> tuple[Tensor, ...]:
    """torch's own, whose outputs have a rule. The last outputs are read off all of them, for the same reason."""
    batch_first, hidden = bool(node.get("layout", 0)), r.shape[2]
    x = x.transpose(0, 1) if batch_first else x
    backwards = node.get("direction", "forward") == "reverse"
    both = w.shape[0] == 2
    weights: list[Tensor] = []
    for d in range(w.shape[0]):
        weights += [_in_torch_order(w[d]), _in_torch_order(r[d])]
        weights += [] if b is None else [_in_torch_order(part) for part in b[d].chunk(2)]
    states = [_states(state, x, w.shape[0], hidden, batch_first) for state in (start, cell)]
    found: Any = torch.lstm(
        x.flip(0) if backwards else x, states, weights, b is not None, 1, 0.0, False, both, False
    )
    y = found[0].flip(0) if backwards else found[0]
    y = y.unflatten(-1, (w.shape[0], hidden)).permute(0, 2, 1, 3)  # [T, D, N, H]
    ends = [y[0 if backwards or d else -1, d] for d in range(w.shape[0])]
    last = [torch.stack(ends), *([found[2]] if any(node.outputs[2:]) else [])]
    if batch_first:
        return y.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in last)
    return y, *last


def _in_torch_order(rows: Tensor) -> Tensor:
    """From ONNX's input, output, forget, cell to torch's input, forget, cell, output."""
    i, o, f, c = rows.chunk(4)
    return torch.cat([i, f, c, o])


def _states(state: Tensor | None, x: Tensor, directions: int, hidden: int, batch_first: bool) -> Tensor:
    if state is None:
        return x.new_zeros(directions, x.shape[1], hidden)
    state = state.transpose(0, 1) if batch_first else state
    return state.expand(directions, x.shape[1], hidden).contiguous()
