"""Other methods than LRP over HTTP: their options and bounds, an answer without a ledger, and what is refused."""

import inspect
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor, nn

import fusion
import lrp
from app import methods
from app.explaining import Question, explain
from app.main import create_app
from app.settings import Settings
from app.subject import Subject
from fusion.errors import BadComposite
from lrp.attributions import METHODS
from models.preprocess import InputSpec, decode, prepare
from models.store import Store

PNG, NPY, NPZ, JSON = "image/png", "application/x-npy", "application/x-npz", "application/json"
SIDE = 128  # of the built-in network

# Options with which every method is quick.
QUICK = {
    "IntegratedGradients": {"n_steps": 4},
    "SmoothGrad": {"samples": 3},
    "InputXGradient": {},
    "GuidedBackprop": {},
    "Occlusion": {"window": "64x32", "stride": "32"},
    "GradCAM": {},
}


@pytest.fixture(scope="module")
def explainer(prepared: Path) -> lrp.Explainer:
    return lrp.Explainer(fusion.load(Store(prepared).get("builtin").folder)[0])


def ask(api: TestClient, image: bytes, accept: str, **query: object) -> httpx.Response:
    return api.post("/v1/explain", params=query, content=image, headers={"Accept": accept})


def array(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


class TestTheList:
    def test_it_has_every_method_of_the_library_and_every_option(self, api: TestClient) -> None:
        said = api.get("/v1/methods").json()
        assert said["default"] == "LRP"
        listed = {method["name"]: method for method in said["methods"]}
        assert list(listed) == ["LRP", *METHODS]
        for name, function in METHODS.items():
            signature = inspect.signature(function).parameters
            options = {option["name"]: option for option in listed[name]["parameters"]}
            assert list(options) == list(signature)[1:]
            for option, entry in options.items():
                assert entry["default"] == signature[option].default
                assert entry["description"]
                assert entry["type"] in ("integer", "number", "size", "choice", "layer")
                if entry["type"] in ("integer", "number", "size"):
                    assert entry["minimum"] < entry["maximum"]
                if entry["type"] == "choice":
                    assert entry["default"] in entry["choices"]
        assert all(method["description"].endswith(".") for method in listed.values())

    def test_every_default_may_be_stated(self) -> None:
        for name in METHODS:
            stated = {k: v for k, v in methods.defaults(name).items() if v is not None}
            assert methods.read(name, stated) == stated
            assert methods.read(name, {k: str(v) for k, v in stated.items()}) == stated


class TestAnswers:
    @pytest.mark.parametrize("method", METHODS)
    def test_it_is_what_the_library_says(
        self, api: TestClient, prepared: Path, image: bytes, explainer: lrp.Explainer, method: str
    ) -> None:
        options = QUICK[method]
        spec = InputSpec.from_json(Store(prepared).get("builtin").manifest["input"])
        x = prepare(decode(image), spec)
        want = explainer.attribute(x, 3, method, **methods.read(method, options))
        found = array(ask(api, image, NPY, target=3, method=method, **options))
        assert found.shape == ((1 if method == "GradCAM" else 3), SIDE, SIDE)
        assert np.abs(found).max() > 0
        np.testing.assert_allclose(found, want.relevance[0], atol=1e-5 * np.abs(found).max())
        said = ask(api, image, JSON, target=3, method=method, **options).json()
        assert said["target"]["score"] == pytest.approx(float(want.score[0]), rel=1e-5)
        assert said["sum"] == pytest.approx(found.sum(dtype=np.float64), rel=1e-5, abs=1e-5)
        assert said["shape"] == list(found.shape)

    @pytest.mark.parametrize("method", METHODS)
    def test_there_are_no_books(self, api: TestClient, image: bytes, method: str) -> None:
        answer = ask(api, image, NPZ, method=method, **QUICK[method])
        with np.load(io.BytesIO(answer.content)) as arrays:
            said = json.loads(arrays["summary"].tobytes())
            assert list(arrays["relevance"].shape) == said["shape"]
            assert "inner" not in arrays
        assert said["method"] == answer.headers["X-Clearfold-Method"] == method
        assert [said[key] for key in ("composite", "picked", "balanced", "sums", "ledger")] == [None] * 5
        assert said["warnings"] == []
        assert float(answer.headers["X-Clearfold-Sum"]) == said["sum"]
        assert not {"x-clearfold-balanced", "x-clearfold-picked", "x-clearfold-composite"} & set(
            map(str.lower, answer.headers)
        )

    def test_lrp_keeps_its_books(self, api: TestClient, image: bytes) -> None:
        for query in ({}, {"method": "LRP"}):
            answer = ask(api, image, JSON, **query)
            said = answer.json()
            assert (said["method"], said["composite"], said["balanced"]) == ("LRP", "EpsilonPlusFlat", True)
            assert said["sums"]["input"] == pytest.approx(said["sum"], rel=1e-5)
            assert answer.headers["X-Clearfold-Composite"] == "EpsilonPlusFlat"
            assert answer.headers["X-Clearfold-Balanced"] == "true"

    def test_the_options_are_said_as_they_were_used(self, api: TestClient, image: bytes) -> None:
        said = ask(api, image, JSON, method="Occlusion", window="64x32", stride=32, batch=4).json()
        assert said["parameters"] == {"window": [64, 32], "stride": [32, 32], "baseline": 0, "batch": 4}
        said = ask(api, image, JSON, method="SmoothGrad", samples=2).json()
        assert said["parameters"] == {"samples": 2, "noise": 0.15, "seed": 0, "batch": 16}

    def test_a_map_of_one_channel_is_drawn(self, api: TestClient, image: bytes) -> None:
        drawn = Image.open(io.BytesIO(ask(api, image, PNG, method="GradCAM").content))
        assert drawn.size == (SIDE, SIDE)
        assert drawn.text["Method"] == "GradCAM"  # type: ignore[attr-defined]
        assert "Composite" not in drawn.text  # type: ignore[attr-defined]
        values = array(ask(api, image, NPY, method="GradCAM", pool="true"))
        assert values.shape == (SIDE, SIDE)
        pixels = np.asarray(drawn).astype(int)
        assert values.min() >= 0
        assert (pixels[..., 0] == 255).all()  # from white to red
        where = np.argmax(values)
        assert pixels.reshape(-1, 3)[where].tolist() == [255, 0, 0]

    def test_a_layer_of_grad_cam(self, api: TestClient, image: bytes, explainer: lrp.Explainer) -> None:
        layers = [e["name"] for e in api.get("/v1/models/builtin/layers").json()["layers"]]
        early = next(name for name in layers if name.startswith("layer1"))
        one, other = (array(ask(api, image, NPY, method="GradCAM", **q)) for q in ({}, {"layer": early}))
        assert np.abs(one - other).max() > 0
        default = ask(api, image, JSON, method="GradCAM").json()["parameters"]
        assert default == {"layer": explainer.cam_layer, "interpolate": "bilinear"}
        assert default["layer"] in layers
        wrong = ask(api, image, NPY, method="GradCAM", layer="nowhere")
        assert (wrong.status_code, wrong.json()["type"]) == (422, "/problems/bad-layer")

    def test_the_same_seed_is_the_same_map(self, api: TestClient, image: bytes) -> None:
        def found(**query: int) -> np.ndarray:
            return array(ask(api, image, NPY, method="SmoothGrad", samples=2, **query))

        assert np.array_equal(found(), found(seed=0))
        assert not np.array_equal(found(), found(seed=1))

    def test_a_contrast_is_the_difference(self, api: TestClient, image: bytes) -> None:
        def found(**query: object) -> np.ndarray:
            return array(ask(api, image, NPY, method="InputXGradient", **query))

        both, one, other = found(target=1, against=4), found(target=1), found(target=4)
        np.testing.assert_allclose(both, one - other, atol=1e-5 * np.abs(one).max())
        said = ask(api, image, JSON, method="InputXGradient", target=1, against=4).json()
        assert said["against"]["index"] == 4

    def test_in_parallel_as_one_after_the_other(self, api: TestClient, image: bytes) -> None:
        def found(method: str) -> bytes:
            return ask(api, image, NPY, target=2, method=method, **QUICK[method]).content

        asked = list(METHODS) * 3
        alone = {method: found(method) for method in METHODS}
        with ThreadPoolExecutor(6) as threads:
            together = list(threads.map(found, asked))
        assert all(alone[method] == content for method, content in zip(asked, together, strict=True))


class TestBounds:
    @pytest.mark.parametrize(
        ("method", "option", "value", "word"),
        [
            ("IntegratedGradients", "n_steps", "1000000", "from 2 to 1000"),
            ("IntegratedGradients", "n_steps", "1", "from 2 to 1000"),
            ("IntegratedGradients", "n_steps", "4.5", "whole number"),
            ("IntegratedGradients", "n_steps", "many", "whole number"),
            ("IntegratedGradients", "baseline", "nan", "number"),
            ("IntegratedGradients", "baseline", "1e30", "from -1000000 to 1000000"),
            ("IntegratedGradients", "rule", "trapezoid", "riemann_trapezoid"),
            ("IntegratedGradients", "batch", "0", "from 1 to 64"),
            ("SmoothGrad", "samples", "100000", "from 1 to 1000"),
            ("SmoothGrad", "noise", "-1", "from 0 to 10"),
            ("SmoothGrad", "seed", "-1", "from 0 to 4294967295"),
            ("SmoothGrad", "batch", "1000", "from 1 to 64"),
            ("Occlusion", "window", "0", "from 1 to 8192"),
            ("Occlusion", "window", "3x", "HEIGHTxWIDTH"),
            ("Occlusion", "window", "3x4x5", "HEIGHTxWIDTH"),
            ("Occlusion", "stride", "-2", "from 1 to 8192"),
            ("GradCAM", "interpolate", "bicubic", "bilinear"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, api: TestClient, image: bytes, method: str, option: str, value: str, word: str
    ) -> None:
        answer = ask(api, image, NPY, method=method, **{option: value})
        problem = answer.json()
        assert (answer.status_code, problem["type"]) == (422, "/problems/invalid-parameter")
        assert problem["errors"][0]["field"] == option
        assert word in problem["detail"]

    @pytest.mark.parametrize(
        ("query", "word"),
        [
            ({"method": "Occlusion", "window": 8, "stride": 1}, "14641 times"),
            ({"method": "Occlusion", "window": 300}, "does not cover"),
            ({"method": "Occlusion", "window": 4, "stride": 8}, "does not cover"),
            ({"method": "Magic"}, "choose one of LRP, IntegratedGradients"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, api: TestClient, image: bytes, query: dict[str, object], word: str
    ) -> None:
        answer = ask(api, image, NPY, **query)
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-composite")
        assert word in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("query", "field", "word"),
        [
            ({"method": "SmoothGrad", "composite": "EpsilonPlus"}, "composite", "take method=LRP"),
            ({"method": "SmoothGrad", "layer": "layer1.0.conv1"}, "layer", "take method=LRP"),
            ({"method": "SmoothGrad", "through": '{"layer1.0.conv1": 1}'}, "through", "take method=LRP"),
            ({"method": "GradCAM", "top": 3}, "top", "take method=LRP"),
            ({"method": "SmoothGrad", "gamma": 0.1}, "gamma", "take method=LRP"),
            ({"method": "SmoothGrad", "n_steps": 3}, "n_steps", "method=IntegratedGradients"),
            ({"n_steps": 3}, "n_steps", "method=IntegratedGradients"),
            ({"method": "LRP", "window": 3}, "window", "method=Occlusion"),
            ({"method": "SmoothGrad", "sampels": 3}, "sampels", "samples"),
            ({"metod": "SmoothGrad"}, "metod", "method"),
        ],
    )
    def test_what_belongs_to_another_method_is_refused(
        self, api: TestClient, image: bytes, query: dict[str, object], field: str, word: str
    ) -> None:
        answer = ask(api, image, NPY, **query)
        problem = answer.json()
        assert (answer.status_code, problem["type"]) == (422, "/problems/invalid-parameter")
        assert problem["errors"][0]["field"] == field
        assert word in problem["detail"]

    def test_it_is_given_up_after_a_time(self, prepared: Path, image: bytes) -> None:
        settings = Settings(data=prepared, device="cpu", explanation_seconds=1e-6)
        with TestClient(create_app(settings)) as api:
            answer = ask(api, image, NPY, method="SmoothGrad")
            assert (answer.status_code, answer.json()["type"]) == (422, "/problems/explanation-timeout")
            assert "Ask for less" in answer.json()["detail"]
            assert ask(api, image, NPY).status_code == 200

    def test_batches_fit_into_memory_and_change_nothing(
        self, api: TestClient, prepared: Path, image: bytes
    ) -> None:
        query = {"method": "IntegratedGradients", "n_steps": 5}
        want = array(ask(api, image, NPY, **query))
        settings = Settings(data=prepared, device="cpu", explanation_memory=1)
        with TestClient(create_app(settings)) as small:
            assert ask(small, image, JSON, **query).json()["parameters"]["batch"] == 1
            found = array(ask(small, image, NPY, **query))
        np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


class Exploding(nn.Module):
    """Finite for images, and infinite on the way to a far baseline."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3))
        return torch.cat([mean.exp(), mean], 1)


def test_a_map_that_is_not_finite_is_refused(image: bytes) -> None:
    explainer = lrp.Explainer(fusion.capture(Exploding(), (torch.rand(1, 3, 8, 8),)))
    subject = Subject("exploding", InputSpec((8, 8)), None, 6, explainer)
    question = Question(image, "0", parameters={"baseline": 1e4}, method="IntegratedGradients")
    with pytest.raises(BadComposite, match="not finite"):
        explain(lambda: subject, question)
    near = Question(image, "0", parameters={"baseline": 1.0}, method="IntegratedGradients")
    assert np.isfinite(explain(lambda: subject, near).relevance).all()


def test_it_is_in_the_openapi_document(api: TestClient) -> None:
    document = api.get("/openapi.json").json()
    assert "/v1/methods" in document["paths"]
    for path in ("/v1/explain", "/v1/models/{model_id}/explain"):
        operation = document["paths"][path]["post"]
        assert "GET /v1/methods" in next(
            p["description"] for p in operation["parameters"] if p["name"] == "method"
        )
        examples = operation["responses"]["422"]["content"]["application/problem+json"]["examples"]
        assert "explanation-timeout" in examples
        assert "LRP only" in operation["responses"]["200"]["headers"]["X-Clearfold-Balanced"]["description"]
    summary = document["components"]["schemas"]["ExplanationSummary"]
    for key in ("composite", "picked", "balanced", "sums"):
        assert {"type": "null"} in summary["properties"][key]["anyOf"]
    assert "null" in summary["description"]
