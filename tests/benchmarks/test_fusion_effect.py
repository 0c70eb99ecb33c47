"""The benchmark of fusion's effect: its networks are what they say, its treatments differ in what they say, its weights
and tables are kept rightly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusion
from benchmarks import datasets
from benchmarks.datasets import Images
from benchmarks.fusion_effect import EPSILON, REMEDIES, composites, markdown, measure, summarize
from benchmarks.metrics import Flipping
from benchmarks.placements import PLACEMENTS, TRAINING, Placement, Training, build, trained, unseen
from benchmarks.sections import write_section
from benchmarks.treatments import FUSED, OMIT, TREATMENTS, cell, heatmaps, qualities
from tests.nets import calibrated

TINY = Placement("tiny", "mnist", (3,), (8,), convolution="behind", linear="before")
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


@pytest.fixture(scope="module")
def images() -> Images:
    """Two classes that an untrained network cannot tell apart: a bar above, or a bar below."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (600,), generator=generator)
    x = torch.randint(0, 60, (600, 1, 8, 8), generator=generator, dtype=torch.uint8)
    rows = torch.where(y == 0, 1, 6)
    x[torch.arange(600), 0, rows] = 250
    return Images(x[:400], y[:400], x[400:], y[400:], mean=(0.1307,), std=(0.3081,))


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)
def test_batch_norms_stand_where_the_placement_says_and_all_fold(placement: Placement) -> None:
    shape = SHAPES[placement.dataset]
    module = calibrated(build(placement, shape), shape)
    names = [type(layer).__name__ for layer in module.modules()]
    for norm, layer, where in (
        ("BatchNorm2d", "Conv2d", placement.convolution),
        ("BatchNorm1d", "Linear", placement.linear),
    ):
        places = [i for i, name in enumerate(names) if name == norm]
        hidden = names.count(layer) - (layer == "Linear")
        assert len(places) == (hidden if where != "none" else 0)
        assert {names[i - 1] for i in places} <= ({layer} if where == "before" else {"ReLU"})
    x = torch.randn(2, *shape)
    fused = fusion.fuse(fusion.capture(module, (x,)))
    assert not any("batch_norm" in str(node.target) for node in fused.network.graph.nodes)
    assert placement.normalizes == bool(fused.report.rows)


def test_biases_that_are_left_out_keep_nothing() -> None:
    module = calibrated(build(TINY, (1, 8, 8)), (1, 8, 8)).double()
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    network = fusion.capture(module, (x[:2],))
    target = module(x).argmax(1)
    absorbed, omitted = (heatmaps(t.explainer(network, EPSILON), x, target) for t in (FUSED, OMIT))
    assert float(absorbed.kept_magnitude.min()) > 1e-2
    # The stabilizer keeps a millionth of an output's relevance, more where the output without bias is small.
    assert float(omitted.kept_magnitude.median()) < 1e-4
    torch.testing.assert_close(absorbed.kept, torch.stack(list(absorbed.kept_by_layer.values())).sum(0))
    # What is not kept arrives.
    scores = module(x).gather(1, target[:, None])[:, 0].detach()
    torch.testing.assert_close(absorbed.heat.sum((1, 2)), scores * (1 - absorbed.kept))


def test_every_treatment_gives_a_map_of_its_own_but_epsilon_where_all_rules_are() -> None:
    module = calibrated(build(TINY, (1, 8, 8)), (1, 8, 8)).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    network = fusion.capture(module, (x[:2],))
    for composite in composites(TINY):
        maps = {
            t.name: heatmaps(t.explainer(network, composite), x, torch.tensor([1, 2, 3, 4])).heat
            for t in (*TREATMENTS, *REMEDIES)
        }
        alike = [
            {one, other}
            for one in maps
            for other in maps
            if one < other and float((maps[one] - maps[other]).abs().max() / maps[one].abs().max()) < 1e-3
        ]
        assert alike == ([{"epsilon", "fused"}] if composite is EPSILON else [])


def test_weights_are_kept_and_others_are_not_taken_for_them(images: Images, tmp_path: Path) -> None:
    training = Training(images=400, epochs=1)
    first = trained(TINY, images, training, tmp_path)
    again = trained(TINY, images, training, tmp_path)
    assert first.seconds > 0
    assert again.seconds == 0
    x = images.normalized(images.test_x)
    assert torch.equal(first.network(x), again.network(x))
    longer = trained(TINY, images, Training(images=400, epochs=2), tmp_path)
    assert longer.seconds > 0
    assert not torch.equal(longer.network(x), first.network(x))


def test_only_images_that_are_named_rightly_are_explained(images: Images) -> None:
    class Guess(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.0]).expand(len(x), 2)

    x, pixels, target = unseen(Guess(), images, 20)
    assert len(x) == 20
    assert target.tolist() == [0] * 20
    torch.testing.assert_close(x, images.normalized(pixels))


def test_a_row_and_its_tables(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINING, "mnist", Training(images=400, epochs=12, batch=20))
    monkeypatch.setattr("benchmarks.fusion_effect.FLIPPING", {"mnist": Flipping(patch=2, steps=4, fill=-0.4)})
    row = measure(TINY, images, tmp_path, 40)
    assert row["accuracy"] > 0.95
    fused = row["maps"][0]
    # A bar of 8 of 64 pixels is what the network goes by.
    assert fused["mass"]["low"] > 8 / 64
    assert fused["srg"]["low"] > 0
    document = json.loads(json.dumps({"summary": summarize([row], ["cifar10: x"], 40), "rows": [row]}))
    text = markdown(document)
    assert f"| tiny | {row['accuracy']:.1%} |" in text
    assert "Not measured, for want of data: cifar10: x." in text
    assert f"{fused['srg']['value']:.3f} ±" in text


def test_absent_data_is_said(tmp_path: Path) -> None:
    assert datasets.load("mnist", tmp_path) is None
    command = [sys.executable, "-m", "benchmarks.fusion_effect", "--data", str(tmp_path)]
    answer = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, check=True
    )
    assert "cifar10: no batch norm: not measured" in answer.stdout
    summary = json.loads((tmp_path / "out.json").read_text())["summary"]
    assert (summary["networks"], len(summary["absent"])) == (0, len(PLACEMENTS))


def test_mnist_as_it_is_shared(shared: Path) -> None:
    found = datasets.load("mnist", shared / "data")
    assert found is not None
    assert found.train_x.shape == (60_000, 1, 28, 28)
    assert found.train_y[:1000].unique().tolist() == list(range(10))
    x = found.normalized(found.train_x[:10_000])
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "text.md"
    path.write_text("# Words\n\n<!-- a -->\nold\n<!-- /a -->\n\nmore words\n")
    write_section(path, "a", "new\n")
    write_section(path, "b", "table")
    assert path.read_text() == (
        "# Words\n\n<!-- a -->\nnew\n<!-- /a -->\n\nmore words\n\n<!-- b -->\ntable\n<!-- /b -->\n"
    )


def test_a_difference_below_the_last_digit_is_not_bold() -> None:
    tiny = {"value": 1e-6, "low": 0.9e-6, "high": 1.1e-6, "images": 5}
    large = {"value": 0.2, "low": 0.1, "high": 0.3, "images": 5}
    assert "**" not in cell(tiny, bold=True)
    assert cell(large, bold=True, sign=True) == "**+0.200 ± 0.100**"


def test_qualities_know_a_good_map_from_its_opposite() -> None:
    module = calibrated(build(TINY, (1, 8, 8)), (1, 8, 8)).double()
    x = torch.randn(30, 1, 8, 8, dtype=torch.float64)
    network = fusion.capture(module, (x[:2],))
    target = module(x).argmax(1)
    good = heatmaps(FUSED.explainer(network, EPSILON), x, target)
    flipping, masks = Flipping(patch=2, steps=8), good.heat > 0
    found = qualities(network, x, target, good, flipping, masks)
    assert found["mass"].tolist() == pytest.approx([1.0] * 30)
    assert found["rank"].tolist() == pytest.approx([1.0] * 30)
    assert float(found["srg"].mean()) > 0.05
