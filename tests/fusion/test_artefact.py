"""The stored form: the same network back, nothing from outside run, damage named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fusion
from fusion.errors import ArtefactError, NonFiniteWeights, UnsupportedOperator
from fusion.footprint import footprint
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


class TestNamesAreNoCode:
    """A network runs as a module whose source is written from its graph; names must not get to say anything there."""

    CODE = 'x", 0) is open("{file}", "w") or getattr(self, "y'

    def test_a_constant_may_be_called_anything(self, stored: Path, tmp_path: Path) -> None:
        before, _ = fusion.load(stored)
        witness = tmp_path / "witness"
        names = [self.CODE.format(file=witness), "class", "a b", "café", "x\n"]
        weights = load_file(stored / "weights.safetensors")
        graph = (stored / "graph.json").read_text()
        for old, new in zip(list(weights), names, strict=False):
            weights[new] = weights.pop(old)
            graph = graph.replace(f'"target": "{old}"', f'"target": {json.dumps(new)}')
        save_file(weights, stored / "weights.safetensors")
        (stored / "graph.json").write_text(graph)
        after, _ = fusion.load(stored)
        assert set(names) <= set(after.constants)
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(after(x), before(x))
        assert not witness.exists()

    def test_an_input_or_an_argument_may_not(self, stored: Path, tmp_path: Path) -> None:
        witness = tmp_path / "witness"
        graph = json.loads((stored / "graph.json").read_text())
        for place in ("name", "keyword"):
            changed = json.loads(json.dumps(graph))
            if place == "name":
                changed["nodes"][0]["name"] = f"x=open({str(witness)!r}, 'w')"
            else:
                call = next(node for node in changed["nodes"] if node["op"] == "call_function")
                call["kwargs"] = {f"**{{str(open({str(witness)!r}, 'w')): 0}}, x": 0}
            (stored / "graph.json").write_text(json.dumps(changed))
            with pytest.raises(ArtefactError, match=r"graph\.json is damaged"):
                fusion.load(stored)
        assert not witness.exists()


@pytest.mark.parametrize("name", ["graph.json", "manifest.json"])
def test_json_without_an_end_to_its_depth_is_damage(stored: Path, name: str) -> None:
    (stored / name).write_text("[" * 10**6)
    with pytest.raises(ArtefactError, match=name):
        fusion.load(stored)


class TestFootprint:
    def test_it_counts_every_value_once(self) -> None:
        network = fusion.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval(), (torch.zeros(2, 4),))
        assert footprint(network) == 4 * (4 + 8 + 8)

    def test_what_a_small_file_would_take(self, stored: Path) -> None:
        """A graph that fills 4 TiB is measured, not run."""
        change(stored, "aten.new_zeros.default", [[2**20, 2**20]], [2**20, 2**20])
        assert footprint(fusion.load(stored)[0]) > 2**42

    @pytest.mark.parametrize(
        ("target", "arguments"),
        [
            ("aten.conv2d.default", []),
            ("aten.new_zeros.default", [[2**62, 2**62]]),
            ("operator.mul", [2**200]),
        ],
    )
    def test_a_graph_that_does_not_run(self, stored: Path, target: str, arguments: list[object]) -> None:
        change(stored, target, arguments)
        with pytest.raises(ArtefactError, match=r"does not run|no tensor has"):
            footprint(fusion.load(stored)[0])

    @pytest.mark.parametrize(
        ("key", "value"), [("shape", [None, 7]), ("shape", [None]), ("dtype", "float64")]
    )
    def test_shapes_that_are_not_those_of_the_values(self, stored: Path, key: str, value: object) -> None:
        graph = json.loads((stored / "graph.json").read_text())
        graph["nodes"][-2][key] = value
        (stored / "graph.json").write_text(json.dumps(graph))
        with pytest.raises(ArtefactError, match="as stored"):
            footprint(fusion.load(stored)[0])


def change(folder: Path, target: str, arguments: list[object], shape: list[int] | None = None) -> None:
    """Put a call in front of the output, on the input (on a number, for arithmetic)."""
    graph = json.loads((folder / "graph.json").read_text())
    first = 2**10 if target.startswith("operator.") else {"node": graph["nodes"][0]["name"]}
    call = {"name": "more", "op": "call_function", "target": target, "args": [first, *arguments]}
    if shape is not None:
        call |= {"shape": shape, "dtype": "float32"}
    graph["nodes"].insert(-1, call)
    (folder / "graph.json").write_text(json.dumps(graph))
