"""Activations that a module writes out are recognized by what they compute, and nothing else is taken for one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion import Network, capture

Function = Callable[[Tensor], Tensor]


class Own(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def captured(function: Function) -> tuple[Network, Tensor]:
    x = torch.linspace(-8, 8, 2 * 3 * 5 * 5, dtype=torch.float64).reshape(2, 3, 5, 5)
    network = capture(Own(function), (x,))
    torch.testing.assert_close(network(x), function(x), rtol=1e-6, atol=1e-7)
    return network, x


SLOPES = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
WRITTEN: dict[str, tuple[str, Function]] = {
    "SiLU": ("silu", lambda x: x * torch.sigmoid(x)),
    "SiLU by an exponential": ("silu", lambda x: x / (1 + torch.exp(-x))),
    "hard swish": ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    "hard sigmoid": ("hardsigmoid", lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "GELU": ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
    "GELU by tanh": (
        "gelu",
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "mish": ("mish", lambda x: x * torch.tanh(torch.log(1 + torch.exp(x)))),
    "softplus": ("softplus", lambda x: torch.log(1 + torch.exp(x))),
    "softplus of another slope": ("softplus", lambda x: torch.log1p(torch.exp(1.5 * x)) / 1.5),
    "hard shrinking": ("hardshrink", lambda x: torch.where(x.abs() > 0.7, x, 0.0)),
    "PReLU": ("prelu", lambda x: torch.where(x > 0, x, SLOPES.reshape(3, 1, 1) * x)),
}
ALMOST: dict[str, Function] = {
    "the sigmoid of another value": lambda x: x * torch.sigmoid(-x),
    "the sigmoid of another channel": lambda x: x * torch.sigmoid(x.flip(1)),
    "a gate for all of a channel": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "a hard swish of other bounds": lambda x: x * (x + 3).clamp(0, 5) / 6,
    "a GELU of another factor": lambda x: x * 0.5 * (1 + torch.erf(x / 1.5)),
    "a slope of its own for every row": lambda x: torch.where(x > 0, x, torch.rand(5, 1) * 0 + 0.1 + x * 0.2),
    "slopes of another type": lambda x: torch.where(x > 0, x, SLOPES.float().reshape(3, 1, 1) * x),
    "a residual sum": lambda x: x + torch.relu(x),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_chain_is_the_activation_that_it_computes(name: str) -> None:
    op, function = WRITTEN[name]
    network, _ = captured(function)
    assert [layer.op for layer in network.layers()] == [op]


@pytest.mark.parametrize("name", ALMOST)
def test_a_chain_that_computes_something_else_stays(name: str) -> None:
    network, _ = captured(ALMOST[name])
    ops = {layer.op for layer in network.layers()}
    assert not ops & {
        "silu",
        "hardswish",
        "hardsigmoid",
        "gelu",
        "mish",
        "softplus",
        "celu",
        "threshold",
        "prelu",
    }
