"""The command line: what it prints, what it writes, and how it fails."""

import json
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import lrp
from app import methods
from app.cli import main
from tests.support.served import SIZE, Branches, Running, picture, save_onnx, tiny_network


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`clearfold ARGUMENTS` in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    picture().save(path)
    return path


class TestStart:
    def test_help_is_quick_and_loads_no_torch(self) -> None:
        code = (
            "import sys\nfrom app.cli import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "print('heavy:', sorted({'torch', 'fastapi', 'numpy', 'onnx'} & set(sys.modules)))"
        )
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "heavy: []" in done.stdout
        assert time.monotonic() - start < 5  # under a second on a machine that does nothing else
        for command in ("serve", "explain", "fuse", "models"):
            assert command in done.stdout

    @pytest.mark.parametrize("command", ["serve", "explain", "fuse", "models"])
    def test_every_command_explains_itself(self, run, command: str) -> None:
        done = run(command, "--help")
        assert done.code == 0
        assert "--help" in done.out


class TestExplain:
    def test_with_the_builtin_network(self, run, image: Path) -> None:
        done = run("explain", image, "--device", "cpu")
        assert done.code == 0, done.err
        assert "Prediction" in done.out
        assert Image.open(image.with_name("cat.heatmap.png")).size == (128, 128)

    def test_with_a_file(self, run, image: Path, onnx_file: Path, tmp_path: Path) -> None:
        target = tmp_path / "out.png"
        done = run(
            "explain",
            image,
            "-m",
            onnx_file,
            "-t",
            3,
            "-c",
            "EpsilonGammaBox",
            "-o",
            target,
            "--overlay",
            "--json",
        )
        assert done.code == 0, done.err
        said = json.loads(done.out)
        assert (said["target"]["index"], said["composite"], said["file"]) == (
            3,
            "EpsilonGammaBox",
            str(target),
        )
        assert Image.open(target).size == (SIZE, SIZE)

    def test_with_a_file_whose_weights_are_beside_it(
        self, run, image: Path, onnx_file: Path, split_file: Path, tmp_path: Path
    ) -> None:
        maps = [tmp_path / "one.png", tmp_path / "two.png"]
        for file, target in zip((onnx_file, split_file), maps, strict=True):
            assert run("explain", image, "-m", file, "-o", target).code == 0
        one, split = (np.asarray(Image.open(target)) for target in maps)
        assert np.array_equal(one, split)

    def test_an_output_of_a_network_without_classes(self, run, image: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        file = save_onnx(torch.nn.Conv2d(3, 4, 3, padding=1).eval(), tmp_path / "maps.onnx")
        done = run("explain", image, "-m", file)
        assert done.code == 0, done.err
        assert "where it wins" in done.out
        assert "Prediction" not in done.out
        target = json.dumps({"channel": 1, "region": {"box": [0, 0, 4, 8]}, "reduce": "mean"})
        said = json.loads(run("explain", image, "-m", file, "-t", target, "--json").out)
        assert (said["prediction"], said["target"]["channel"], said["target"]["places"]) == (None, 1, 32)
        white = tmp_path / "white.png"
        Image.new("L", picture().size, 255).save(white)
        masked = run("explain", image, "-m", file, "-t", '{"channel": 1}', "--mask", white, "--json")
        assert json.loads(masked.out)["target"]["places"] == SIZE * SIZE
        alike = run("explain", image, "-m", file, "--reference", image, "--json")
        assert json.loads(alike.out)["target"]["score"] == pytest.approx(1, rel=1e-4)
        done = run("explain", image, "-m", file, "-t", '{"output": "aux"}')
        assert done.code != 0
        assert "(map, N x 4 x 32 x 32)" in done.err

    def test_with_a_network_of_the_store(self, run, image: Path, data: Path) -> None:
        done = run("explain", image, "-m", "Clearfold objects", "--data", data, "--json")
        assert json.loads(done.out)["model"] == "builtin"

    def test_the_automatic_composite(self, run, image: Path, onnx_file: Path) -> None:
        asked = ["explain", image, "-m", onnx_file, "-c", "auto"]
        said = json.loads(run(*asked, "--json").out)
        assert (said["composite"], said["picked"]) == ("auto", "EpsilonPlusFlatSteady")
        done = run(*asked)
        assert done.code == 0, done.err
        assert said["reason"] in done.out

    def test_an_unknown_composite(self, run, image: Path) -> None:
        done = run("explain", image, "-c", "Magic")
        assert done.code != 0
        assert "auto" in done.err

    def test_a_ledger_that_balances_needs_no_warning(self, run, image: Path, onnx_file: Path) -> None:
        assert "Warning" not in run("explain", image, "-m", onnx_file).err

    @pytest.mark.usefixtures("lossy")
    def test_a_ledger_that_does_not_balance(self, run, image: Path, onnx_file: Path) -> None:
        done = run("explain", image, "-m", onnx_file, "--json")
        assert done.code == 0
        said = json.loads(done.out)
        assert not said["balanced"]
        assert f"Warning: {said['warnings'][0]}" in done.err

    def test_an_output_that_is_no_png(self, run, image: Path, tmp_path: Path) -> None:
        assert run("explain", image, "-o", tmp_path / "missing" / "out.png").code == 2


class TestMethods:
    def test_another_method_with_its_options(self, run, image: Path, onnx_file: Path) -> None:
        asked = ["explain", image, "-m", onnx_file, "--method", "IntegratedGradients", "--set", "n_steps=4"]
        said = json.loads(run(*asked, "--set", "baseline=0.5", "--json").out)
        assert (said["method"], said["composite"], said["sums"]) == ("IntegratedGradients", None, None)
        assert (said["parameters"]["n_steps"], said["parameters"]["baseline"]) == (4, 0.5)
        done = run(*asked)
        assert done.code == 0, done.err
        assert "IntegratedGradients keeps no ledger" in done.out
        assert Image.open(image.with_name("cat.heatmap.png")).size == (SIZE, SIZE)

    def test_the_help_names_them_all(self, run) -> None:
        said = run("explain", "--help").out
        assert all(name in said for name in methods.names())

    def test_grad_cam_at_a_layer(self, run, image: Path, onnx_file: Path) -> None:
        layer = TestInside().convolution(onnx_file)
        done = run("explain", image, "-m", onnx_file, "--method", "GradCAM", "--layer", layer, "--json")
        assert json.loads(done.out)["parameters"]["layer"] == layer
        assert json.loads(done.out)["shape"] == [1, SIZE, SIZE]

    def test_a_parameter_of_a_composite(self, run, image: Path, onnx_file: Path, data: Path) -> None:
        for model in (onnx_file, "builtin"):
            asked = ["explain", image, "-m", model, "--data", data, "-c", "EpsilonGammaBox"]
            plain, changed = (
                json.loads(run(*asked, *more, "--json").out) for more in ([], ["--set", "gamma=2"])
            )
            assert (plain["parameters"]["gamma"], changed["parameters"]["gamma"]) == (0.25, 2)
            assert changed["sum"] != plain["sum"]


class TestInside:
    def test_the_top_channels_of_a_layer(self, run, image: Path, onnx_file: Path) -> None:
        layer = self.convolution(onnx_file)
        asked = ["explain", image, "-m", onnx_file, "--layer", layer, "--top", 3]
        said = json.loads(run(*asked, "--json").out)
        assert (said["inner"]["layer"], said["inner"]["channels"]) == (layer, 12)
        amounts = [entry["relevance"] for entry in said["inner"]["top"]]
        assert len(amounts) == 3
        assert amounts == sorted(amounts, reverse=True)
        done = run(*asked)
        assert done.code == 0, done.err
        for entry in said["inner"]["top"]:
            assert f"channel {entry['channel']} " in done.out
        assert Image.open(image.with_name("cat.heatmap.png")).text["Layer"] == layer  # type: ignore[attr-defined]

    def test_through_channels_and_against_a_class(self, run, image: Path, onnx_file: Path) -> None:
        layer = self.convolution(onnx_file)
        asked = ["explain", image, "-m", onnx_file, "-t", 1, "--against", 4]
        said = json.loads(
            run(
                *asked, "--through", f"{layer}:3,5", "--through", f"{layer}:7", "--layer", layer, "--json"
            ).out
        )
        assert said["through"] == {layer: [3, 5, 7]}
        assert said["against"]["index"] == 4
        assert {e["channel"] for e in said["inner"]["top"] if e["relevance"] != 0} <= {3, 5, 7}
        assert "against class 4" in run(*asked).out
        assert "against all others" in run("explain", image, "-m", onnx_file, "--against", "others").out

    def convolution(self, file: Path) -> str:
        """The last convolution's name: the file decides how its layers are called."""
        names = [layer.name for layer in lrp.Explainer(str(file)).inner_layers() if layer.op == "conv2d"]
        return names[-1]


class TestFuse:
    def test_the_report_and_the_certificate(self, run, onnx_file: Path) -> None:
        done = run("fuse", onnx_file)
        assert done.code == 0, done.err
        assert "batch_norm" in done.out
        assert "2 folded, 0 partly, 0 kept" in done.out
        assert "8 inputs" in done.out

    def test_as_json(self, run, onnx_file: Path) -> None:
        said = json.loads(run("fuse", onnx_file, "--json").out)
        assert [row["outcome"] for row in said["report"]["rows"]] == ["folded", "folded"]
        assert said["certificate"]["max_relative"] < 1e-5

    def test_layers_that_became_one_are_named(self, run, tmp_path: Path) -> None:
        file = save_onnx(Branches().eval(), tmp_path / "branches.onnx")
        assert "Merged into wide, which reads the same values: narrow." in run("fuse", file).out
        said = json.loads(run("fuse", file, "--json").out)
        assert said["report"]["merged"] == [{"layer": "narrow", "into": "wide"}]

    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_written(self, run, onnx_file: Path, tmp_path: Path, suffix: str) -> None:
        target = tmp_path / f"fused{suffix}"
        assert run("fuse", onnx_file, "-o", target, "--size", SIZE).code == 0
        x = torch.rand(2, 3, SIZE, SIZE)
        if suffix == ".onnx":
            session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
            (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        else:
            scores = torch.export.load(target).module()(x).detach().numpy()
        np.testing.assert_allclose(scores, tiny_network()(x).detach().numpy(), rtol=1e-4, atol=1e-5)

    def test_no_other_format(self, run, onnx_file: Path, tmp_path: Path) -> None:
        done = run("fuse", onnx_file, "-o", tmp_path / "fused.h5")
        assert done.code == 2
        assert ".onnx" in done.err


@pytest.mark.usefixtures("quick")
class TestModels:
    def test_add_list_and_remove(self, run, onnx_file: Path, data: Path, tmp_path: Path) -> None:
        labels = tmp_path / "labels.txt"
        labels.write_text("cat\ndog\neel\nfox\ngnu\n")
        added = run(
            "models",
            "add",
            onnx_file,
            "--data",
            data,
            "--name",
            "tiny",
            "--mean",
            "0,0,0",
            "--labels",
            labels,
        )
        assert added.code == 0, added.err
        listed = json.loads(run("models", "--data", data, "--json").out)
        assert [model["name"] for model in listed] == ["Clearfold objects", "tiny"]
        assert listed[1]["labels"] == ["cat", "dog", "eel", "fox", "gnu"]
        assert listed[1]["input"]["mean"] == [0, 0, 0]
        assert added.out.split() == [listed[1]["id"], "tiny"]
        table = run("models", "--data", data).out
        assert "tiny" in table
        assert "2 folded" in table
        assert run("models", "remove", "tiny", "--data", data).code == 0
        assert "tiny" not in run("models", "--data", data).out

    def test_of_a_server(self, run, server: Running, onnx_file: Path) -> None:
        added = run("models", "add", onnx_file, "--url", server.url, "--name", "served")
        assert added.code == 0, added.err
        assert "served" in run("models", "--url", server.url).out
        assert run("models", "remove", "served", "--url", server.url).code == 0
        assert "served" not in run("models", "--url", server.url).out

    def test_weights_in_files_beside_it(self, run, split_file: Path, onnx_file: Path, data: Path) -> None:
        """The id is that of all the files: another one where any of them is another."""
        file = split_file
        ids = [run("models", "add", file, "--data", data).out.split()[0]]
        assert ids[0] != sha256(file.read_bytes()).hexdigest()
        other = data.parent / file.name
        shutil.copy(file, other)
        weights = bytearray(file.with_name("split.onnx.data").read_bytes())
        shutil.copy(file.with_name("split.onnx.data"), data.parent)
        ids += [run("models", "add", other, "--data", data).out.split()[0]]
        weights[3] ^= 1
        (data.parent / "split.onnx.data").write_bytes(weights)
        ids += [run("models", "add", other, "--data", data).out.split()[0]]
        assert ids[0] == ids[1] != ids[2]

    def test_weights_in_files_beside_it_go_to_a_server(
        self, run, server: Running, split_file: Path, data: Path, tmp_path: Path
    ) -> None:
        local = run("models", "add", split_file, "--data", data).out.split()[0]
        sent = run("models", "add", split_file, "--url", server.url)
        assert sent.out.split()[0] == local, sent.err
        assert run("models", "remove", local, "--url", server.url).code == 0
        other = tmp_path / "weights.bin"
        path = tmp_path / "net.onnx"
        onnx.save(
            onnx.load(split_file), path, save_as_external_data=True, location=other.name, size_threshold=0
        )
        refused = run("models", "add", path, "--url", server.url)
        assert (refused.code, "'weights.bin'" in refused.err) == (2, True)
        sent = run("models", "add", path, "--url", server.url, "--weights", other)
        assert sent.code == 0, sent.err
        assert run("models", "remove", sent.out.split()[0], "--url", server.url).code == 0
        needless = run("models", "add", path, "--weights", other, "--data", data)
        assert (needless.code, "--weights" in needless.err) == (2, True)

    def test_weights_that_are_missing(self, run, split_file: Path, tmp_path: Path) -> None:
        shutil.copy(split_file, tmp_path)
        for command in (("models", "add", "--data", tmp_path / "store"), ("fuse",)):
            done = run(*command, tmp_path / split_file.name)
            assert done.code == 2
            assert "'split.onnx.data', which is not beside it" in done.err

    def test_an_empty_store(self, run, tmp_path: Path) -> None:
        done = run("models", "--data", tmp_path / "new")
        assert done.code == 0
        assert "models add" in done.err


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["explain", "/no/such.png"], "No such file"),
            (["explain", "{text}"], "not an image"),
            (["explain", "{image}", "-t", "10"], "0 to 9"),
            (["explain", "{image}", "-m", "nobody", "--data", "{folder}"], "nobody"),
            (["explain", "{image}", "-c", "Magic"], "EpsilonPlusFlat"),
            (["explain", "{image}", "--layer", "layer99"], "layer99"),
            (["explain", "{image}", "--through", "layer99:1"], "layer99"),
            (["explain", "{image}", "--through", "3,5"], "LAYER:CHANNELS"),
            (["explain", "{image}", "-t", "3", "--against", "3"], "two different"),
            (["explain", "{image}", "--cmap", "jet"], "bwr"),
            (["explain", "{image}", "--method", "Magic"], "GradCAM"),
            (["explain", "{image}", "--method", "SmoothGrad", "-c", "EpsilonPlus"], "method=LRP"),
            (["explain", "{image}", "--method", "SmoothGrad", "--through", "conv1:1"], "method=LRP"),
            (["explain", "{image}", "--method", "SmoothGrad", "--set", "samples=0"], "from 1 to 1000"),
            (["explain", "{image}", "--set", "n_steps=3"], "IntegratedGradients"),
            (["explain", "{image}", "--set", "epsilon"], "NAME=VALUE"),
            (["explain", "{image}", "--size", "big"], "HEIGHTxWIDTH"),
            (["fuse", "{text}"], "text.onnx"),
            (["fuse", "/no/such.onnx"], "/no/such.onnx"),
            (["models", "add", "{text}", "--data", "{folder}"], "text.onnx"),
            (["models", "add", "/no/such.onnx", "--data", "{folder}"], "No such file"),
            (["models", "remove", "nobody", "--data", "{folder}"], "nobody"),
            (["models", "--url", "http://127.0.0.1:9"], "cannot be reached"),
            (["serve", "--port", "99999999"], "port"),
            (["nonsense"], "nonsense"),
        ],
    )
    @pytest.mark.usefixtures("quick")
    def test_one_clear_line_and_exit_code_2(
        self, run, arguments: list[str], words: str, image: Path, tmp_path: Path
    ) -> None:
        text = tmp_path / "text.onnx"
        text.write_text("Buy milk.")
        places = {"text": text, "image": image, "folder": tmp_path / "store"}
        done = run(*(argument.format(**places) for argument in arguments))
        assert done.code == 2
        assert words in done.err
        assert "Traceback" not in done.err
        assert done.out == ""

    def test_our_own_mistakes_are_not_hidden(self, run, monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
        monkeypatch.setattr("app.explaining.explain", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["explain", str(image)])
