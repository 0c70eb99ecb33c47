"""Targets that name an output: maps, rows and embeddings are explained as exactly as class scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fusion
import lrp
from fusion.errors import BadLayer, BadTarget
from lrp import Box, Output
from lrp.reductions import REDUCTIONS

F64 = torch.float64
IMAGE = (12, 16)


class Several(nn.Module):
    """A segmenter, a detector's head and an embedding on one stem."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        )
        self.classes, self.anchors, self.embed = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 2 * 5, 1), nn.Linear(6, 7)
        nn.init.normal_(self.classes.weight, std=3)  # so that no class wins everywhere

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        rows = (
            self.anchors(y).reshape(x.shape[0], 2, 5, 6, 8).permute(0, 3, 4, 1, 2).reshape(x.shape[0], 96, 5)
        )
        small = self.classes(y)
        big = F.interpolate(small, IMAGE, mode="bilinear")
        return {"out": big, "aux": small.softmax(1), "rows": rows, "embedding": self.embed(y.mean((2, 3)))}


@pytest.fixture(scope="module")
def module() -> Several:
    return Several().double().eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, *IMAGE, dtype=F64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def explainer(module: Several, x: Tensor) -> lrp.Explainer:
    """Nothing but LRP-0: relevance is the input times the gradient."""
    return lrp.Explainer(captured(module, x), composite="EpsilonPlus", rules={"*": lrp.LRP0()}, dtype=F64)


def captured(module: nn.Module, x: Tensor) -> fusion.Network:
    """The network; by its shape alone the embedding would count as class scores."""
    network = fusion.capture(module, (x,))
    return network.returning([spec.name for spec in network.outputs], {"embedding": "vector"})


MASK = torch.rand(12, 16, generator=torch.Generator().manual_seed(2)) * (torch.arange(16) > 7)
VECTOR = torch.randn(7, dtype=F64, generator=torch.Generator().manual_seed(3))

WINNER = 0  # a class of the maps that wins somewhere in both images

# What each target is, written out on the module's own answers.
CASES: dict[str, tuple[Output, Callable[[dict[str, Tensor]], Tensor]]] = {
    "one place of a map": (Output("out", index=(1, 3, 5)), lambda y: y["out"][:, 1, 3, 5]),
    "a channel's sum": (Output("out", channel=2), lambda y: y["out"][:, 2].sum((1, 2))),
    "its mean in a box": (
        Output("out", channel=2, region=Box(2, 3, 6, 9), reduce="mean"),
        lambda y: y["out"][:, 2, 2:6, 3:9].mean((1, 2)),
    ),
    "a box in rows of the output": (
        Output("out", channel=0, region=Box(0, 0, 2, 3, of="output"), reduce="max"),
        lambda y: y["out"][:, 0, :2, :3].amax((1, 2)),
    ),
    "all channels of a box": (
        Output("out", region=Box(2, 3, 6, 9)),
        lambda y: y["out"][:, :, 2:6, 3:9].sum((1, 2, 3)),
    ),
    "a mask's weighted sum": (
        Output("out", channel=3, region=MASK),
        lambda y: (y["out"][:, 3] * MASK).sum((1, 2)),
    ),
    "a mask's weighted mean": (
        Output("out", channel=3, region=MASK, reduce="mean"),
        lambda y: (y["out"][:, 3] * MASK).sum((1, 2)) / MASK.double().sum(),
    ),
    "where a class wins": (
        Output("out", channel=WINNER, region="wins"),
        lambda y: (y["out"][:, WINNER] * (y["out"].argmax(1) == WINNER)).sum((1, 2)),
    ),
    "the norm of a map": (Output("out", reduce="norm"), lambda y: y["out"].flatten(1).norm(dim=1)),
    "the best score of a class": (
        Output("rows", channel=3, reduce="max"),
        lambda y: y["rows"][..., 3].amax(1),
    ),
    "an anchor's class": (Output("rows", index=(17, 2)), lambda y: y["rows"][:, 17, 2]),
    "the best of some anchors": (
        Output("rows", region=torch.arange(96) < 20, reduce="max"),
        lambda y: y["rows"][:, :20].flatten(1).amax(1),
    ),
    "channels along another axis": (Output("rows", channel=9, axis=1), lambda y: y["rows"][:, 9].sum(1)),
    "the output by its position": (Output(2, index=(0, 0)), lambda y: y["rows"][:, 0, 0]),
    "a component": (Output("embedding", index=4), lambda y: y["embedding"][:, 4]),
    "a component as a channel": (Output("embedding", channel=4), lambda y: y["embedding"][:, 4]),
    "its norm": (Output("embedding", reduce="norm"), lambda y: y["embedding"].norm(dim=1)),
    "a dot product": (Output("embedding", like=VECTOR), lambda y: y["embedding"] @ VECTOR),
    "dot product given as numbers": (
        Output("embedding", like=VECTOR.tolist()),
        lambda y: y["embedding"] @ VECTOR,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_relevance_is_the_input_times_the_gradient_of_what_the_target_says(
    name: str, explainer: lrp.Explainer, module: Several, x: Tensor
) -> None:
    target, written_out = CASES[name]
    leaf = x.clone().requires_grad_()
    value = written_out(module(leaf))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    answer = explainer.explain(x, target)
    torch.testing.assert_close(answer.score, value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(answer.relevance, x * gradient, rtol=1e-9, atol=1e-11)
    assert answer.target is None
    compared = explainer.attribute(x, target, "InputXGradient")
    torch.testing.assert_close(compared.relevance, x * gradient, rtol=1e-9, atol=1e-11)
    assert compared.explained == answer.explained


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_closes_on_every_target(name: str, module: Several, x: Tensor) -> None:
    explainer = lrp.Explainer(captured(module, x), composite="auto", dtype=F64)
    ledger = explainer.explain(x, CASES[name][0]).ledger
    assert ledger is not None
    torch.testing.assert_close(ledger.input + ledger.kept, ledger.score, rtol=1e-9, atol=1e-11)


def test_a_linear_network_for_a_regions_mean_is_the_closed_form(x: Tensor) -> None:
    layer = nn.Conv2d(3, 4, 1, bias=False).double()
    explainer = lrp.Explainer(layer, composite="EpsilonPlus", rules={"*": lrp.LRP0()}, dtype=F64, example=x)
    answer = explainer.explain(x, Output(channel=2, region=Box(1, 4, 5, 9), reduce="mean"))
    expected = torch.zeros_like(x)
    weights = layer.weight.detach()[2].reshape(1, 3, 1, 1)
    expected[:, :, 1:5, 4:9] = x[:, :, 1:5, 4:9] * weights / 20
    torch.testing.assert_close(answer.relevance, expected, rtol=1e-12, atol=1e-14)
    assert "rows 1 to 4 and columns 4 to 8" in answer.explained[0][0].text


def test_a_cosine_is_that_of_the_angle_to_an_images_output(
    explainer: lrp.Explainer, module: Several, x: Tensor
) -> None:
    other = torch.randn(1, 3, *IMAGE, dtype=F64)
    embedding, reference = module(x)["embedding"].detach(), module(other)["embedding"].detach()
    by_image = explainer.explain(x, Output("embedding", reduce="cosine", like=other))
    by_values = explainer.explain(x, Output("embedding", reduce="cosine", like=reference))
    torch.testing.assert_close(by_image.score, F.cosine_similarity(embedding, reference))
    torch.testing.assert_close(by_image.relevance, by_values.relevance, rtol=1e-9, atol=1e-12)
    # The norms are held constant: the relevance is that of a dot product, scaled.
    dot = explainer.explain(x, Output("embedding", like=reference))
    scale = (reference.norm() * embedding.norm(dim=1)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(by_image.relevance, dot.relevance / scale, rtol=1e-9, atol=1e-12)


def test_a_detector_is_explained_by_its_scores_though_its_boxes_come_first(
    module: Several, x: Tensor
) -> None:
    class Detector(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            rows = module(x)["rows"]
            return {"boxes": rows[..., :4], "scores": rows[..., 4:].repeat(1, 1, 2)}

    explained = lrp.Explainer(captured(Detector(), x), dtype=F64).explain(x).explained
    assert [one.output for row in explained for one in row] == ["scores"] * len(x)


def test_several_targets_are_each_their_own_and_cost_one_forward(
    explainer: lrp.Explainer, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [Output("out", channel=1), Output("embedding", reduce="norm"), Output("rows", index=(3, 1))]
    alone = [explainer.explain(x, target) for target in targets]
    runs = 0
    run = torch.fx.Interpreter.run

    def counted(self: torch.fx.Interpreter, *args: Tensor, **options: object) -> object:
        nonlocal runs
        runs += 1
        return run(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.fx.Interpreter, "run", counted)
    together = explainer.explain(x, targets)
    assert runs == 1
    assert together.relevance.shape == (2, 3, 3, *IMAGE)
    for i, one in enumerate(alone):
        assert torch.equal(together.relevance[:, i], one.relevance)
        assert torch.equal(together.score[:, i], one.score)
        assert [row[i] for row in together.explained] == [row[0] for row in one.explained]


def test_without_a_target_the_class_that_wins_most_is_summed_where_it_wins(
    explainer: lrp.Explainer, module: Several, x: Tensor
) -> None:
    answer, out = explainer.explain(x), module(x)["out"].detach()
    for i, winning in enumerate(out.argmax(1)):
        best = int(winning.flatten().bincount().argmax())
        torch.testing.assert_close(answer.score[i], out[i, best][winning == best].sum())
        (explained,) = answer.explained[i]
        assert (explained.output, explained.channel) == ("out", best)
        assert explained.places == int((winning == best).sum())
        assert "where it wins" in explained.text
    best = answer.explained[0][0].channel
    torch.testing.assert_close(explainer.explain(x[:1], best).relevance, answer.relevance[:1])
    assert explainer.explain(x, Output("embedding")).explained[0][0].text == "the norm of 'embedding'"
    assert explainer.explain(x, Output("rows")).explained[0][0].reduce == "max"


@pytest.mark.parametrize("name", ["sigmoid", "logsigmoid", "softmax", "log_softmax"])
@pytest.mark.parametrize("flat", [False, True])
def test_classes_are_explained_before_what_makes_probabilities_of_them(
    name: str, flat: bool, x: Tensor
) -> None:
    """Behind a sigmoid every score is positive: what speaks against an absent class would speak for it."""

    class Ends(nn.Module):
        def __init__(self, end: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.end = nn.Conv2d(3, 4, IMAGE), end

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) if flat else self.conv(x).flatten(1)
            if self.end:
                y = getattr(F, name)(y, 1) if "softmax" in name else getattr(F, name)(y)
            return y.flatten(1)

    plain, ending = (
        lrp.Explainer(Ends(end).double(), dtype=F64, example=x).explain(x, [[0, 1, 2, 3]] * len(x))
        for end in (False, True)
    )
    assert bool((plain.score < 0).any())
    torch.testing.assert_close(ending.score, plain.score)
    torch.testing.assert_close(ending.relevance, plain.relevance)
    assert "(before the final " in ending.explained[0][0].text


def test_a_single_channel_wins_where_it_is_positive(x: Tensor) -> None:
    layer = nn.Conv2d(3, 1, 1).double()
    explainer = lrp.Explainer(nn.Sequential(layer, nn.Sigmoid()), dtype=F64, example=x)
    y = layer(x).detach()
    answer = explainer.explain(x)
    torch.testing.assert_close(answer.score, y.clamp(min=0).sum((1, 2, 3)))
    assert "before the final sigmoid" in answer.explained[0][0].text
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias -= 100
    nowhere = lrp.Explainer(layer, dtype=F64, example=x).explain(x)
    torch.testing.assert_close(nowhere.score, layer(x).detach().sum((1, 2, 3)))
    assert "positive at none" in nowhere.explained[0][0].text


def test_a_softmax_over_a_maps_channels_is_left_out_and_said(
    explainer: lrp.Explainer, module: Several, x: Tensor
) -> None:
    answer = explainer.explain(x, Output("aux", channel=1))
    logits = module.classes(module.stem(x)).detach()
    torch.testing.assert_close(answer.score, logits[:, 1].sum((1, 2)))
    assert "before the final softmax" in answer.explained[0][0].text
    assert any("'aux' before the final softmax" in note for note in explainer.notes)
    torch.testing.assert_close(explainer.outputs(x)["aux"], logits)


def test_a_mask_in_pixels_covers_the_places_that_it_stands_over(explainer: lrp.Explainer, x: Tensor) -> None:
    mask = torch.zeros(IMAGE)
    mask[2:4, 4:8] = 1
    for region in (mask, Box(2, 4, 4, 8)):
        answer = explainer.explain(x, Output("aux", channel=1, region=region))
        torch.testing.assert_close(answer.score, explainer.outputs(x)["aux"][:, 1, 1, 2:4].sum(1))
    narrow = explainer.explain(x, Output("aux", channel=1, region=Box(3, 5, 4, 6)))  # touches one place
    assert narrow.explained[0][0].places == 1


def test_layers_can_be_watched_and_passed_on_the_way_from_an_output(
    explainer: lrp.Explainer, x: Tensor
) -> None:
    target = Output("out", channel=1)
    answer = explainer.explain(x, target, at="stem.2")
    assert torch.equal(answer.relevance, explainer.explain(x, target).relevance)
    parts = [explainer.explain(x, target, through={"stem.2": [c]}).relevance for c in range(6)]
    torch.testing.assert_close(sum(parts), answer.relevance, rtol=1e-9, atol=1e-11)
    with pytest.raises(BadLayer, match="no part of what makes 'out'"):
        explainer.explain(x, target, at="embed")


def test_integrated_gradients_of_a_norm_is_complete(explainer: lrp.Explainer, x: Tensor) -> None:
    target = Output("embedding", reduce="norm")
    answer = explainer.attribute(x, target, "IntegratedGradients", n_steps=200)
    base = explainer.explain(torch.zeros_like(x), target).score
    torch.testing.assert_close(answer.relevance.sum((1, 2, 3)), answer.score - base, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Output("nothing"), "'out' .*'aux' .*'rows' .*'embedding'"),
        (Output(4), "There is no output 4"),
        (Output("out", index=(4, 0, 0)), "0 to 3, 0 to 11, 0 to 15"),
        (Output("out", index=(1, 2)), "takes 3 whole numbers"),
        (Output("embedding", index=7), "0 to 6"),
        (Output("embedding", index=1.5), "whole numbers"),  # type: ignore[arg-type]
        (Output("out", index=(0, 0, 0), channel=1), "leave channel"),
        (Output("out", channel=4), "0 to 3"),
        (Output("embedding", channel=7), "0 to 6"),
        (Output("embedding", index=1, reduce="norm"), "leave reduce out"),
        (Output("embedding", region=Box(0, 0, 1, 1)), "no channels and places"),
        (Output("rows", region=Box(0, 0, 1, 1)), "rows and columns"),
        (Output("out", region=Box(0, 0, 13, 4)), "12 rows and 16 columns"),
        (Output("out", region=Box(3, 3, 3, 4)), "empty"),
        (Output("out", region="there"), "'wins'"),
        (Output("out", region=torch.zeros(12, 16)), "no place"),
        (Output("out", region=torch.ones(5, 5)), r"\[12, 16\]"),
        (Output("out", region=torch.full((12, 16), torch.nan)), "NaN"),
        (Output("out", region=torch.arange(192).reshape(12, 16) - 95.5, reduce="mean"), "add up to 0"),
        (Output("out", reduce="median"), "sum, mean, max, norm, cosine"),
        (Output("embedding", reduce="cosine"), "needs something to compare"),
        (Output("embedding", reduce="max", like=VECTOR), "no max"),
        (Output("embedding", like=[1.0, 2.0]), r"\[2\]"),
        (Output("out", channel=1, axis=4), "1 to 3"),
        (lrp.Contrast(0, 1), "no class scores"),
        ([0, 1], "no class scores"),
        (9, "Channel 9 does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_there_is(
    target: object, words: str, explainer: lrp.Explainer, x: Tensor
) -> None:
    with pytest.raises(BadTarget, match=words):
        explainer.explain(x, target)  # type: ignore[arg-type]


def test_a_class_that_wins_nowhere_is_refused_with_those_that_do(x: Tensor) -> None:
    layer = nn.Conv2d(3, 3, 1).double()
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias[1] = 100
    explainer = lrp.Explainer(layer, dtype=F64, example=x)
    with pytest.raises(BadTarget, match=r"Channel 2 .* wins nowhere .* 1 \(192 places\)"):
        explainer.explain(x, 2)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, (y > 0).to(x.dtype)


def test_an_output_that_no_relevance_leaves_is_refused() -> None:
    x = torch.randn(1, 3, 4, 4)
    explainer = lrp.Explainer(Gate(), example=x)
    with pytest.raises(BadTarget, match="No relevance passes"):
        explainer.explain(x, Output(1, channel=0))


def test_a_function_of_an_output_in_its_own_shape(explainer: lrp.Explainer, x: Tensor) -> None:
    answer = explainer.explain(x, lambda out: out[:, 1, 3, 5])
    torch.testing.assert_close(
        answer.relevance, explainer.explain(x, Output("out", index=(1, 3, 5))).relevance
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_seeds_times_values_add_up_to_what_is_explained(data: st.DataObject) -> None:
    """Whatever the values: zeros, ties, huge and tiny ones."""
    number = st.one_of(st.just(0.0), st.floats(-1e6, 1e6), st.floats(-1e-6, 1e-6))
    rows = data.draw(st.lists(st.lists(number, min_size=4, max_size=4), min_size=1, max_size=3))
    values = torch.tensor(rows, dtype=F64)
    mask = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=4, max_size=4)), dtype=F64
    )
    weights = (mask if bool(mask.any()) else torch.ones(4, dtype=F64)).expand(values.shape)
    for reduction in REDUCTIONS.values():
        seed = reduction.seed(values, weights)
        assert bool(seed.isfinite().all())
        assert not bool(seed[weights == 0].any())
        torch.testing.assert_close(
            (seed * values).sum(1), reduction.value(values, weights), rtol=1e-9, atol=1e-12
        )
