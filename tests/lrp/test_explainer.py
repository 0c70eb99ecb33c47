"""The explainer as a user meets it: targets, shapes, errors, threads, and the ledger's word on every unit."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import fusion
import lrp
from fusion.errors import (
    BadComposite,
    BadInput,
    BadTarget,
    NothingToExplain,
    UnbalancedLedger,
    UnsupportedOperator,
)
from lrp.composites import build
from lrp.ledger import Recording
from lrp.surrogate import build_surrogate
from tests.nets import bottleneck


@pytest.fixture(scope="module")
def network() -> fusion.Network:
    return fusion.capture(bottleneck(), (torch.randn(1, 3, 16, 16),))


@pytest.fixture(scope="module")
def explainer(network: fusion.Network) -> lrp.Explainer:
    return lrp.Explainer(network)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16)


def test_one_line_explains_a_module(x: Tensor) -> None:
    answer = lrp.explain(bottleneck(), x, composite="EpsilonPlus")
    assert answer.relevance.shape == x.shape
    assert answer.target is not None
    assert torch.equal(answer.target, answer.output.argmax(1))


def test_the_output_is_the_networks_own(explainer: lrp.Explainer, x: Tensor) -> None:
    answer = explainer.explain(x)
    torch.testing.assert_close(answer.output, bottleneck()(x).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer.output, explainer.predict(x))


def test_a_batch_is_the_loop_over_its_images(explainer: lrp.Explainer, x: Tensor) -> None:
    together = explainer.explain(x).relevance
    single = torch.cat([explainer.explain(x[i]).relevance for i in range(len(x))])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-6)


def test_targets_of_every_form_agree(explainer: lrp.Explainer, x: Tensor) -> None:
    fixed = explainer.explain(x, 2)
    per_sample = explainer.explain(x, [2, 0, 2, 1])
    several = explainer.explain(x, [[2, 0], [0, 2], [2, 2], [1, 3]])
    function = explainer.explain(x, lambda scores: scores[:, 2])
    assert several.relevance.shape == (4, 2, 3, 16, 16)
    torch.testing.assert_close(fixed.relevance[0], per_sample.relevance[0])
    torch.testing.assert_close(per_sample.relevance, several.relevance[:, 0])
    torch.testing.assert_close(fixed.relevance, function.relevance)
    torch.testing.assert_close(several.score[:, 0], per_sample.score)
    assert function.target is None
    difference = explainer.explain(x, lambda scores: scores[:, 2] - scores[:, 0])
    zero = explainer.explain(x, 0)
    torch.testing.assert_close(difference.relevance, fixed.relevance - zero.relevance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (5, "0 to 4"),
        (-1, "0 to 4"),
        ([0, 1], "2 targets were given for 4 images"),
        ([[0], [1], [2], [7]], "Class 7 does not exist"),
        ([[0], [1, 2], [2], [3]], "rows of one length"),
        (1.5, "whole number"),
        ("cat", "no class index"),
        (lambda scores: scores, "one number per image"),
        (lambda scores: scores.detach()[:, 0], "differentiably"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    explainer: lrp.Explainer, x: Tensor, target: object, words: str
) -> None:
    with pytest.raises(BadTarget, match=words):
        explainer.explain(x, target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(1, 1, 16, 16), r"\[1, 1, 16, 16\]"),
        (torch.zeros(1, 3, 8, 16), r"\[1, 3, 8, 16\]"),
        (torch.zeros(0, 3, 16, 16), "shape"),
        (torch.full((1, 3, 16, 16), float("nan")), "NaN"),
        (torch.full((1, 3, 16, 16), float("inf")), "infinity"),
        ("cat.png", "without preprocessing"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(explainer: lrp.Explainer, image: object, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        explainer.explain(image)


@pytest.mark.parametrize("fill", [0.0, 1.0, -3.0, 1e6])
def test_constant_and_huge_inputs_give_finite_relevance(explainer: lrp.Explainer, fill: float) -> None:
    answer = explainer.explain(torch.full((1, 3, 16, 16), fill))
    assert torch.isfinite(answer.relevance).all()
    if fill == 0:
        plain = lrp.Explainer(explainer.network, composite="EpsilonPlus").explain(torch.zeros(1, 3, 16, 16))
        assert not plain.relevance.any()  # a rule that multiplies by the input has nothing to hand out


@pytest.mark.parametrize("composite", lrp.COMPOSITES)
def test_the_ledger_accounts_for_every_unit(network: fusion.Network, composite: str) -> None:
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    explainer = lrp.Explainer(network, composite=composite, dtype=torch.float64)
    answer = explainer.explain(x, [[0, 1], [2, 3], [4, 0]])
    ledger = answer.ledger
    assert ledger is not None
    assert ledger.score.shape == (3, 2)
    torch.testing.assert_close(ledger.input, answer.relevance.sum((2, 3, 4)))
    torch.testing.assert_close(ledger.input + ledger.kept, answer.score, rtol=1e-11, atol=1e-11)
    assert {entry.layer for entry in ledger.entries} >= {"conv1", "conv2", "conv3", "fc"}


def test_a_ledger_that_does_not_close_is_an_error_when_strict(
    network: fusion.Network, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rule that loses half of the relevance without saying so.
    from lrp import surrogate

    class Leaky(lrp.Epsilon):
        pass

    original = surrogate._linear_layer

    def leaky(builder: surrogate.Builder, layer: object, rule: object) -> object:
        node = original(builder, layer, rule)  # type: ignore[arg-type]
        if not isinstance(rule, Leaky):
            return node
        # The same value with half of the derivative.
        halves = [builder.emit(torch.ops.aten.mul.Tensor, n, 0.5) for n in (node, builder.detached(node))]  # type: ignore[arg-type]
        return builder.emit(torch.ops.aten.add.Tensor, *halves)

    monkeypatch.setattr(surrogate, "_linear_layer", leaky)
    explainer = lrp.Explainer(network, rules={"conv2": Leaky()})
    with pytest.raises(UnbalancedLedger, match="strict=False"):
        explainer.explain(x)
    answer = lrp.Explainer(network, rules={"conv2": Leaky()}, strict=False).explain(x)
    assert answer.ledger is not None
    assert not answer.ledger.closes(1e-3)


def test_threads_give_bitwise_what_one_thread_gives(explainer: lrp.Explainer) -> None:
    images = [torch.randn(1, 3, 16, 16) for _ in range(8)]
    alone = [explainer.explain(image) for image in images]
    results: dict[int, lrp.Explanation] = {}

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = explainer.explain(images[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert torch.equal(results[i].relevance, expected.relevance)
        assert results[i].ledger is not None
        assert expected.ledger is not None
        assert torch.equal(results[i].ledger.kept, expected.ledger.kept)  # type: ignore[union-attr]


class Twice(nn.Module):
    """One layer used twice; its unrolled copy must be explained alike."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)
        self.b = self.a if shared else copy.deepcopy(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_layer_used_twice_is_its_unrolled_copy(x: Tensor) -> None:
    shared, unrolled = Twice(True), Twice(False)
    unrolled.load_state_dict(
        {
            **unrolled.state_dict(),
            **shared.state_dict(),
            **{
                name.replace("a.", "b."): t
                for name, t in shared.state_dict().items()
                if name.startswith("a.")
            },
        }
    )
    torch.testing.assert_close(lrp.explain(shared, x).relevance, lrp.explain(unrolled, x).relevance)


class SoftmaxEnd(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.body(x), 1)


def test_a_final_softmax_is_left_out(explainer: lrp.Explainer, x: Tensor) -> None:
    ended = lrp.Explainer(SoftmaxEnd(bottleneck()), example=x)
    torch.testing.assert_close(ended.explain(x, 1).relevance, explainer.explain(x, 1).relevance)
    assert any("softmax" in note for note in ended.notes)


def test_explaining_works_under_inference_mode(explainer: lrp.Explainer, x: Tensor) -> None:
    expected = explainer.explain(x).relevance
    with torch.inference_mode():
        torch.testing.assert_close(explainer.explain(x * 1.0).relevance, expected)


class Factorial(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(x.flatten(1))[:, :4]


def test_an_operator_without_a_rule_is_refused_by_name(x: Tensor) -> None:
    with pytest.raises(UnsupportedOperator, match="lgamma"):
        lrp.Explainer(Factorial(), example=x)


class ArgMax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).argmax(1)


def test_a_network_that_answers_whole_numbers_is_refused(x: Tensor) -> None:
    with pytest.raises(NothingToExplain, match="before arg-max"):
        lrp.Explainer(ArgMax(), example=x)


def test_overrides_by_pattern_and_the_table(network: fusion.Network) -> None:
    explainer = lrp.Explainer(network, rules={"conv*": lrp.Gamma(0.1), "conv3": lrp.LRP0()})
    rules = {layer: rule for layer, _, rule in explainer.table()}
    assert rules == {
        "conv1": "Gamma(gamma=0.1)",
        "conv2": "Gamma(gamma=0.1)",
        "conv3": "LRP0()",
        "fc": "Epsilon(epsilon=1e-06)",
    }
    assert "conv2" in str(explainer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net: lrp.Explainer(net, composite="EpsilonMinus"), "The composites are"),
        (lambda net: lrp.build("EpsilonPlus", gamma=1.0), "It takes"),
        (lambda net: lrp.Explainer(net, rules={"nothing*": lrp.LRP0()}), "matches no linear layer"),
        (lambda net: lrp.Explainer(net, rules={"conv3": lrp.Flat()}), "read the network's input"),
        (
            lambda net: lrp.Explainer(net, composite=lrp.build("EpsilonGammaBox", low=[1.0, 2.0])),
            "3 channels",
        ),
    ],
)
def test_composites_that_do_not_fit_are_refused(network: fusion.Network, make: object, words: str) -> None:
    with pytest.raises(BadComposite, match=words):
        make(network)  # type: ignore[operator]


def test_single_precision_follows_double(network: fusion.Network, x: Tensor) -> None:
    for composite in lrp.COMPOSITES:
        double = (
            lrp.Explainer(network, composite=composite, dtype=torch.float64).explain(x.double(), 1).relevance
        )
        single = lrp.Explainer(network, composite=composite).explain(x, 1).relevance
        assert float((single - double).abs().max()) <= 2e-3 * float(double.abs().max())


@pytest.mark.parametrize("composite", sorted(lrp.COMPOSITES))
def test_nothing_stays_behind_on_the_cpu(network: fusion.Network, composite: str) -> None:
    """A device without storage takes part in no operation with the CPU's tensors, so a run shows what would fail on
    CUDA; the ledger is recorded there too."""
    fused = fusion.fuse(network).network
    surrogate = build_surrogate(fused, build(composite)).to(torch.device("meta"))
    x = torch.empty(2, 3, 16, 16, device="meta")
    gate = torch.ones_like(x, requires_grad=True)
    recording = Recording(len(x))
    recording.next_target()
    scores = surrogate.program(x, gate, recording)
    (relevance,) = torch.autograd.grad(scores, gate, torch.ones_like(scores))
    ledger = recording.ledger(scores.sum(1), relevance.flatten(1).sum(1), surrogate.layers, False)
    assert {t.device.type for t in (relevance, ledger.kept, scores)} == {"meta"}
    assert all(t.device.type == "meta" for t in surrogate.program.buffers())
    assert all(t.device.type == "cpu" for t in fused.constants.values())


@pytest.mark.gpu
def test_cuda_gives_the_cpus_answer(network: fusion.Network, x: Tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    on_cpu = lrp.Explainer(network, device="cpu", dtype=torch.float64).explain(x.double(), 1).relevance
    on_gpu = lrp.Explainer(network, device="cuda", dtype=torch.float64).explain(x.double(), 1).relevance.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-9, atol=1e-12)
