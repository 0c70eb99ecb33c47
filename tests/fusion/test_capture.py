"""Capture: one functional graph, the author's names, a free batch, and the module left as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusion
from fusion.errors import CaptureError, NonFiniteWeights
from fusion.network import op_name
from tests.nets import FAMILIES, bottleneck, family


@pytest.mark.parametrize("name", FAMILIES)
def test_a_captured_family_computes_the_same_for_any_batch(name: str) -> None:
    module = family(name)
    network = fusion.capture(module, (torch.randn(1, 3, 64, 64),))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(network(x), module(x), rtol=1e-5, atol=1e-5)
    assert network.inputs[0].shape == (None, 3, 64, 64)
    assert network.outputs[0].shape == (None, 10)


def test_layers_and_weights_keep_the_names_of_their_author() -> None:
    network = fusion.capture(family("resnet18"), (torch.randn(1, 3, 64, 64),))
    layers = {(info.layer, info.op) for info in network.layers()}
    assert ("layer1.0.conv2", "conv2d") in layers
    assert ("layer2.0.downsample.1", "batch_norm") in layers
    assert "layer1.0.conv2.weight" in network.constants


def test_the_module_is_bitwise_the_same_afterwards() -> None:
    module = bottleneck().train()
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(2, 3, 16, 16)
    expected = copy.deepcopy(module).eval()(x)
    fusion.fuse(fusion.capture(module, (x,)))
    assert module.training
    assert all(layer.training for layer in module.modules())
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(module.eval()(x), expected)


class InPlace(nn.Module):
    def __init__(self, through_a_view: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.through_a_view = through_a_view

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.through_a_view:
            y[:, :2].mul_(2.0)
        y.relu_()
        y += 1
        return y.mean((2, 3))


@pytest.mark.parametrize("through_a_view", [False, True])
def test_in_place_operators_become_functional(through_a_view: bool) -> None:
    module = InPlace(through_a_view).eval()
    network = fusion.capture(module, (torch.randn(1, 3, 5, 5),))
    x = torch.randn(3, 3, 5, 5)
    torch.testing.assert_close(network(x), module(x))
    assert not any(n.target._schema.is_mutable for n in network.calls() if hasattr(n.target, "_schema"))


class WrittenOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :, 1:] = (y[:, :, :-1] * 2).mean(3, keepdim=True)
        return y.square().mean((2, 3))


def test_what_is_written_over_a_part_has_a_derivative() -> None:
    module, x = WrittenOver().eval(), torch.randn(3, 3, 5, 5, requires_grad=True)
    network = fusion.capture(module, (torch.randn(1, 3, 5, 5),))
    torch.testing.assert_close(network(x), module(x))
    (found,), (want,) = (torch.autograd.grad(run(x).sum(), x) for run in (network.module, module))
    torch.testing.assert_close(found, want)


class DropoutAlias(nn.Module):
    """An in-place write behind an inactive dropout also changes what the dropout read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 4, 1), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.drop(y).relu_() + y).mean((2, 3))


def test_aliases_through_an_inactive_dropout_are_seen() -> None:
    module = DropoutAlias().eval()
    network = fusion.capture(module, (torch.randn(1, 3, 5, 5),))
    x = torch.randn(3, 3, 5, 5)
    torch.testing.assert_close(network(x), module(x))


def test_weight_norm_and_spectral_norm_vanish() -> None:
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    module = nn.Sequential(
        weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), spectral_norm(nn.Linear(36, 3))
    ).eval()
    network = fusion.capture(module, (torch.randn(1, 3, 5, 5),))
    assert [info.op for info in network.layers()] == ["conv2d", "flatten", "linear"]
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(network(x), module(x))


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(2, 12))  # type: ignore[no-any-return]


def test_sums_of_sizes_are_no_sums_of_tensors() -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            counts = torch.arange(x.shape[0] * 2 + 1)[1 : x.shape[0] + 1]
            return x * counts.reshape(-1, 1)

    network = fusion.capture(Counted(), (torch.randn(2, 3),))
    assert "add" in {op_name(node) for node in network.graph.nodes}
    x = torch.randn(3, 3)
    torch.testing.assert_close(network(x), x * torch.tensor([[1.0], [2.0], [3.0]]))


def test_padding_by_nothing_vanishes() -> None:
    """As Swin pads its maps to even sizes, which they have already."""

    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.nn.functional.pad(x, (0, x.shape[-1] % 2, 0, 0)) * 2
            return torch.nn.functional.pad(x, (0, 0), mode="replicate").flatten(1)

    network = fusion.capture(Padded(), (torch.randn(2, 3, 4),))
    assert [op_name(node) for node in network.calls()] == ["mul", "flatten"]


def test_a_fixed_batch_is_refused_with_advice() -> None:
    with pytest.raises(CaptureError, match="dynamic batch"):
        fusion.capture(FixedBatch(), (torch.randn(3, 3, 2, 2),))


def test_a_module_that_cannot_run_is_refused() -> None:
    with pytest.raises(CaptureError, match="could not be captured"):
        fusion.capture(nn.Linear(4, 2), (torch.randn(1, 3),))


def test_weights_with_nan_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        module[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeights, match=r"0\.weight"):
        fusion.capture(module, (torch.randn(1, 4),))


def test_another_dtype_computes_in_it() -> None:
    module = bottleneck()
    network = fusion.capture(module, (torch.randn(1, 3, 16, 16),)).to(dtype=torch.float64)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(network(x), copy.deepcopy(module).double()(x), rtol=1e-13, atol=1e-13)


@pytest.mark.gpu
def test_another_device_computes_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    network = fusion.capture(bottleneck(), (torch.randn(1, 3, 16, 16),)).to(dtype=torch.float64)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(network.to(device="cuda")(x.cuda()).cpu(), network(x), rtol=1e-10, atol=1e-10)


def test_a_decorated_forward_is_taken_by_its_own_signature() -> None:
    """As the models of transformers have it: a wrapper that takes anything, around a forward with names."""

    def decorated(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(forward)
        def wrapper(self: nn.Module, *args: object, **named: object) -> torch.Tensor:
            return forward(self, *args, **named)

        return wrapper

    class Decorated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        @decorated
        def forward(self, x: torch.Tensor, scale: float | None = None, **options: object) -> torch.Tensor:
            return self.head(x)  # type: ignore[no-any-return]

    module = Decorated()
    x = torch.randn(5, 4)
    torch.testing.assert_close(fusion.capture(module, (x,))(x), module(x))


def test_inputs_taken_as_one_tuple() -> None:
    class Variadic(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return inputs[0] * 2 + inputs[1]

    x, y = torch.randn(2, 5, 4)
    torch.testing.assert_close(fusion.capture(Variadic(), (x, y))(x, y), 2 * x + y)
