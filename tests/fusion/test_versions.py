"""Stored networks of older versions open as they did; those of newer ones, and of none, say what to do.

`stored/version_1` was written by the code of its time: a convolution, a batch norm (folded), ReLU and a linear head.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion
import lrp
from fusion.errors import ArtefactError
from fusion.versions import VERSION, upgrade_graph, upgrade_manifest

STORED = Path(__file__).parent / "stored"
# What the code of the time answered for IMAGES.
IMAGES = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8) / 100 - 1
SCORES = torch.tensor([[-0.8584, -0.1647, 0.1350], [-0.6963, -0.2306, -0.0022]])
RELEVANCE_SUMS = torch.tensor([0.2601, 0.1229])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED / "version_1", tmp_path / "old"))


def rewrite(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_every_older_version_has_a_stored_network_here() -> None:
    assert sorted(path.name for path in STORED.iterdir()) == [f"version_{n}" for n in range(1, VERSION)]


def test_version_1_opens_and_explains_as_it_did(old: Path) -> None:
    network, manifest = fusion.load(old)
    torch.testing.assert_close(network(IMAGES), SCORES, atol=1e-4, rtol=0)
    explanation = lrp.Explainer(network).explain(IMAGES)
    torch.testing.assert_close(explanation.relevance.flatten(1).sum(1), RELEVANCE_SUMS, atol=1e-4, rtol=0)
    assert [(output.name, output.kind) for output in network.outputs] == [("output", "scores")]
    assert manifest["outputs"] == [{"name": "output", "kind": "scores", "shape": [None, 3]}]
    assert manifest["version"] == VERSION


def test_stored_again_it_is_of_today(old: Path, tmp_path: Path) -> None:
    network, manifest = fusion.load(old)
    new = tmp_path / "new"
    new.mkdir()
    fusion.save(network, new, manifest)
    for name in ("graph.json", "manifest.json"):
        assert json.loads((new / name).read_text())["version"] == VERSION
    again, _ = fusion.load(new)
    assert torch.equal(again(IMAGES), network(IMAGES))
    assert again.outputs == network.outputs


@pytest.mark.parametrize("name", ["graph.json", "manifest.json"])
def test_a_newer_version_says_what_to_do(old: Path, name: str) -> None:
    rewrite(old / name, version=VERSION + 1)
    with pytest.raises(ArtefactError, match=f"{name}.*newer Clearfold.*Update Clearfold"):
        fusion.load(old)


@pytest.mark.parametrize("name", ["graph.json", "manifest.json"])
@pytest.mark.parametrize("version", [None, "1", 0, -3, 1.5, True])
def test_no_version_is_damage(old: Path, name: str, version: object) -> None:
    rewrite(old / name, version=version)
    with pytest.raises(ArtefactError, match=f"{name} is damaged.*Upload the network again"):
        fusion.load(old)


@pytest.mark.parametrize("nodes", [[], None, [3], "nodes"])
def test_what_cannot_be_brought_to_today_is_damage(nodes: object) -> None:
    with pytest.raises(ArtefactError, match=r"graph\.json is damaged"):
        upgrade_graph({"version": 1, "nodes": nodes}, "graph.json")


def test_nothing_is_lost_on_the_way() -> None:
    content = {"version": 1, "name": "net", "classes": 10, "own": {"deep": [1]}}
    found = upgrade_manifest(content, "manifest.json")
    assert {**found, **content, "version": VERSION} == found
    assert content == {"version": 1, "name": "net", "classes": 10, "own": {"deep": [1]}}
    assert upgrade_manifest(found, "manifest.json") == found
