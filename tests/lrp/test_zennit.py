"""The field's reference: every composite that zennit has, on the families of torchvision where it is right, in float64.

zennit 0.5.1 merges batch norms without taking their eps out of the merged layer, so its networks get their eps moved
into the variance first: the same function, and nothing is left behind. EpsilonGammaBox on ResNet-50 is unstable in
zennit for statistics that do not fit the weights; with calibrated ones, as here, both agree.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from zennit import composites as zennit_composites
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.torchvision import ResNetCanonizer, VGGCanonizer

import fusion
import lrp
from tests.nets import calibrated, without_eps

SIZE = 64
NETWORKS = {
    "alexnet": SequentialMergeBatchNorm,
    "googlenet": SequentialMergeBatchNorm,
    "resnet18": ResNetCanonizer,
    "resnet50": ResNetCanonizer,
    "squeezenet1_0": SequentialMergeBatchNorm,
    "vgg16": VGGCanonizer,
    "vgg16_bn": VGGCanonizer,
}
OPTIONS = {"googlenet": {"init_weights": False, "aux_logits": False}}


@dataclass(frozen=True)
class Prepared:
    """A network in float64, its capture, and zennit's canonizer for it."""

    module: nn.Module
    network: fusion.Network
    canonizer: type


@pytest.fixture(scope="module", params=NETWORKS)  # one at a time: VGG's weights take a gigabyte
def prepared(request: pytest.FixtureRequest) -> Prepared:
    torch.manual_seed(0)
    name = request.param
    module = torchvision.models.get_model(name, weights=None, num_classes=20, **OPTIONS.get(name, {}))
    module = calibrated(module, (3, SIZE, SIZE)).double()
    network = fusion.capture(module, (torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64),))
    return Prepared(module, network, NETWORKS[name])


def by_zennit(module: nn.Module, x: Tensor, composite: str, canonizer: type) -> Tensor:
    """Relevance of the arg-max scores by zennit, all its stabilizers at their default of 1e-6."""
    module = without_eps(copy.deepcopy(module))
    bounds = {"low": torch.full((1, 3, 1, 1), -3.0).to(x), "high": torch.full((1, 3, 1, 1), 3.0).to(x)}
    options = bounds if "Box" in composite else {}
    scores = module(x).detach()
    seed = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), scores.amax(1, keepdim=True))
    with getattr(zennit_composites, composite)(canonizers=[canonizer()], **options).context(module) as hooked:
        leaf = x.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(hooked(leaf), leaf, seed)
    return relevance


@pytest.mark.parametrize("composite", [name for name in lrp.COMPOSITES if hasattr(zennit_composites, name)])
def test_the_same_relevance_as_zennit(prepared: Prepared, composite: str) -> None:
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    expected = by_zennit(prepared.module, x, composite, prepared.canonizer)
    # Stabilizers alike: zennit's Norm rule at sums and average pools has one too.
    ours = lrp.build(composite, norm_epsilon=1e-6)
    answer = lrp.Explainer(prepared.network, composite=ours, dtype=torch.float64).explain(x)
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-10
    assert float((answer.relevance - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_rules_by_name_equal_zennits_name_map() -> None:
    from zennit.composites import NameMapComposite
    from zennit.rules import Epsilon, Gamma, ZPlus

    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    module = module.double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    ours = lrp.Explainer(
        module,
        composite="EpsilonPlus",
        rules={"2": lrp.Gamma(0.5), "5": lrp.Epsilon(0.1)},
        dtype=torch.float64,
        example=x,
    )
    theirs = NameMapComposite([(["0"], ZPlus()), (["2"], Gamma(0.5)), (["5"], Epsilon(0.1))])
    with theirs.context(module) as hooked:
        leaf = x.clone().requires_grad_()
        scores = hooked(leaf)
        seed = torch.zeros_like(scores)
        seed[:, 1] = scores[:, 1].detach()
        # Activations pass relevance unchanged in zennit's composites; ReLU's own gradient does not differ, since
        # what a ReLU blocks carries no relevance under rules that multiply by the input.
        (expected,) = torch.autograd.grad(scores, leaf, seed)
    torch.testing.assert_close(ours.explain(x, 1).relevance, expected, rtol=1e-6, atol=1e-9)
