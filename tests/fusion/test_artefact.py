"""The stored form: the same network back, nothing from outside run, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fusion
from fusion.errors import ArtefactError, NonFiniteWeights, UnsupportedOperator
from tests.nets import FAMILIES, bottleneck, family


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    network = fusion.fuse(fusion.capture(bottleneck(), (torch.randn(1, 3, 16, 16),))).network
    fusion.save(network, tmp_path, {"name": "small"})
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stored_network_computes_bitwise_the_same(name: str, tmp_path: Path) -> None:
    network = fusion.fuse(fusion.capture(family(name), (torch.randn(1, 3, 64, 64),))).network
    fusion.save(network, tmp_path, {"name": name})
    loaded, manifest = fusion.load(tmp_path)
    x = torch.randn(3, 3, 64, 64)
    assert torch.equal(loaded(x), network(x))
    assert manifest["name"] == name
    assert loaded.inputs == network.inputs
    assert loaded.outputs == network.outputs
    assert [info.layer for info in loaded.layers()] == [info.layer for info in network.layers()]


def test_the_three_files_are_plain(stored: Path) -> None:
    assert sorted(p.name for p in stored.iterdir()) == ["graph.json", "manifest.json", "weights.safetensors"]
    nodes = json.loads((stored / "graph.json").read_text())["nodes"]
    assert {node["op"] for node in nodes} == {"placeholder", "get_attr", "call_function", "output"}


@pytest.mark.parametrize(
    "target",
    [
        "builtins.eval",
        "os.system",
        "aten.save.default",
        "aten.relu_.default",
        "aten.from_file.default",
        "operator.setitem",
    ],
)
def test_operators_off_the_list_do_not_load(stored: Path, target: str) -> None:
    graph = json.loads((stored / "graph.json").read_text())
    next(node for node in graph["nodes"] if node["op"] == "call_function")["target"] = target
    (stored / "graph.json").write_text(json.dumps(graph))
    with pytest.raises(ArtefactError, match=target):
        fusion.load(stored)


@pytest.mark.parametrize("name", ["graph.json", "manifest.json", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damage_is_named(stored: Path, name: str, damage: str) -> None:
    path = stored / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(ArtefactError, match=name):
        fusion.load(stored)


def test_another_version_says_what_to_do(stored: Path) -> None:
    manifest = json.loads((stored / "manifest.json").read_text())
    (stored / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ArtefactError, match="Upload the network again"):
        fusion.load(stored)


def test_weights_with_nan_do_not_load(stored: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(stored / "weights.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, stored / "weights.safetensors")
    with pytest.raises(NonFiniteWeights):
        fusion.load(stored)


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_operators_off_the_list_are_not_stored(tmp_path: Path) -> None:
    network = fusion.capture(Random(), (torch.randn(1, 3),))
    with pytest.raises(UnsupportedOperator, match="rand_like"):
        fusion.save(network, tmp_path, {})
