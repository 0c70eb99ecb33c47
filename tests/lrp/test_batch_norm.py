"""Batch norms that stay in the network: each rule against its formula, against zennit and captum, and its ledger."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from captum.attr import LRP
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn
from zennit.composites import EpsilonPlus as ZennitEpsilonPlus

import lrp
from fusion.errors import BadComposite
from lrp.batch_norm import BatchNormRule
from lrp.composites import Composite
from tests.nets import calibrated

F64 = torch.float64
RULES: tuple[BatchNormRule, ...] = get_args(BatchNormRule)
ALL_EPSILON = Composite("epsilon", lrp.Epsilon(), lrp.Epsilon())


class Small(nn.Module):
    """Two convolutions and two linear layers, each but the last with a batch norm before or behind its ReLU."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()

        def block(layer: nn.Module, norm: nn.Module, *rest: nn.Module) -> nn.Sequential:
            return nn.Sequential(layer, *((norm, nn.ReLU()) if norm_first else (nn.ReLU(), norm)), *rest)

        self.one = block(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.MaxPool2d(2))
        self.two = block(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
        self.three = block(nn.Linear(32, 16), nn.BatchNorm1d(16))
        self.scores = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        # No Flatten module: captum has no rule for it.
        return self.scores(self.three(self.two(self.one(x)).flatten(1)))  # type: ignore[no-any-return]


@pytest.fixture(params=[True, False], ids=["before the activation", "behind the activation"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    return calibrated(Small(request.param), (3, 8, 8)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 8, 8, dtype=F64)


def unfused(module: nn.Module, x: Tensor, composite: Composite, rule: BatchNormRule) -> lrp.Explanation:
    composite = replace(composite, batch_norm=rule)
    return lrp.Explainer(module, composite=composite, example=x, dtype=F64, fold=False, device="cpu").explain(
        x, 1
    )


def share(rule: BatchNormRule, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """R_x / R_y, written as the papers write it."""
    if rule == "identity":
        return torch.ones_like(x)
    if rule == "epsilon":
        y = s * x + t
        return s * x / (y + 1e-9 * torch.where(y >= 0, 1.0, -1.0))
    return (s * x).abs() / ((s * x).abs() + t.abs())


class Normalized(nn.Module):
    """A batch norm that is all there is between the input and the scores."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.relu, self.norm = relu, nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(x) if self.relu else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("relu", [False, True], ids=["any sign", "behind a relu"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_formula(rule: BatchNormRule, relu: bool) -> None:
    module = calibrated(Normalized(relu), (6,)).double()
    norm = module.norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        norm.weight[2] *= -1
        norm.weight[4] = 0
    s = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    t = norm.bias.detach() - s * norm.running_mean
    x = torch.randn(9, 6, dtype=F64)
    weights = torch.randn(6, dtype=F64)
    answer = lrp.Explainer(
        module, composite=replace(ALL_EPSILON, batch_norm=rule), example=x, dtype=F64, fold=False
    ).explain(x, lambda scores: scores @ weights)
    expected = share(rule, x.relu() if relu else x, s, t) * (answer.output * weights)
    torch.testing.assert_close(answer.relevance, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("composite", lrp.COMPOSITES)
@pytest.mark.parametrize("rule", RULES)
def test_the_ledger_closes(network: nn.Module, x: Tensor, rule: BatchNormRule, composite: str) -> None:
    answer = unfused(network, x, lrp.build(composite), rule)
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-9
    kept = answer.ledger.kept_by()["batch_norm"].abs()
    assert bool((kept < 1e-9 * answer.ledger.turnover).all()) == (rule == "identity")


def test_identity_is_what_zennit_does(network: nn.Module, x: Tensor) -> None:
    """zennit passes relevance unchanged through batch norms and ReLUs where no canonizer merges them."""
    seed = torch.zeros(3, 5, dtype=F64)
    seed[:, 1] = network(x)[:, 1].detach()
    leaf = x.clone().requires_grad_()
    with ZennitEpsilonPlus().context(copy.deepcopy(network)) as hooked:
        (expected,) = torch.autograd.grad(hooked(leaf), leaf, seed)
    got = unfused(network, x, lrp.build("EpsilonPlus"), "identity").relevance
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


def test_epsilon_is_what_captum_does(network: nn.Module, x: Tensor) -> None:
    module = copy.deepcopy(network)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d):
            layer.rule = EpsilonRule()
    expected = LRP(module).attribute(x, target=1).detach()
    composite = Composite("captum", lrp.Epsilon(1e-9), lrp.Epsilon(1e-9))
    got = unfused(network, x, composite, "epsilon").relevance
    # captum hands relevance to closed ReLUs; with the epsilon rule everywhere none arrives there.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_where_every_rule_is_epsilon_fusion_is_the_epsilon_rule(network: nn.Module, x: Tensor) -> None:
    """Both are the gradient times the input, so no fold can change such an explanation."""
    composite = Composite("epsilon 0", lrp.LRP0(), lrp.LRP0())
    folded = lrp.Explainer(network, composite=composite, example=x, dtype=F64).explain(x, 1).relevance
    kept = unfused(network, x, composite, "epsilon").relevance
    torch.testing.assert_close(folded, kept, rtol=1e-6, atol=1e-6 * float(kept.abs().max()))


@pytest.mark.parametrize("name", ["EpsilonPlus", "EpsilonPlusFlat", "EpsilonAlpha2Beta1"])
def test_the_identity_rule_is_fusion_with_the_bias_left_out(name: str, x: Tensor) -> None:
    """A positive scale cancels in every rule's fraction, so all that the identity rule ignores is the shift. (Not in
    gamma's choice of a branch: the shift changes the sign of outputs.)"""
    module = calibrated(Small(norm_first=True), (3, 8, 8)).double()
    composite = lrp.build(name, bias="omit", epsilon=1e-9, stabilizer=1e-9)
    folded = lrp.Explainer(module, composite=composite, example=x, dtype=F64).explain(x, 1).relevance
    kept = unfused(module, x, composite, "identity").relevance
    torch.testing.assert_close(folded, kept, rtol=1e-4, atol=1e-5 * float(kept.abs().max()))


def test_the_rule_by_magnitude_is_the_default(network: nn.Module, x: Tensor) -> None:
    composite = lrp.build("EpsilonPlusFlat")
    assert composite.batch_norm == "magnitude"
    answers = [
        lrp.Explainer(network, composite=c, example=x, dtype=F64, fold=False).explain(x).relevance
        for c in (composite, replace(composite, batch_norm="magnitude"))
    ]
    assert torch.equal(*answers)


def test_an_unfolded_network_keeps_its_normalizations(network: nn.Module, x: Tensor) -> None:
    explainer = lrp.Explainer(network, example=x, fold=False)
    assert sum("batch_norm" in str(node.target) for node in explainer.network.graph.nodes) == 3


def test_an_unknown_rule_is_refused(network: nn.Module, x: Tensor) -> None:
    composite = replace(ALL_EPSILON, batch_norm="gradient")  # type: ignore[arg-type]
    with pytest.raises(BadComposite, match=r"magnitude, identity, epsilon"):
        lrp.Explainer(network, composite=composite, example=x, fold=False)
