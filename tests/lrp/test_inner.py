"""Inside a network: relevance at a layer, through chosen channels, and of inner neurons."""

from __future__ import annotations

import linecache
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import fusion
import lrp
from fusion.errors import BadLayer, BadTarget
from lrp.targets import Contrast, Neurons
from tests.fusion.test_centering import Transformer
from tests.nets import bottleneck


@pytest.fixture(scope="module")
def explainer() -> lrp.Explainer:
    network = fusion.capture(bottleneck().double(), (torch.randn(1, 3, 16, 16, dtype=torch.float64),))
    return lrp.Explainer(network, composite="EpsilonPlus", dtype=torch.float64)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 16, 16, dtype=torch.float64)


class TestAt:
    def test_the_map_is_the_same_whether_one_looks_or_not(self, explainer: lrp.Explainer, x: Tensor) -> None:
        plain, looked = explainer.explain(x, 1), explainer.explain(x, 1, at=["conv2", "conv3"])
        assert torch.equal(plain.relevance, looked.relevance)
        assert set(looked.inner) == {"conv2", "conv3"}
        assert looked.inner["conv3"].values.shape == (3, 12, 8, 8)
        assert looked.inner["conv3"].map().shape == (3, 8, 8)

    def test_what_reaches_a_layer_is_the_score_less_what_stayed_behind_it(
        self, explainer: lrp.Explainer, x: Tensor
    ) -> None:
        answer = explainer.explain(x, 1, at="conv3")
        assert answer.ledger is not None
        kept = {entry.layer: entry.kept for entry in answer.ledger.entries}
        torch.testing.assert_close(
            answer.inner["conv3"].values.sum((1, 2, 3)), answer.score - kept["fc"], rtol=1e-10, atol=1e-12
        )

    def test_top_channels_are_those_with_the_most_relevance(
        self, explainer: lrp.Explainer, x: Tensor
    ) -> None:
        inner = explainer.explain(x, [[0, 3]] * 3, at="conv3").inner["conv3"]
        assert inner.values.shape == (3, 2, 12, 8, 8)
        assert inner.by_channel.shape == (3, 2, 12)
        torch.testing.assert_close(inner.by_channel, inner.values.sum((-1, -2)))
        channels, amounts = inner.top(4)
        assert channels.shape == (3, 2, 4)
        want = inner.values.sum((-1, -2)).gather(-1, channels)
        torch.testing.assert_close(amounts, want)
        assert bool((amounts[..., 0] == inner.by_channel.amax(-1)).all())

    def test_names_are_listed_and_unknown_ones_refused(self, explainer: lrp.Explainer, x: Tensor) -> None:
        names = [layer.name for layer in explainer.inner_layers()]
        assert {"conv1", "conv2", "conv3", "fc"} <= set(names)
        assert len(set(names)) == len(names)
        answer = explainer.explain(x, 1, at=names)
        assert set(answer.inner) == set(names)
        with pytest.raises(BadLayer, match="conv1, conv2"):
            explainer.explain(x, 1, at="conv")

    def test_tokens_have_their_channels_at_the_end(self) -> None:
        network = fusion.capture(Transformer(6).eval(), (torch.randn(1, 3, 8, 8),))
        answer = lrp.Explainer(network).explain(torch.randn(2, 3, 8, 8), at=["blocks.0.out", "patches"])
        assert answer.inner["blocks.0.out"].values.shape == (2, 5, 6)
        assert answer.inner["blocks.0.out"].by_channel.shape == (2, 6)
        assert answer.inner["patches"].by_channel.shape == (2, 6)


class TestThrough:
    def test_channels_add_up(self, explainer: lrp.Explainer, x: Tensor) -> None:
        whole = explainer.explain(x, 1).relevance
        parts = [explainer.explain(x, 1, through={"conv3": [i]}).relevance for i in range(12)]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-9, atol=1e-12)
        assert float(parts[3].abs().max()) > 0

    def test_the_rest_is_in_the_ledger(self, explainer: lrp.Explainer, x: Tensor) -> None:
        answer = explainer.explain(x, 1, through={"conv3": [2, 5]}, at="conv3")
        assert answer.ledger is not None
        assert float(answer.ledger.error.max()) <= 1e-10
        (entry,) = [e for e in answer.ledger.entries if e.op == "through"]
        torch.testing.assert_close(entry.passed, answer.inner["conv3"].values.sum((1, 2, 3)))
        assert float(entry.kept.abs().min()) > 0
        assert set(answer.inner["conv3"].by_channel.nonzero()[:, 1].tolist()) == {2, 5}

    def test_two_layers_and_a_mask(self, explainer: lrp.Explainer, x: Tensor) -> None:
        mask = torch.zeros(1, 8, 16, 16, dtype=torch.bool)
        mask[:, 3, :8] = True
        answer = explainer.explain(x, 1, through={"conv3": 2, "conv2": mask})
        first = explainer.explain(x, 1, through={"conv3": 2}, at="conv2").inner["conv2"].values
        both = explainer.explain(x, 1, through={"conv3": 2, "conv2": mask}, at="conv2").inner["conv2"].values
        torch.testing.assert_close(both, first * mask)
        assert answer.ledger is not None
        assert float(answer.ledger.error.max()) <= 1e-10

    @pytest.mark.parametrize(
        ("channels", "words"),
        [
            ([12], "no channel 12"),
            ([], "at least one"),
            (torch.ones(5, dtype=torch.bool), "does not broadcast"),
        ],
    )
    def test_channels_that_are_not_there(
        self, explainer: lrp.Explainer, x: Tensor, channels: object, words: str
    ) -> None:
        with pytest.raises(BadLayer, match=words):
            explainer.explain(x, 1, through={"conv3": channels})  # type: ignore[dict-item]


class TestTargets:
    def test_a_contrast_is_the_difference(self, explainer: lrp.Explainer, x: Tensor) -> None:
        answer = explainer.explain(x, Contrast(1, 4))
        torch.testing.assert_close(answer.score, answer.output[:, 1] - answer.output[:, 4])
        both = explainer.explain(x, [[1, 4]] * 3).relevance
        torch.testing.assert_close(answer.relevance, both[:, 0] - both[:, 1], rtol=1e-9, atol=1e-12)

    def test_a_contrast_with_all_others(self, explainer: lrp.Explainer, x: Tensor) -> None:
        answer = explainer.explain(x, Contrast())
        top = answer.output.argmax(1)
        assert answer.target is not None
        assert torch.equal(answer.target, top)
        own = answer.output.gather(1, top[:, None])[:, 0]
        torch.testing.assert_close(answer.score, own - (answer.output.sum(1) - own) / 4)

    def test_a_class_against_itself_is_refused(self, explainer: lrp.Explainer, x: Tensor) -> None:
        with pytest.raises(BadTarget, match="two different classes"):
            explainer.explain(x, Contrast(1, 1))

    def test_neurons_of_a_layer(self, explainer: lrp.Explainer, x: Tensor) -> None:
        """The output layer's neurons are the class scores, and a linear layer's are a class of their own network."""
        torch.testing.assert_close(
            explainer.explain(x, Neurons("fc", 2)).relevance, explainer.explain(x, 2).relevance
        )
        answer = explainer.explain(x, Neurons("conv2", [3]), at="conv1")
        assert answer.output.shape == (3, 8 * 16 * 16)
        assert answer.target is None
        assert answer.ledger is not None
        assert float(answer.ledger.error.max()) <= 1e-10
        mask = torch.zeros(8, 16, 16)
        mask[3, 5, 5] = 1
        one = explainer.explain(x, Neurons("conv2", mask)).relevance
        outside = one.clone()
        outside[..., 3:8, 3:8] = 0
        assert float(one.abs().max()) > 0
        assert float(outside.abs().max()) == 0  # two 3x3 convolutions see 5 x 5 values

    def test_a_layer_behind_the_neurons(self, explainer: lrp.Explainer, x: Tensor) -> None:
        with pytest.raises(BadLayer, match="no part of what makes"):
            explainer.explain(x, Neurons("conv2", 1), at="conv3")


def test_a_layer_that_is_called_twice_is_read_at_its_last_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(torch.relu(self.inner(x))))  # type: ignore[no-any-return]

    module = Twice().double()
    x = torch.randn(2, 4, dtype=torch.float64)
    answer = lrp.Explainer(
        fusion.capture(module, (x,)), composite="EpsilonPlus", dtype=torch.float64
    ).explain(x, 1, at="inner")
    last = module.inner(torch.relu(module.inner(x)))
    # Epsilon of 1e-6 at the last layer.
    z = module.fc(last)[:, 1]
    want = last * module.fc.weight[1] * (z / (z + 1e-6 * z.sign()))[:, None]
    torch.testing.assert_close(answer.inner["inner"].values, want.detach(), rtol=1e-9, atol=1e-12)


class TestWhatCanBeAskedFor:
    def test_gates_and_what_stands_before_an_input_rule_are_refused_by_name(self) -> None:
        module, x = Gated().double().eval(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
        network = fusion.capture(module, (x,))
        plain = lrp.Explainer(network, composite="EpsilonPlus", dtype=torch.float64)
        flat = lrp.Explainer(network, composite="EpsilonPlusFlat", dtype=torch.float64)
        assert {"sub", "div"} <= {layer.node for layer in plain.inner_layers()}
        assert not {"sub", "div"} & {layer.node for layer in flat.inner_layers()}
        for explainer, hidden in ((plain, "squeeze"), (flat, "squeeze"), (flat, "div")):
            with pytest.raises(BadLayer, match="Relevance does not pass"):
                explainer.explain(x, 1, at=hidden)
        with pytest.raises(BadLayer, match="There is no layer"):
            plain.explain(x, 1, at="")

    def test_every_listed_layer_answers_and_has_a_name_of_its_own(self) -> None:
        module, x = Gated().double().eval(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
        explainer = lrp.Explainer(fusion.capture(module, (x,)), composite="EpsilonPlus", dtype=torch.float64)
        layers = explainer.inner_layers()
        names = [layer.name for layer in layers]
        assert len(set(names)) == len(names)
        assert {"relu#1", "relu"} <= set(names)
        answer = explainer.explain(x, 1, at=names)
        for layer in layers:
            inner = answer.inner[layer.name]
            assert inner.by_channel.shape == (2, layer.channels), layer
        assert answer.inner["relu#1"].values.shape == (2, 4, 8, 8)
        assert answer.inner["relu"].values.shape == (2, 6, 8, 8)

    def test_two_names_of_one_node_let_pass_what_both_do(self, explainer: lrp.Explainer, x: Tensor) -> None:
        node = next(layer.node for layer in explainer.inner_layers() if layer.name == "conv3")
        both = explainer.explain(x, 1, through={"conv3": [1, 2], node: [2, 3]}).relevance
        torch.testing.assert_close(both, explainer.explain(x, 1, through={"conv3": 2}).relevance)

    def test_channels_are_whole_numbers(self, explainer: lrp.Explainer, x: Tensor) -> None:
        with pytest.raises(BadLayer, match="whole numbers"):
            explainer.explain(x, 1, through={"conv3": [0.5]})  # type: ignore[list-item]

    def test_channels_stay_channels_where_they_are_moved(self) -> None:
        module, x = Moved().double().eval(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
        explainer = lrp.Explainer(fusion.capture(module, (x,)), composite="EpsilonPlus", dtype=torch.float64)
        axes = {layer.node: layer.axis for layer in explainer.inner_layers()}
        assert axes["permute"] == 3
        assert axes["relu"] == 3
        assert axes["permute_1"] == 1

    def test_in_inference_mode(self, explainer: lrp.Explainer, x: Tensor) -> None:
        want = explainer.explain(x, 1, at="conv2", through={"conv3": 2})
        with torch.inference_mode():
            got = explainer.explain(x, 1, at="conv2", through={"conv3": 2})
        assert torch.equal(got.relevance, want.relevance)
        assert torch.equal(got.inner["conv2"].values, want.inner["conv2"].values)


def test_a_question_leaves_nothing_in_memory(explainer: lrp.Explainer, x: Tensor) -> None:
    """Generated code is kept by torch.fx for ever, so a question must not generate any."""

    def ask() -> int:
        explainer.explain(x, 1, at="conv2", through={"conv3": 2})
        explainer.explain(x, Neurons("conv2", 1))
        explainer.attribute(x, 1, "GradCAM")
        return len(linecache.cache)

    assert ask() == ask()


def test_questions_from_several_threads(explainer: lrp.Explainer, x: Tensor) -> None:
    def ask(i: int) -> list[Tensor]:
        answer = explainer.explain(x, i % 5, at="conv2", through={"conv3": [i]})
        return [
            answer.relevance,
            answer.inner["conv2"].values,
            explainer.attribute(x, i % 5, "GradCAM").relevance,
        ]

    want = [ask(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(ask, range(8)), want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class Gated(nn.Module):
    """Preprocessing inside, one ReLU called twice, and squeeze-and-excite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.relu, self.squeeze, self.fc = nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first((x - 0.4) / 0.2))
        y = self.relu(self.second(y))
        y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


class Moved(nn.Module):
    """Channels that go to the end and come back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x).permute(0, 2, 3, 1))
        return self.fc(self.last(y.permute(0, 3, 1, 2)).mean((2, 3)))  # type: ignore[no-any-return]
