"""The conversion process that waits for a file: it does what one started for the file does, and dies as well."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from app.conversion import ConversionFailed, Converter, Request
from app.spare import Spare
from models.store import Store
from tests.support.served import CLASSES, eventually


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def converter(store: Store) -> Iterator[Converter]:
    made = Converter(workspace=store.workspace)
    yield made
    made.close()


def process(converter: Converter) -> "subprocess.Popen[bytes]":
    """The process that waits."""
    assert isinstance(converter._spare, Spare)
    assert converter._spare._waiting is not None
    return converter._spare._waiting.child.process


def waiting(converter: Converter) -> int:
    return process(converter).pid


def workspaces(store: Store) -> list[Path]:
    return list((store.root / "tmp").iterdir())


def test_the_same_artefact_from_the_process_that_waited(
    converter: Converter, onnx_file: Path, tmp_path: Path
) -> None:
    converter.prepare()
    first = waiting(converter)
    made = []
    for folder in (tmp_path / "waited", tmp_path / "started"):
        folder.mkdir()
        stages: list[str] = []
        by = converter if folder.name == "waited" else Converter()
        manifest = by.run(Request(onnx_file, name="net"), folder, stages.append)
        assert stages == ["opening", "fusing", "certifying", "writing"]
        weights = (folder / "artefact" / "weights.safetensors").read_bytes()
        made.append(({**manifest, "created": None}, weights))
    assert made[0] == made[1]
    assert not Path(f"/proc/{first}").exists()
    assert waiting(converter) != first  # the next one


def test_data_files_are_put_before_it_too(converter: Converter, split_file: Path, tmp_path: Path) -> None:
    """In a folder of their own, if that is their place."""
    (tmp_path / "in").mkdir()
    network = onnx.load(split_file)
    file = tmp_path / "net.onnx"
    onnx.save(network, file, save_as_external_data=True, location="in/net.bin", size_threshold=0)
    converter.prepare()
    first = waiting(converter)
    folder = tmp_path / "work"
    folder.mkdir()
    assert converter.run(Request(file, data=("in/net.bin",)), folder)["classes"] == CLASSES
    assert waiting(converter) != first


def test_a_bad_file_has_the_same_error_and_the_next_one_waits(
    converter: Converter, store: Store, tmp_path: Path
) -> None:
    bad, folder = tmp_path / "bad.onnx", tmp_path / "work"
    bad.write_bytes(b"\x08\x08 nothing of the kind")
    folder.mkdir()
    converter.prepare()
    with pytest.raises(ConversionFailed) as waited:
        converter.run(Request(bad), folder)
    with pytest.raises(ConversionFailed) as started:
        Converter().run(Request(bad), folder)
    assert (waited.value.code, str(waited.value)) == (started.value.code, str(started.value))
    assert len(workspaces(store)) == 1  # that of the next


def test_one_that_has_died_meanwhile_is_replaced(
    converter: Converter, onnx_file: Path, tmp_path: Path
) -> None:
    converter.prepare()
    os.kill(waiting(converter), 9)
    time.sleep(0.2)
    assert converter.run(Request(onnx_file), tmp_path)["format"] == "onnx"


def test_it_ends_with_its_server(converter: Converter, store: Store) -> None:
    converter.prepare()
    pid = waiting(converter)
    converter.close()
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert workspaces(store) == []
    converter.prepare()  # too late
    assert workspaces(store) == []


def test_it_sees_nothing_but_what_is_given_to_it(converter: Converter, store: Store) -> None:
    """Its profile names its own inbox, whatever file comes."""
    converter.prepare()
    command = process(converter).args
    assert isinstance(command, list)
    (folder,) = workspaces(store)
    assert [command[i + 1] for i, word in enumerate(command) if word == "--read"] == [str(folder / "inbox")]
    assert [command[i + 1] for i, word in enumerate(command) if word == "--write"] == [
        str(folder / "scratch")
    ]
