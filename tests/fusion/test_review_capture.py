"""Capture of what real modules do: names in torch's way, identities on the input, sizes of one, creation operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusion


class Forward(nn.Module):
    """A module whose forward is the function given, with the layers and parameters given."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def same(module: nn.Module, *shape: int, batches: tuple[int, ...] = (1, 3)) -> fusion.Network:
    module.eval()
    network = fusion.capture(module, (torch.randn(2, *shape),))
    for batch in batches:
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(network(x), module(x).detach())
        torch.testing.assert_close(fusion.fuse(network).network(x), module(x).detach())
    return network


@pytest.mark.parametrize("name", ["graph", "code", "meta", "input"])
@pytest.mark.parametrize("as_parameter", [False, True])
def test_an_author_may_give_any_name(name: str, as_parameter: bool, tmp_path: Path) -> None:
    part = nn.Parameter(torch.randn(4)) if as_parameter else nn.Linear(4, 4)
    network = same(
        Forward(
            lambda m, x: x * getattr(m, name) if as_parameter else getattr(m, name)(x),  # type: ignore[no-any-return]
            **{name: part},
        ),
        4,
    )
    assert any(constant.split(".")[0] == name for constant in network.constants)
    fusion.save(network, tmp_path, {})
    x = torch.randn(2, 4)
    torch.testing.assert_close(fusion.load(tmp_path)[0](x), network(x))


def test_a_folded_constant_may_have_the_name_of_a_layer() -> None:
    weights = {name: nn.Parameter(torch.randn(4)) for name in "ab"}
    same(Forward(lambda m, x: m.mul(x) * (m.a * m.b), mul=nn.Linear(4, 4), **weights), 4)  # type: ignore[operator]


@pytest.mark.parametrize(
    "identity",
    [nn.Dropout(), nn.Identity(), Forward(lambda m, x: x.clone()), Forward(lambda m, x: x.contiguous())],
)
def test_an_identity_on_the_input_is_no_obstacle(identity: nn.Module) -> None:
    network = same(nn.Sequential(identity, nn.Linear(4, 3)), 4)
    assert network.inputs[0].shape == (None, 4)


def test_squeezing_leaves_a_batch_of_one() -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), Forward(lambda m, x: x.squeeze()), nn.Linear(3, 2)).eval()
    network = fusion.capture(module, (torch.randn(2, 3, 5, 5),))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(network(x), module(x).detach())
    torch.testing.assert_close(network(x[:1]), module(x)[:1].detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tensors_created_in_forward_follow_the_type(dtype: torch.dtype) -> None:
    module = Forward(lambda m, x: m.fc(torch.ones(x.shape[0], 4)) + x, fc=nn.Linear(4, 4))  # type: ignore[operator]
    network = fusion.capture(module, (torch.randn(2, 4),)).to(dtype=dtype)
    assert network(torch.randn(3, 4, dtype=dtype)).dtype == dtype


def test_a_bias_with_more_axes_than_the_layer_keeps_them() -> None:
    same(
        Forward(
            lambda m, x: (nn.functional.linear(x, m.weight) + m.bias).flatten(0, 2),  # type: ignore[arg-type,operator]
            weight=nn.Parameter(torch.randn(3, 4)),
            bias=torch.randn(1, 1, 1, 3),
        ),
        4,
    )


def test_changing_the_module_afterwards_does_not_change_the_network() -> None:
    module = nn.Linear(4, 3)
    network = fusion.capture(module, (torch.randn(1, 4),))
    x = torch.randn(2, 4)
    before = network(x)
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(network(x), before)
