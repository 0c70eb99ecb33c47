"""A layer that is called more than once is explained like its unrolled copy, map and ledger.

Tools that hook modules keep one state per module, which the second call overwrites. Here every call is a node.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lrp
from tests.nets import calibrated

F64 = torch.float64


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))


class Sequence(nn.Module):
    """One convolution with its batch norm, three times over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 4, 3, padding=1), block()
        self.b, self.c, self.fc = self.a, self.a, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for step in (self.a, self.b, self.c):
            x = torch.relu(step(x))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Siamese(nn.Module):
    """One convolution beside itself: on the image, its mirror image, and the difference of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.b, self.fc = self.a, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x), self.b(x.flip(3))
        return self.fc(torch.cat([torch.relu(left), torch.relu(left - right)], 1).mean((2, 3)))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two layers with one weight tensor, one of them transposed, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x.mean(3).flatten(1)[:, :12]))
        back = nn.functional.linear(y, self.a.weight.t(), self.b.bias)
        return self.fc(torch.relu(back))  # type: ignore[no-any-return]


class Untied(Tied):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x.mean(3).flatten(1)[:, :12]))
        return self.fc(torch.relu(self.b(y)))  # type: ignore[no-any-return]


def unrolled(module: nn.Module) -> nn.Module:
    """The module with a copy of its own for every place at which a layer stands."""
    if isinstance(module, Tied):
        other = Untied().to(F64)
        other.load_state_dict({**module.state_dict(), "b.weight": module.a.weight.detach().t()})
        return other
    module = copy.deepcopy(module)
    for name, child in module._modules.items():
        module._modules[name] = unrolled(child)  # type: ignore[arg-type]
    return module


def resnet() -> nn.Module:
    """ResNet-18 whose second stage is one block, twice."""
    module = torchvision.models.resnet18(weights=None, num_classes=5)
    module.layer1 = nn.Sequential(module.layer1[0], module.layer1[0])
    return module


def albert() -> nn.Module:
    """A vision transformer of one encoder block, three times (as in ALBERT, Lan et al. 2020)."""
    module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    nn.init.normal_(module.heads.head.weight, 0, 0.3)
    module.encoder.layers = nn.Sequential(*[module.encoder.layers[0]] * 3)
    return module


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sequence": Sequence, "siamese": Siamese, "tied": Tied, "resnet": resnet, "albert": albert,
}  # fmt: skip


@pytest.mark.parametrize("composite", ["EpsilonPlus", "EpsilonPlusFlat", "EpsilonAlpha2Beta1", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_shared_layer_is_its_unrolled_copy(name: str, composite: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, dtype=F64)
    shared = calibrated(NETWORKS[name](), (3, 32, 32)).to(F64)
    copied = unrolled(shared)
    assert len(list(copied.parameters())) > len(list(shared.parameters())) or name == "tied"
    explainers = [
        lrp.Explainer(module, composite=composite, dtype=F64, example=x, device="cpu") for module in (shared, copied)
    ]  # fmt: skip
    (one, other) = (explainer.explain(x, [[0, 1]] * 2) for explainer in explainers)
    torch.testing.assert_close(one.output, shared(x).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.relevance, other.relevance, rtol=1e-9, atol=1e-12)
    for answer in (one, other):
        assert answer.ledger is not None
        assert answer.ledger.closes(1e-12)
    assert one.ledger is not None
    assert other.ledger is not None
    assert len(one.ledger.entries) == len(other.ledger.entries)
    for mine, theirs in zip(one.ledger.entries, other.ledger.entries, strict=True):
        assert mine.op == theirs.op
        for amount in ("received", "passed", "kept"):
            torch.testing.assert_close(getattr(mine, amount), getattr(theirs, amount), rtol=1e-9, atol=1e-12)


def test_every_call_of_a_layer_has_an_entry_of_its_own() -> None:
    torch.manual_seed(0)
    module = calibrated(Sequence(), (3, 16, 16)).to(F64)
    x = torch.randn(2, 3, 16, 16, dtype=F64)
    explainer = lrp.Explainer(module, composite="EpsilonPlus", dtype=F64, example=x, device="cpu")
    answer = explainer.explain(x, 1, at=["stem"])
    assert answer.ledger is not None
    received = {
        entry.node: entry for entry in answer.ledger.entries if entry.op == "conv2d" and entry.layer != "stem"
    }
    assert len(received) == 3
    first, second, third = received.values()
    # Batch norms are folded, and ReLUs pass everything: what one call passes the one before it receives.
    for behind, before in ((third, second), (second, first)):
        torch.testing.assert_close(behind.passed, before.received, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(first.passed, answer.inner["stem"].values.sum((1, 2, 3)))
