"""Concept relevance against zennit-crp, the authors' own implementation (Achtibat et al. 2023, arXiv:2206.03208).

zennit-crp 0.6.0 pins zennit <= 0.4.6 and so is in no extra, but it runs with zennit 0.5.1 as it is:
`pip install --no-deps "zennit-crp==0.6.0"`. The tests skip where it is not installed.

Conventions made alike:

- zennit's stabilizer at sums and average pools is `norm_epsilon`;
- batch norms' eps, which zennit's merge leaves behind, goes into the variance first (`without_eps`);
- "flat at the first layer" is the first module for zennit, here every layer that reads the input (`rest`);
- a sum is `Sum` for zennit, which sees modules only, and `+` here;
- no ReLU works in place, since zennit-crp keeps the layers' output tensors;
- zennit-crp also stops what goes past a layer of the condition, unless `exclude_parallel=False`; here only what passes
  the layer itself is masked, so the neighbours are closed by masks of their own;
- max pools give all to the first winner in both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from zennit import composites as zennit_composites
from zennit.layer import Sum
from zennit.torchvision import ResNetCanonizer, SequentialMergeBatchNorm

import fusion
import lrp
from lrp.targets import Neurons, Target
from tests.nets import calibrated, without_eps

attribution = pytest.importorskip("crp.attribution", reason="zennit-crp is not installed")
concepts = pytest.importorskip("crp.concepts", reason="zennit-crp is not installed")

BOUND = 1e-10  # of the largest value; measured: 1e-15
COMPOSITES = ("EpsilonPlus", "EpsilonPlusFlat", "EpsilonAlpha2Beta1")
Condition = dict[str, list[int]]


class Chain(nn.Module):
    """VGG in small: zero padding, batch norms, max pools, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 8), (8, 8), (8, 12), (12, 16))
        blocks = [
            [nn.Conv2d(a, b, 3, padding=1, bias=a == 8), nn.BatchNorm2d(b), nn.ReLU()] for a, b in widths
        ]
        self.features = nn.Sequential(
            *blocks[0], *blocks[1], nn.MaxPool2d(2), *blocks[2], nn.MaxPool2d(2), *blocks[3]
        )
        self.classifier = nn.Sequential(nn.Linear(16 * 36, 24), nn.ReLU(), nn.Linear(24, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """A strided convolution beside two others, the sum of both through a max pool; sums: whether by zennit's Sum."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2, bias=False), nn.BatchNorm2d(8))
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8))
        self.sum, self.sums = Sum(), False
        self.behind = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.classifier = nn.Sequential(nn.Linear(8 * 36, 20), nn.ReLU(), nn.Linear(20, 6))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.side(x), self.second(self.first(x))
        total = self.sum(torch.stack([a, b], -1)) if self.sums else a + b
        return self.classifier(self.behind(total))  # type: ignore[no-any-return]


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(weights=None, num_classes=6)


@dataclass(frozen=True)
class Subject:
    """A network to ask, the layers to look at, the conditions to set. beside: by layer, what goes past it. rest:
    layers that read the input beside the first module."""

    make: Any
    canonizer: type
    shape: tuple[int, int, int]
    layers: tuple[str, ...]
    conditions: tuple[Condition, ...]
    beside: dict[str, str] = field(default_factory=dict)
    rest: tuple[str, ...] = ()


SUBJECTS = {
    "chain": Subject(
        Chain,
        SequentialMergeBatchNorm,
        (3, 24, 24),
        ("features.0", "features.3", "features.7", "features.11", "classifier.0"),
        (
            {},
            {"features.7": [2]},
            {"features.11": [0, 5, 9, 15]},
            {"classifier.0": [3, 4, 11], "features.3": [1, 6]},
            {"features.11": [1, 2, 3], "features.7": [0, 8], "features.0": [4]},
            {"features.7": []},
        ),
    ),
    "branches": Subject(
        Branches,
        SequentialMergeBatchNorm,
        (1, 28, 28),
        ("side.0", "first.0", "second.0", "classifier.0"),
        (
            {},
            {"second.0": [2]},
            {"side.0": [0, 3, 7]},
            {"second.0": [1, 4, 5], "first.0": [0, 2, 6]},
            {"classifier.0": [2, 5, 7, 9], "side.0": [4]},
            {"side.0": []},
        ),
        {"second.0": "side.0", "side.0": "second.0"},
        ("first.0",),
    ),
    "resnet18": Subject(
        resnet18,
        ResNetCanonizer,
        (3, 40, 40),
        ("conv1", "layer1.1.conv2", "layer2.0.conv1", "layer2.0.downsample.0", "layer4.1.conv2"),
        (
            {},
            {"layer2.0.conv2": [17]},
            {"layer3.1.conv1": [0, 100, 200, 255]},
            {"layer4.1.conv2": [5, 6, 7, 300], "layer1.1.conv2": [1, 30]},
            {"layer2.0.downsample.0": [3, 40]},
        ),
        {"layer2.0.conv2": "layer2.0.downsample.0", "layer2.0.downsample.0": "layer2.0.conv2"},
    ),
}
ALL = [(name, composite) for name in SUBJECTS for composite in COMPOSITES]


class InputRelevance(attribution.CondAttribution):  # type: ignore[misc, name-defined]
    """zennit-crp's attribution with the relevance of every input value in place of its sum over the channels."""

    def heatmap_modifier(self, data: Tensor, on_device: Any = None) -> Tensor:
        return data.grad.detach().clone()  # type: ignore[union-attr]


@cache
def prepared(name: str) -> tuple[nn.Module, fusion.Network]:
    """A subject's network in float64, calibrated, and its capture."""
    torch.manual_seed(0)
    module = calibrated(SUBJECTS[name].make(), SUBJECTS[name].shape).double()
    for layer in module.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return module, fusion.capture(module, (torch.randn(1, *SUBJECTS[name].shape, dtype=torch.float64),))


@cache
def explainer(name: str, composite: str) -> lrp.Explainer:
    built = lrp.build(composite, norm_epsilon=1e-6)
    return lrp.Explainer(
        prepared(name)[1],
        composite=built,
        rules=dict.fromkeys(SUBJECTS[name].rest, built.convolution),
        dtype=torch.float64,
        device="cpu",
    )


def by_crp(
    name: str, composite: str, x: Tensor, condition: dict[str, list[int]], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(input relevance [N, C, H, W], relevance by layer) of zennit-crp under one condition."""
    subject = SUBJECTS[name]
    module = without_eps(copy.deepcopy(prepared(name)[0]))
    if isinstance(module, Branches):
        module.sums = True
    rules = getattr(zennit_composites, composite)(canonizers=[subject.canonizer()])
    answer = InputRelevance(module)(
        x.clone().requires_grad_(),
        [condition] * len(x),  # as many as images: one each
        rules,
        record_layer=list(subject.layers),
        **options,
    )
    return answer.heatmap, answer.relevances


def masks(name: str, condition: Condition, x: Tensor) -> dict[str, list[int] | Tensor]:
    """The channels of a condition; a layer without any is closed by a mask of zeros."""
    known = {layer.name: layer for layer in explainer(name, COMPOSITES[0]).inner_layers()}
    return {
        layer: channels or torch.zeros(known[layer].size(len(x))) for layer, channels in condition.items()
    }


def images(name: str) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, *SUBJECTS[name].shape, dtype=torch.float64)


def assert_same(got: Tensor, want: Tensor, whole: Tensor | None = None) -> None:
    """whole: what sets the scale, where all of `want` may be 0."""
    scale = float((want if whole is None else whole).abs().max())
    assert got.shape == want.shape
    assert scale > 0
    assert float((got - want).abs().max()) <= BOUND * scale


@pytest.mark.parametrize(("name", "composite"), ALL)
def test_conditional_relevance_of_the_input_and_of_inner_layers(name: str, composite: str) -> None:
    x, target = images(name), 1
    unconditional: dict[str, Tensor] = {}
    for condition in SUBJECTS[name].conditions:
        want, inner = by_crp(name, composite, x, {"y": [target], **condition}, exclude_parallel=False)
        got = explainer(name, composite).explain(
            x, target, at=SUBJECTS[name].layers, through=masks(name, condition, x)
        )
        unconditional = unconditional or {"x": want, **inner}
        assert_same(got.relevance, want, unconditional["x"])
        for layer in SUBJECTS[name].layers:
            assert_same(got.inner[layer].values, inner[layer], unconditional[layer])
        assert got.ledger is not None
        assert float(got.ledger.error.max()) <= 1e-10
        # No condition is idle.
        assert not condition or float((want - unconditional["x"]).abs().max()) > 0


@pytest.mark.parametrize(("name", "composite"), ALL)
def test_the_same_channels_come_first(name: str, composite: str) -> None:
    x = images(name)
    _, inner = by_crp(name, composite, x, {"y": [3]})
    answer = explainer(name, composite).explain(x, 3, at=SUBJECTS[name].layers)
    for layer in SUBJECTS[name].layers:
        amounts = concepts.ChannelConcept().attribute(inner[layer], abs_norm=False)
        want, order = amounts.sort(dim=1, descending=True)
        channels, relevance = answer.inner[layer].top(5)
        assert torch.equal(channels, order[:, :5]), layer
        assert_same(relevance, want[:, :5])


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize(
    ("name", "condition"),
    [
        (name, condition)
        for name, subject in SUBJECTS.items()
        for condition in subject.conditions
        if not subject.beside or set(condition) & set(subject.beside)
    ],
)
def test_without_what_goes_past_a_layer(name: str, condition: Condition, composite: str) -> None:
    """zennit-crp's default: relevance that does not go through the layers of the condition is dropped."""
    x, beside = images(name), SUBJECTS[name].beside
    want, _ = by_crp(name, composite, x, {"y": [1], **condition}, exclude_parallel=True)
    closed = {beside[layer]: [] for layer in condition if layer in beside}
    through = masks(name, {**closed, **condition}, x)
    got = explainer(name, composite).explain(x, 1, through=through).relevance
    assert_same(got, want, explainer(name, composite).explain(x, 1).relevance)


@pytest.mark.parametrize(
    ("classes", "init", "target"),
    [
        ([1, 4], None, lambda scores: scores[:, [1, 4]].sum(1)),
        ([2], abs, lambda scores: scores[:, 2].abs()),
        ([0, 5], abs, lambda scores: scores[:, [0, 5]].abs().sum(1)),
    ],
)
@pytest.mark.parametrize("name", SUBJECTS)
def test_several_classes_and_absolute_scores(
    name: str, classes: list[int], init: Any, target: Target
) -> None:
    x = images(name)
    want, inner = by_crp(name, "EpsilonPlus", x, {"y": classes}, init_rel=init)
    got = explainer(name, "EpsilonPlus").explain(x, target, at=SUBJECTS[name].layers)
    assert_same(got.relevance, want)
    for layer in SUBJECTS[name].layers:
        assert_same(got.inner[layer].values, inner[layer])


@pytest.mark.parametrize(
    ("name", "layer", "channels"),
    [
        ("chain", "features.7", [2, 3]),
        ("chain", "classifier.0", [5]),
        ("branches", "second.0", [1, 6]),
        ("resnet18", "layer3.1.conv1", [7, 90]),
    ],
)
@pytest.mark.parametrize("composite", COMPOSITES)
def test_inner_neurons_are_what_a_start_layer_is(
    name: str, layer: str, channels: list[int], composite: str
) -> None:
    x = images(name)
    want, _ = by_crp(name, composite, x, {layer: channels}, start_layer=layer)
    assert_same(explainer(name, composite).explain(x, Neurons(layer, channels)).relevance, want)
