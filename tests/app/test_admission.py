"""What is taken over from the folder of a conversion: plain files of their own, and a whole artefact."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app import admission
from app.admission import NotAdmitted, TooLarge
from fusion.errors import NonFiniteWeights
from models.convert import convert

GIB = 2**30


@pytest.fixture(scope="module")
def converted(onnx_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "scratch"
    convert(onnx_file, folder)
    return folder


@pytest.fixture
def scratch(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "scratch"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "artefact"


def test_an_artefact_is_moved_and_nothing_else(scratch: Path, target: Path) -> None:
    (scratch / "temporary").write_text("left behind")
    manifest = admission.artefact(scratch, target, GIB)
    assert manifest["format"] == "onnx"
    assert sorted(os.listdir(target)) == ["graph.json", "manifest.json", "weights.safetensors"]
    assert os.listdir(scratch) == ["temporary"]


NAMES = ["graph.json", "manifest.json", "weights.safetensors"]


@pytest.mark.parametrize("name", NAMES)
class TestFiles:
    def test_a_link_is_not_followed(self, scratch: Path, target: Path, name: str, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        (scratch / name).rename(secret)
        (scratch / name).symlink_to(secret)
        with pytest.raises(NotAdmitted, match=rf"{name} is no plain file"):
            admission.artefact(scratch, target, GIB)

    def test_a_second_name_of_another_file(
        self, scratch: Path, target: Path, name: str, tmp_path: Path
    ) -> None:
        os.link(scratch / name, tmp_path / "other")
        with pytest.raises(NotAdmitted, match=rf"{name} is no plain file"):
            admission.artefact(scratch, target, GIB)

    def test_a_pipe_does_not_keep_anybody_waiting(self, scratch: Path, target: Path, name: str) -> None:
        (scratch / name).unlink()
        os.mkfifo(scratch / name)
        with pytest.raises(NotAdmitted, match=rf"{name} is no plain file"):
            admission.artefact(scratch, target, GIB)

    def test_a_file_that_is_missing(self, scratch: Path, target: Path, name: str) -> None:
        (scratch / name).unlink()
        with pytest.raises(NotAdmitted, match=rf"no {name} behind"):
            admission.artefact(scratch, target, GIB)

    def test_a_file_that_is_too_large(self, scratch: Path, target: Path, name: str) -> None:
        os.truncate(scratch / name, GIB)  # with a hole: it takes no room
        with pytest.raises(NotAdmitted, match=rf"{name} has {GIB} bytes"):
            admission.artefact(scratch, target, GIB - 1)


def test_a_folder_that_is_a_link(scratch: Path, target: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(scratch)
    with pytest.raises(OSError, match=r"link|Not a directory"):
        admission.artefact(link, target, GIB)


def change(folder: Path, name: str, how: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    how(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "how",
    [
        lambda manifest: manifest.pop("input"),
        lambda manifest: manifest["input"].update(size=[0, -1]),
        lambda manifest: manifest["input"].update(channels=1, mean=[0.5], std=[0.5], order="L"),
        lambda manifest: manifest["input"].update(size=[33, 32]),
        lambda manifest: manifest["outputs"][0].update(name="another"),
        lambda manifest: manifest["outputs"][0].update(shape=[None, 7]),
        lambda manifest: manifest.update(classes=7),
        lambda manifest: manifest.update(classes="5"),
        lambda manifest: manifest.update(labels=["one", "two"]),
        lambda manifest: manifest.update(name=["a", "list"]),
        lambda manifest: manifest.update(name="x" * 2000),
        lambda manifest: manifest.update(notes={"a": "mapping"}),
        lambda manifest: manifest.update(notes=["x" * 5000]),
        lambda manifest: manifest.update(labels=["x" * 5000] * 5),
        lambda manifest: manifest["fusion"].update(rows="none"),
        lambda manifest: manifest["certificate"].update(max_relative="small"),
    ],
)
def test_a_manifest_that_makes_no_sense(
    scratch: Path, target: Path, how: Callable[[dict[str, Any]], object]
) -> None:
    change(scratch, "manifest.json", how)
    with pytest.raises(NotAdmitted, match="manifest"):
        admission.artefact(scratch, target, GIB)


def test_an_operator_off_the_list(scratch: Path, target: Path) -> None:
    def save(graph: dict[str, Any]) -> None:
        next(node for node in graph["nodes"] if node["op"] == "call_function")["target"] = "aten.save.default"

    change(scratch, "graph.json", save)
    with pytest.raises(NotAdmitted, match=r"aten\.save"):
        admission.artefact(scratch, target, GIB)


def test_weights_that_are_not_finite(scratch: Path, target: Path) -> None:
    weights = load_file(scratch / "weights.safetensors")
    name = next(name for name, t in weights.items() if t.is_floating_point())
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, scratch / "weights.safetensors")
    with pytest.raises(NonFiniteWeights, match=name):
        admission.artefact(scratch, target, GIB)


def test_a_network_whose_values_need_more_memory_than_there_is(scratch: Path, target: Path) -> None:
    def fill(graph: dict[str, Any]) -> None:
        image = {"node": graph["nodes"][0]["name"]}
        arguments = [image, [2**20, 2**15]]
        graph["nodes"].insert(
            -1,
            {
                "name": "fill",
                "op": "call_function",
                "target": "aten.new_zeros.default",
                "args": arguments,
                "shape": [2**20, 2**15],
                "dtype": "float32",
            },
        )

    change(scratch, "graph.json", fill)
    with pytest.raises(TooLarge, match="128 GiB"):
        admission.artefact(scratch, target, GIB)
