"""The conversion process: what it makes of good files, of bad ones, and of those that take it down."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import fusion
from app.conversion import ConversionFailed, Converter, Request
from models.beside import identity
from tests.support import hostile
from tests.support.confined import *  # noqa: F403 (the fixtures for systems without a layer)
from tests.support.served import CLASSES, SIZE, tiny_network

Convert = Callable[..., dict[str, object]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    return made


def data_of(network: Path) -> Path:
    return network.with_name(f"{network.name}.data")


def failure(source: Path | str, folder: Path, **options: object) -> ConversionFailed:
    with pytest.raises(ConversionFailed) as caught:
        Converter().run(Request(source, **options), folder)  # type: ignore[arg-type]
    return caught.value


class TestGoodFiles:
    def test_an_onnx_file_becomes_a_certified_artefact(self, onnx_file: Path, folder: Path) -> None:
        stages: list[str] = []
        manifest = Converter().run(Request(onnx_file), folder, stages.append)
        assert stages == ["opening", "fusing", "certifying", "writing"]
        network, stored = fusion.load(folder / "artefact")
        assert stored == manifest
        assert (manifest["name"], manifest["format"], manifest["classes"]) == ("tiny", "onnx", CLASSES)
        assert manifest["fusion"]["folded"] == 2
        assert manifest["certificate"]["inputs"] >= 8
        assert manifest["certificate"]["max_relative"] < 1e-5
        x = torch.rand(3, 3, SIZE, SIZE)
        with torch.no_grad():
            torch.testing.assert_close(network(x), tiny_network()(x), rtol=1e-5, atol=1e-5)

    def test_data_files_are_let_in_by_name(self, split_file: Path, folder: Path) -> None:
        manifest = Converter().run(Request(split_file, data=("split.onnx.data",)), folder)
        assert manifest["certificate"]["max_relative"] < 1e-5
        hashes = [sha256(file.read_bytes()).hexdigest() for file in (split_file, data_of(split_file))]
        assert manifest["sha256"] == identity(hashes[0], {"split.onnx.data": hashes[1]})

    def test_a_torchscript_file_too(self, torchscript_file: Path, folder: Path) -> None:
        manifest = Converter().run(Request(torchscript_file, size=(SIZE, SIZE)), folder)
        assert manifest["format"] == "torchscript"
        assert manifest["certificate"]["max_relative"] < 1e-5

    def test_what_is_stated_goes_before_what_is_assumed(self, onnx_file: Path, folder: Path) -> None:
        stated = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "order": "BGR"}
        manifest = Converter().run(Request(onnx_file, description=stated, name="my net"), folder)
        assert manifest["name"] == "my net"
        assert {key: manifest["input"][key] for key in stated} == stated
        assert manifest["input"]["size"] == [SIZE, SIZE]

    @pytest.mark.slow
    def test_a_zoo_network_from_its_cache(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        zoo = pytest.importorskip("torchvision").models
        checkpoints = tmp_path / "cache" / "hub" / "checkpoints"
        checkpoints.mkdir(parents=True)
        file = zoo.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
        torch.save(zoo.squeezenet1_1().state_dict(), checkpoints / file)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        manifest = Converter(seconds=500).run(Request("torchvision:squeezenet1_1"), folder)
        assert (manifest["format"], manifest["classes"]) == ("torchvision", 1000)

    def test_a_zoo_network_without_its_weights(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("torchvision")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody is there
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        error = failure("torchvision:squeezenet1_1", folder)
        assert error.code == "zoo-unavailable"
        assert "Connection refused" in str(error)  # so it may ask


class TestBadFiles:
    def test_a_wrong_description(self, onnx_file: Path, folder: Path) -> None:
        error = failure(onnx_file, folder, description={"mean": [0.5, 0.5]})
        assert error.code == "bad-input"
        assert "mean" in str(error)

    @pytest.mark.usefixtures("landlock")
    def test_data_files_that_are_not_let_in(self, split_file: Path, folder: Path) -> None:
        error = failure(split_file, folder)
        assert error.code == "bad-file"
        assert "'split.onnx.data', the data of split.onnx, cannot be read: Permission denied" in str(error)

    @pytest.mark.usefixtures("landlock")
    def test_what_is_no_data_file_is_not_even_opened(self, folder: Path, tmp_path: Path) -> None:
        network = tmp_path / "net.onnx"
        network.write_bytes(hostile.external("weights"))
        os.mkfifo(tmp_path / "weights")
        assert "no plain file" in str(failure(network, folder))
        (tmp_path / "weights").unlink()
        (tmp_path / "weights").symlink_to("/etc/passwd")
        assert "no plain file" in str(failure(network, folder))

    @pytest.mark.parametrize("place", ["stderr", "scratch/artefact", "scratch", ".owner"])
    def test_files_of_the_conversions_own(self, folder: Path, place: str) -> None:
        network = folder / "net.onnx"
        network.write_bytes(hostile.external(place))
        (folder / ".owner").touch()
        error = failure(network, folder)
        assert error.code in ("bad-file", "missing-data")

    def test_a_refused_format_is_not_even_opened(self, torchscript_file: Path, folder: Path) -> None:
        error = failure(torchscript_file, folder, refused=("torchscript",))
        assert error.code == "format-refused"
        assert "ONNX" in str(error)


class TestTheProcess:
    def test_it_is_ended_when_its_time_is_up(self, onnx_file: Path, folder: Path) -> None:
        with pytest.raises(ConversionFailed, match=r"longer than 0\.5 seconds") as caught:
            Converter(seconds=0.5).run(Request(onnx_file), folder)
        assert caught.value.code == "conversion-timeout"

    def test_too_little_memory_is_an_answer(self, onnx_file: Path, folder: Path) -> None:
        with pytest.raises(ConversionFailed) as caught:
            Converter(memory=300 * 2**20).run(Request(onnx_file), folder)
        assert caught.value.code in ("conversion-out-of-memory", "conversion-failed")

    @pytest.mark.parametrize(
        ("crime", "code", "word"),
        [
            ("os.kill(os.getpid(), signal.SIGSEGV)", "conversion-failed", "SIGSEGV"),
            ("os.kill(os.getpid(), signal.SIGKILL)", "conversion-out-of-memory", "memory"),
            ("os._exit(3)", "conversion-failed", "exit code 3"),
            ("print('{\"stage\": \"ha', end='')", "conversion-failed", "exit code 0"),
            ("print('[1]', flush=True); signal.pause()", "conversion-failed", "made no sense"),
        ],
    )
    def test_a_child_that_dies_without_a_word(
        self, crime: str, code: str, word: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The crash is a real one; only the program that crashes is another."""
        real = subprocess.Popen

        def criminal(arguments: list[str], **options: object) -> "subprocess.Popen[bytes]":
            return real([sys.executable, "-c", f"import os, signal\n{crime}"], **options)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(subprocess, "Popen", criminal)
        with pytest.raises(ConversionFailed, match=word) as caught:
            Converter().run(Request(folder / "net.onnx"), folder)
        assert caught.value.code == code

    def test_it_sees_no_secrets_and_imports_nothing_from_beside_the_file(
        self, onnx_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        (folder / "torch.py").write_text("raise SystemExit('imported from beside the file')")
        converter = Converter()
        seen: dict[str, str] = {}
        real = subprocess.Popen

        def watching(arguments: list[str], **options: object) -> "subprocess.Popen[bytes]":
            seen.update(options["env"])  # type: ignore[call-overload]
            return real(arguments, **options)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(subprocess, "Popen", watching)
        assert converter.run(Request(onnx_file), folder)["classes"] == CLASSES
        assert "AWS_SECRET_ACCESS_KEY" not in seen

    def test_it_ends_with_the_process_that_started_it(self, onnx_file: Path, folder: Path) -> None:
        child = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "models.worker",
                "--lifeline",
                *("--read", str(onnx_file), "--write", str(folder)),
                *("convert", str(onnx_file), str(folder)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(fusion.__file__).parents[1])},
        )
        assert child.stdin is not None
        assert child.stdout is not None
        assert "confined" in json.loads(child.stdout.readline())
        assert json.loads(child.stdout.readline()) == {"stage": "opening"}
        child.stdin.close()  # as it is when the parent is killed
        start = time.monotonic()
        assert child.wait(timeout=10) == 1
        assert time.monotonic() - start < 5
        child.stdout.close()
        assert not (folder / "manifest.json").exists()
