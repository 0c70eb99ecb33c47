"""The Python client against a real server: both clients, every method, every kind of problem."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from inspect import iscoroutinefunction, signature
from pathlib import Path

import clearfold_client
import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from clearfold_client import (
    AsyncClient,
    BadLayer,
    BadTarget,
    Client,
    InvalidImage,
    InvalidParameter,
    ModelNotFound,
    NotReachable,
    Overloaded,
    Problem,
    TookTooLong,
    UnsupportedModel,
    colors,
)
from clearfold_client.problems import from_response
from clearfold_client.uploads import data_beside, of_network
from PIL import Image

from lrp import heatmap
from tests.support.served import CLASSES, SIZE, Running, encoded, free_port, picture

SIDE = 128


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, clearfold_client; print(sorted({'torch', 'app', 'lrp', 'fusion', 'models'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestExplaining:
    def test_an_explanation_adds_up(self, client: Client) -> None:
        explanation = client.explain(picture())
        assert explanation.relevance.shape == (3, SIDE, SIDE)
        assert explanation.relevance.dtype == np.float32
        assert explanation.heatmap.shape == (SIDE, SIDE)
        assert explanation.sums is not None
        assert explanation.heatmap.sum() == pytest.approx(explanation.sums["input"], rel=1e-3, abs=1e-4)
        assert explanation.sums["input"] + explanation.sums["kept"] == pytest.approx(
            explanation.score, rel=1e-3
        )
        assert explanation.target.index == explanation.prediction.index
        assert explanation.target.label
        assert (explanation.model, explanation.composite) == ("builtin", "EpsilonPlusFlat")

    def test_an_image_is_a_path_bytes_a_picture_or_an_array(self, client: Client, tmp_path: Path) -> None:
        image = picture()
        path = tmp_path / "image.png"
        image.save(path)
        forms = (path, str(path), path.read_bytes(), image, np.asarray(image))
        maps = [client.explain(form).relevance for form in forms]
        assert all(np.array_equal(maps[0], other) for other in maps[1:])

    def test_target_and_composite(self, client: Client) -> None:
        explanation = client.explain(
            picture(), model="builtin", target=4, composite="EpsilonGammaBox", gamma=0.5, epsilon=1e-4
        )
        assert (explanation.target.index, explanation.composite) == (4, "EpsilonGammaBox")
        named = client.explain(
            picture(), target=explanation.target.label, composite="EpsilonGammaBox", gamma=0.5, epsilon=1e-4
        )
        assert np.array_equal(named.relevance, explanation.relevance)

    def test_pictures(self, client: Client) -> None:
        explanation = client.explain(picture())
        plain, overlay = explanation.image(), explanation.overlay()
        assert plain.size == overlay.size == (SIDE, SIDE)
        assert np.array_equal(explanation.image(opacity=1.0), plain)
        assert not np.array_equal(overlay, plain)
        with pytest.raises(ValueError, match="bwr"):
            explanation.image(cmap="jet")

    def test_its_colours_are_the_library_s(self, client: Client) -> None:
        explanation = client.explain(picture())
        assert set(colors.COLORMAPS) == set(heatmap.COLORMAPS)
        for cmap in colors.COLORMAPS:
            want = heatmap.colorize(explanation.heatmap, cmap=cmap)
            np.testing.assert_array_equal(np.asarray(explanation.image(cmap)), want)
        want = heatmap.overlay(explanation.seen, explanation.heatmap)
        np.testing.assert_array_equal(np.asarray(explanation.overlay()), want)

    def test_predictions(self, client: Client) -> None:
        best = client.predict(picture(), top=3)
        assert len(best) == 3
        assert best[0].index == client.explain(picture()).prediction.index
        assert best == client.predict(picture(), model="builtin", top=3)

    def test_composites(self, client: Client) -> None:
        assert "gamma" in client.composites()["EpsilonGammaBox"]
        assert client.composites()["auto"] == {}

    def test_the_automatic_composite(self, client: Client) -> None:
        explanation = client.explain(picture(), composite="auto")
        assert (explanation.composite, explanation.picked) == ("auto", "EpsilonPlusFlatSteady")
        assert explanation.reason is not None
        assert "EpsilonPlusFlatSteady" in explanation.reason
        named = client.explain(picture(), composite="EpsilonPlusFlatSteady")
        assert (named.picked, named.reason) == ("EpsilonPlusFlatSteady", None)
        assert np.array_equal(explanation.relevance, named.relevance)

    def test_a_ledger_that_balances(self, client: Client) -> None:
        explanation = client.explain(picture())
        assert (explanation.balanced, explanation.warnings) == (True, ())

    @pytest.mark.usefixtures("lossy")
    def test_a_ledger_that_does_not_balance(self, client: Client) -> None:
        explanation = client.explain(picture())
        assert explanation.balanced is False
        assert "float64" in explanation.warnings[0]


class TestInside:
    def test_the_relevance_at_a_layer(self, client: Client) -> None:
        layer = [layer for layer in client.layers("builtin") if layer.op == "conv2d"][-1]
        explanation = client.explain(picture(), layer=layer.name, top=4)
        inner = explanation.inner
        assert inner is not None
        assert (inner.layer, inner.values.shape) == (layer.name, layer.shape[1:])
        assert inner.by_channel.shape == (layer.channels,)
        assert inner.map.shape == layer.shape[2:]
        assert inner.on_image is not None
        np.testing.assert_allclose(inner.on_image, inner.map, rtol=1e-4, atol=1e-6)
        assert inner.outside == 0
        channels, amounts = zip(*inner.top, strict=True)
        assert list(channels) == np.argsort(-inner.by_channel)[:4].tolist()
        np.testing.assert_allclose(amounts, inner.by_channel[list(channels)], rtol=1e-4)
        assert np.array_equal(explanation.relevance, client.explain(picture()).relevance)
        assert client.explain(picture()).inner is None
        head = next(e.name for e in client.layers("builtin") if len(e.shape) == 2)
        flat = client.explain(picture(), layer=head).inner
        assert flat is not None
        assert (flat.on_image, flat.outside) == (None, None)

    def test_relevance_through_channels(self, client: Client) -> None:
        layer = [layer for layer in client.layers("builtin") if layer.op == "conv2d"][-1]
        whole = client.explain(picture(), layer=layer.name)
        part = client.explain(picture(), layer=layer.name, through={layer.name: [2, 5]})
        single = client.explain(picture(), through={layer.name: 2})
        assert whole.inner is not None
        assert part.inner is not None
        assert set(np.flatnonzero(part.inner.by_channel)) <= {2, 5}
        np.testing.assert_array_equal(part.inner.values[2], whole.inner.values[2])
        assert not np.array_equal(part.relevance, whole.relevance)
        assert not np.array_equal(part.relevance, single.relevance)

    def test_a_contrast(self, client: Client) -> None:
        first, second = client.predict(picture(), top=2)
        explanation = client.explain(picture(), against=second.index)
        assert explanation.against == second.label
        assert explanation.score == pytest.approx(first.score - second.score, rel=1e-3)
        assert client.explain(picture(), against="others").against == "others"

    def test_layers_and_channels_that_are_not_there(self, client: Client) -> None:
        with pytest.raises(BadLayer, match="layer99"):
            client.explain(picture(), layer="layer99")
        name = client.layers("builtin")[-1].name
        with pytest.raises(BadLayer, match="no channel 4711"):
            client.explain(picture(), through={name: [4711]})
        with pytest.raises(BadTarget, match="two different"):
            client.explain(picture(), target=2, against=2)


class TestMethods:
    def test_they_are_listed_with_what_they_take(self, client: Client) -> None:
        methods = {method.name: method for method in client.methods()}
        assert methods["LRP"].options == ()
        steps = next(o for o in methods["IntegratedGradients"].options if o.name == "n_steps")
        assert (steps.type, steps.default, steps.minimum) == ("integer", 50, 2)
        (rule,) = [o for o in methods["IntegratedGradients"].options if o.type == "choice"]
        assert rule.default in rule.choices

    def test_an_answer_without_a_ledger(self, client: Client) -> None:
        explanation = client.explain(
            picture(), target=2, method="IntegratedGradients", n_steps=4, baseline=0.5
        )
        assert (explanation.method, explanation.composite) == ("IntegratedGradients", None)
        assert explanation.parameters["n_steps"] == 4
        assert explanation.parameters["baseline"] == 0.5
        assert (explanation.sums, explanation.ledger, explanation.balanced) == (None, None, None)
        assert explanation.relevance.shape == (3, SIDE, SIDE)
        assert explanation.overlay().size == (SIDE, SIDE)
        finer = client.explain(picture(), target=2, method="IntegratedGradients", n_steps=16, baseline=0.5)
        assert not np.array_equal(finer.relevance, explanation.relevance)
        assert client.explain(picture()).method == "LRP"

    def test_sizes_choices_and_layers(self, client: Client) -> None:
        covered = client.explain(picture(), method="Occlusion", window=(64, 32), stride=32)
        assert (covered.parameters["window"], covered.parameters["stride"]) == ([64, 32], [32, 32])
        name = next(e.name for e in client.layers("builtin") if e.name.startswith("layer1"))
        cam = client.explain(picture(), method="GradCAM", layer=name, interpolate="nearest")
        assert cam.relevance.shape == (1, SIDE, SIDE)
        assert cam.parameters == {"layer": name, "interpolate": "nearest"}

    def test_what_does_not_go_together(self, client: Client) -> None:
        with pytest.raises(InvalidParameter, match="method=LRP"):
            client.explain(picture(), method="SmoothGrad", composite="EpsilonPlus")
        with pytest.raises(InvalidParameter, match="method=IntegratedGradients"):
            client.explain(picture(), n_steps=3)
        document = {
            "type": "/problems/explanation-timeout",
            "title": "Long",
            "status": 422,
            "detail": "Less.",
        }
        assert isinstance(from_response(httpx.Response(422, json=document)), TookTooLong)


class TestModels:
    @pytest.mark.usefixtures("quick")
    def test_the_life_of_a_model(self, client: Client, onnx_file: Path, tmp_path: Path) -> None:
        steps: list[tuple[int, int]] = []
        labels = ["cat", "dog", "eel", "fox", "gnu"]
        model = client.upload_model(
            onnx_file,
            name="tiny",
            size=(SIZE, SIZE),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            order="BGR",
            labels=labels,
            progress=lambda sent, total: steps.append((sent, total)),
        )
        assert (model.name, model.classes, model.labels) == ("tiny", CLASSES, tuple(labels))
        assert (model.input["order"], model.input["std"]) == ("BGR", [0.25, 0.25, 0.25])
        size = onnx_file.stat().st_size
        assert steps[-1] == (size, size)
        assert model.id in {other.id for other in client.models()}
        assert client.model(model.id[:10]).raw["layers"]
        assert client.explain(picture(), model=model.id, target="eel").target.index == 2

        path = client.download_fused(model.id, tmp_path / "fused.onnx")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert len(session.get_inputs()) == 1
        assert list(tmp_path.iterdir()) == [path]

        assert client.change_model(model.id, name="renamed").name == "renamed"
        client.delete_model(model.id)
        with pytest.raises(ModelNotFound):
            client.model(model.id)

    @pytest.mark.usefixtures("quick")
    def test_data_files_of_the_usual_name_come_along(self, client: Client, split_file: Path) -> None:
        steps: list[tuple[int, int]] = []
        model = client.upload_model(
            split_file, progress=lambda sent, total: steps.append((sent, total)), order="BGR"
        )
        total = split_file.stat().st_size + split_file.with_name("split.onnx.data").stat().st_size
        assert steps[-1] == (total, total)
        assert [sent for sent, _ in steps] == sorted(sent for sent, _ in steps)
        assert (model.name, model.classes, model.input["order"]) == ("split", CLASSES, "BGR")
        client.delete_model(model.id)

    @pytest.mark.usefixtures("quick")
    def test_data_files_of_other_names_are_named(
        self, client: Client, split_file: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "in here").mkdir()
        path, place = tmp_path / "net.onnx", "in here/größe.bin"
        onnx.save(onnx.load(split_file), path, save_as_external_data=True, location=place, size_threshold=0)
        with pytest.raises(UnsupportedModel, match=r"größe\.bin") as missing:
            client.upload_model(path)
        assert missing.value.code == "missing-data"
        model = client.upload_model(path, data=[tmp_path / place])
        assert model.classes == CLASSES
        client.delete_model(model.id)

    def test_health(self, client: Client) -> None:
        assert client.health().ready


class TestDataFiles:
    """Which files are sent: none that anybody but the user has a say in."""

    @pytest.mark.parametrize("name", ["net.onnx.data", "net.onnx_data", "net.data", "net_data"])
    def test_the_usual_names(self, tmp_path: Path, name: str) -> None:
        network = tmp_path / "net.onnx"
        network.write_bytes(b"\x00" + name.encode() + b"\x00")
        (tmp_path / name).touch()
        assert data_beside(network) == (tmp_path / name,)

    def test_no_others(self, tmp_path: Path) -> None:
        network = tmp_path / "net.onnx"
        network.write_bytes(b"other.data, net.onnx.data, net.data, id_rsa, ../id_rsa")
        for name in ("other.data", "id_rsa", "net.onnx_data"):
            (tmp_path / name).touch()
        (tmp_path / "net.onnx.data").symlink_to("id_rsa")
        (tmp_path / "net.data").mkdir()
        assert data_beside(network) == ()

    def test_none_that_the_network_does_not_mention(self, tmp_path: Path) -> None:
        (tmp_path / "net.onnx.data").touch()
        network = tmp_path / "net.onnx"
        for content in (b"", b"net.onnx.dat"):
            network.write_bytes(content)
            assert data_beside(network) == ()

    def test_a_form_is_as_long_as_it_says(self, tmp_path: Path) -> None:
        network = tmp_path / 'a "net".onnx'
        network.write_bytes(b"N" * 700_000)
        (tmp_path / "w").write_bytes(b"W" * 10)
        (tmp_path / "empty").touch()
        upload = of_network(network, [tmp_path / "w", tmp_path / "empty", tmp_path / "w"])
        blocks = list(upload.blocks())
        assert b"" not in blocks
        body = b"".join(blocks)
        assert str(len(body)) == upload.headers()["Content-Length"]
        assert b'filename="a %22net%22.onnx"' in body
        assert body.count(b'name="data"') == 2
        assert of_network(network, []).pieces == (network,)


class TestProblems:
    def test_each_kind_has_its_class(self, client: Client, tmp_path: Path) -> None:
        text = tmp_path / "text.onnx"
        text.write_text("Buy milk.")
        with pytest.raises(ModelNotFound) as unknown:
            client.explain(picture(), model="nobody")
        assert (unknown.value.status, unknown.value.code) == (404, "model-not-found")
        assert "nobody" in str(unknown.value)
        assert unknown.value.instance
        with pytest.raises(InvalidImage, match="image"):
            client.explain(b"Buy milk.")
        with pytest.raises(BadTarget, match="0 to 9"):
            client.explain(picture(), target=10)
        with pytest.raises(InvalidParameter, match="gama"):
            client.explain(picture(), gama=1)
        with pytest.raises(InvalidParameter, match="Magic"):
            client.explain(picture(), composite="Magic")
        with pytest.raises(UnsupportedModel, match=r"text\.onnx"):
            client.upload_model(text)

    def test_a_failed_download_leaves_no_file(self, client: Client, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFound):
            client.download_fused("nobody", tmp_path / "fused.onnx")
        assert list(tmp_path.iterdir()) == []

    def test_an_image_that_is_none(self, client: Client) -> None:
        with pytest.raises(ValueError, match="uint8"):
            client.explain(np.zeros((4, 4, 3)))
        with pytest.raises(FileNotFoundError):
            client.explain("/no/such/image.png")

    def test_nobody_there(self) -> None:
        with (
            Client(f"http://127.0.0.1:{free_port()}") as client,
            pytest.raises(NotReachable, match="running"),
        ):
            client.models()

    def test_an_overloaded_server_says_when_to_come_back(self) -> None:
        document = {"type": "/problems/overloaded", "title": "Busy", "status": 503, "detail": "Later."}
        response = httpx.Response(503, json=document, headers={"Retry-After": "2"})
        problem = from_response(response)
        assert isinstance(problem, Overloaded)
        assert (problem.retry_after, str(problem)) == (2, "Later.")

    def test_an_answer_of_somebody_else(self) -> None:
        request = httpx.Request("GET", "http://elsewhere/v1/models")
        problem = from_response(httpx.Response(502, text="<html>", request=request))
        assert (type(problem), problem.status) == (Problem, 502)
        assert "Clearfold" in problem.detail


class TestAsync:
    def test_the_same_methods_with_the_same_parameters(self) -> None:
        for name, method in vars(Client).items():
            if not name.startswith("_") and name != "close":
                twin = getattr(AsyncClient, name)
                assert iscoroutinefunction(twin), name
                assert signature(twin) == signature(method), name
                assert twin.__doc__ == method.__doc__, name

    @pytest.mark.usefixtures("quick")
    def test_the_same_answers(
        self, server: Running, onnx_file: Path, split_file: Path, tmp_path: Path
    ) -> None:
        async def scenario() -> None:
            async with AsyncClient(server.url) as client:
                explanations = await asyncio.gather(*(client.explain(picture(seed)) for seed in range(4)))
                with Client(server.url) as other:
                    for seed, explanation in enumerate(explanations):
                        assert np.array_equal(explanation.relevance, other.explain(picture(seed)).relevance)
                name = (await client.layers("builtin"))[-1].name
                looked = await client.explain(picture(), layer=name, against="others")
                assert looked.inner is not None
                assert (looked.inner.layer, looked.against) == (name, "others")
                steps: list[int] = []
                model = await client.upload_model(onnx_file, progress=lambda sent, total: steps.append(sent))
                assert steps[-1] == onnx_file.stat().st_size
                assert await client.predict(encoded(picture()), model.id)
                path = await client.download_fused(model.id, tmp_path / "fused.pt2", "pt2")
                assert path.stat().st_size > 1000
                await client.delete_model(model.id)
                split = await client.upload_model(split_file)
                assert split.classes == CLASSES
                await client.delete_model(split.id)
                with pytest.raises(ModelNotFound):
                    await client.model(model.id)

        asyncio.run(scenario())

    def test_nobody_there(self) -> None:
        async def scenario() -> None:
            async with AsyncClient(f"http://127.0.0.1:{free_port()}") as client:
                await client.health()

        with pytest.raises(NotReachable):
            asyncio.run(scenario())


def test_a_saved_overlay_is_an_image(server: Running, tmp_path: Path) -> None:
    """The example of the package's own documentation."""
    assert clearfold_client.__doc__ is not None
    with Client(server.url) as clearfold:
        clearfold.explain(encoded(picture())).overlay().save(tmp_path / "cat.heatmap.png")
    assert Image.open(tmp_path / "cat.heatmap.png").size == (SIDE, SIDE)
