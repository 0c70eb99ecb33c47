"""Explanations over HTTP: every format, every composite, targets, and what is said of bad requests."""

import io
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from app import composites
from app import service as service_module
from app.main import create_app
from app.settings import Settings
from fusion.errors import BadComposite
from lrp.composites import COMPOSITES
from models.preprocess import InputSpec
from tests.support.served import encoded, picture

NPY, NPZ, JSON = "application/x-npy", "application/x-npz", "application/json"
SIDE = 128  # of the built-in network


@pytest.fixture(scope="module")
def api(prepared: Path) -> Iterator[TestClient]:
    settings = Settings(data=prepared, device="cpu", max_image=2**20)
    with TestClient(create_app(settings)) as client:
        yield client


def npy(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content), allow_pickle=False)


class TestFormats:
    def test_the_shortest_call_gives_a_png(self, api: TestClient, image: bytes) -> None:
        answer = api.post("/v1/explain", content=image)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png")
        heatmap = Image.open(io.BytesIO(answer.content))
        assert heatmap.size == (SIDE, SIDE)
        text = heatmap.text  # type: ignore[attr-defined]
        assert (text["Model"], text["Composite"]) == ("builtin", "EpsilonPlusFlat")
        assert text["Target"] == answer.headers["X-Clearfold-Target"]
        assert text["Label"] == unquote(answer.headers["X-Clearfold-Label"])

    def test_npy_is_float32_by_channel(self, api: TestClient, image: bytes) -> None:
        answer = api.post("/v1/explain", content=image, headers={"Accept": NPY})
        relevance = npy(answer)
        assert (relevance.shape, relevance.dtype) == ((3, SIDE, SIDE), np.float32)
        assert relevance.sum() == pytest.approx(float(answer.headers["X-Clearfold-Sum"]), rel=1e-3)

    def test_pooled_npy(self, api: TestClient, image: bytes) -> None:
        whole = npy(api.post("/v1/explain", content=image, headers={"Accept": NPY}))
        pooled = npy(api.post("/v1/explain", params={"pool": "true"}, content=image, headers={"Accept": NPY}))
        np.testing.assert_allclose(pooled, whole.sum(axis=0), rtol=1e-5, atol=1e-6)

    def test_json_accounts_for_the_score(self, api: TestClient, image: bytes) -> None:
        said = api.post("/v1/models/builtin/explain", content=image, headers={"Accept": JSON}).json()
        assert said["shape"] == [3, SIDE, SIDE]
        assert said["target"]["index"] == said["prediction"]["index"]
        assert 0 < said["prediction"]["probability"] <= 1
        sums = said["sums"]
        assert sums["score"] == pytest.approx(said["target"]["score"])
        assert sums["input"] + sums["kept"] == pytest.approx(sums["score"], rel=1e-3, abs=1e-3)
        assert set(said["timings"]) == {"load", "prepare", "explain"}
        assert said["ledger"]["entries"]

    def test_npz_has_everything(self, api: TestClient, image: bytes) -> None:
        answer = api.post("/v1/explain", content=image, headers={"Accept": NPZ})
        with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
            assert arrays["relevance"].shape == (3, SIDE, SIDE)
            assert arrays["image"].shape == (SIDE, SIDE, 3)
            assert json.loads(arrays["summary"].tobytes())["model"] == "builtin"

    def test_overlay_and_colours(self, api: TestClient, image: bytes) -> None:
        looks = [
            {},
            {"view": "overlay"},
            {"cmap": "seismic"},
            {"clip": "50"},
            {"view": "overlay", "opacity": "0"},
        ]
        pictures = [api.post("/v1/explain", params=look, content=image).content for look in looks]
        assert len(set(pictures)) == len(looks)

    def test_nothing_acceptable(self, api: TestClient, image: bytes) -> None:
        answer = api.post("/v1/explain", content=image, headers={"Accept": "text/html"})
        assert (answer.status_code, answer.json()["type"]) == (406, "/problems/not-acceptable")


class TestImages:
    @pytest.mark.parametrize("format", ["PNG", "BMP"])
    def test_a_form_and_a_body_are_the_same(self, api: TestClient, format: str) -> None:
        content = encoded(picture(), format)
        body = api.post("/v1/explain", content=content, headers={"Accept": NPY})
        form = api.post("/v1/explain", files={"image": ("x", content)}, headers={"Accept": NPY})
        assert body.content == form.content

    @pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
    def test_formats(self, api: TestClient, format: str) -> None:
        assert api.post("/v1/explain", content=encoded(picture(), format)).status_code == 200

    def test_as_curl_sends_it(self, api: TestClient, image: bytes) -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "*/*"}
        assert api.post("/v1/explain", content=image, headers=headers).status_code == 200

    def test_a_preview_is_what_the_network_saw(self, api: TestClient, image: bytes) -> None:
        answer = api.post("/v1/models/builtin/preview", content=image)
        seen = np.asarray(Image.open(io.BytesIO(answer.content)))
        with np.load(
            io.BytesIO(api.post("/v1/explain", content=image, headers={"Accept": NPZ}).content)
        ) as arrays:
            np.testing.assert_array_equal(seen, arrays["image"])

    @pytest.mark.parametrize("content", [b"", b"Buy milk.", b"<svg xmlns='x'/>", b"%PDF-1.7", b"\0" * 100])
    def test_not_an_image(self, api: TestClient, content: bytes) -> None:
        answer = api.post("/v1/explain", content=content)
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-input")

    def test_a_truncated_image(self, api: TestClient, image: bytes) -> None:
        answer = api.post("/v1/explain", content=image[: len(image) // 2])
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-input")
        assert "truncated" in answer.json()["detail"]

    def test_a_header_that_promises_too_many_pixels(self, api: TestClient) -> None:
        answer = api.post("/v1/explain", content=_png_header(60_000, 60_000))
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-input")
        assert "megapixels" in answer.json()["detail"]

    def test_a_body_that_is_too_large(self, api: TestClient) -> None:
        answer = api.post("/v1/explain", content=b"x" * (2**20 + 1))
        assert (answer.status_code, answer.json()["type"]) == (413, "/problems/body-too-large")
        assert "1 MiB" in answer.json()["detail"]

    def test_a_body_of_unknown_length_that_is_too_large(self, api: TestClient) -> None:
        answer = api.post("/v1/explain", content=(b"x" * 2**16 for _ in range(20)))
        assert answer.status_code == 413

    def test_a_form_without_an_image(self, api: TestClient, image: bytes) -> None:
        for form in ({"picture": ("x", image)}, {"a": ("x", image), "b": ("y", image)}):
            answer = api.post("/v1/explain", files=form)
            assert answer.status_code in (400, 422)
            assert "'image'" in answer.json()["detail"]


class TestTargets:
    def test_index_and_label_are_the_same(self, api: TestClient, image: bytes) -> None:
        labels = api.get("/v1/models/builtin").json()["labels"]
        by_index = api.post("/v1/explain", params={"target": 3}, content=image, headers={"Accept": NPY})
        by_label = api.post(
            "/v1/explain", params={"target": labels[3]}, content=image, headers={"Accept": NPY}
        )
        assert by_index.content == by_label.content
        assert by_index.headers["X-Clearfold-Target"] == "3"
        assert unquote(by_index.headers["X-Clearfold-Label"]) == labels[3]

    @pytest.mark.parametrize("target", ["10", "-1", "99999999999999999999", "unicorn"])
    def test_out_of_range(self, api: TestClient, image: bytes, target: str) -> None:
        answer = api.post("/v1/explain", params={"target": target}, content=image)
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-target")
        assert "0 to 9" in answer.json()["detail"]

    def test_predictions_are_sorted_and_sum_to_one(self, api: TestClient, image: bytes) -> None:
        for address in ("/v1/predict", "/v1/models/builtin/predict"):
            best = api.post(address, params={"top": 10}, content=image).json()["predictions"]
            probabilities = [entry["probability"] for entry in best]
            assert probabilities == sorted(probabilities, reverse=True)
            assert sum(probabilities) == pytest.approx(1)
        assert len(api.post("/v1/predict", params={"top": 3}, content=image).json()["predictions"]) == 3


class TestComposites:
    def test_all_are_listed_with_their_parameters(self, api: TestClient) -> None:
        said = api.get("/v1/composites").json()
        assert [entry["name"] for entry in said["composites"]] == [*COMPOSITES, "auto"]
        assert said["default"] == "EpsilonPlusFlat"
        assert all(entry["description"] for entry in said["composites"])
        assert all("epsilon" in entry["parameters"] for entry in said["composites"][:-1])
        assert said["composites"][-1]["parameters"] == {}

    @pytest.mark.parametrize("composite", [*COMPOSITES, "auto"])
    def test_each_explains(self, api: TestClient, image: bytes, composite: str) -> None:
        answer = api.post(
            "/v1/explain", params={"composite": composite}, content=image, headers={"Accept": NPY}
        )
        assert np.isfinite(npy(answer)).all()

    def test_auto_says_what_it_picked_and_why(self, api: TestClient, image: bytes) -> None:
        ask = {"composite": "auto"}
        said = api.post("/v1/explain", params=ask, content=image, headers={"Accept": JSON}).json()
        assert (said["composite"], said["parameters"]) == ("auto", {})
        assert said["picked"] in COMPOSITES
        assert said["reason"].startswith(f"The composite {said['picked']} was picked for ")
        automatic = api.post("/v1/explain", params=ask, content=image, headers={"Accept": NPY})
        assert automatic.headers["X-Clearfold-Picked"] == said["picked"]
        by_name = api.post(
            "/v1/explain", params={"composite": said["picked"]}, content=image, headers={"Accept": NPY}
        )
        np.testing.assert_array_equal(npy(automatic), npy(by_name))

    def test_a_named_composite_is_the_one_that_is_used(self, api: TestClient, image: bytes) -> None:
        ask = {"composite": "EpsilonPlus"}
        said = api.post("/v1/explain", params=ask, content=image, headers={"Accept": JSON}).json()
        assert (said["composite"], said["picked"]) == ("EpsilonPlus", "EpsilonPlus")
        assert "reason" not in said

    def test_the_layers_under_auto(self, api: TestClient) -> None:
        answer = api.get("/v1/models/builtin/layers", params={"composite": "auto"})
        assert answer.status_code == 200
        assert answer.json()["layers"]

    def test_auto_takes_no_parameters(self) -> None:
        with pytest.raises(BadComposite, match="auto has no parameter 'gamma': it takes none"):
            composites.rules("auto", {"gamma": 1.0}, InputSpec((32, 32)))

    def test_the_box_of_gamma_box_is_the_network_s_input_range(self, api: TestClient, image: bytes) -> None:
        ask = {"composite": "EpsilonGammaBox"}
        named = npy(api.post("/v1/explain", params=ask, content=image, headers={"Accept": NPY}))
        other = npy(
            api.post("/v1/explain", params={**ask, "gamma": 2}, content=image, headers={"Accept": NPY})
        )
        assert not np.array_equal(named, other)

    @pytest.mark.parametrize(
        ("query", "word"),
        [
            ({"composite": "Magic"}, "EpsilonPlusFlat"),
            ({"composite": "Magic"}, "auto"),
            ({"composite": "auto", "epsilon": "1"}, "epsilon"),
            ({"gamma": "1"}, "gamma"),
            ({"epsilon": "much"}, "epsilon"),
            ({"epsilon": "nan"}, "epsilon"),
            ({"tagret": "3"}, "tagret"),
            ({"cmap": "jet"}, "bwr"),
            ({"opacity": "2"}, "opacity"),
            ({"view": "inside"}, "view"),
            ({"clip": "0"}, "clip"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, api: TestClient, image: bytes, query: dict[str, str], word: str
    ) -> None:
        answer = api.post("/v1/explain", params=query, content=image)
        assert answer.status_code == 422
        assert word in answer.json()["detail"]


class TestBalance:
    def test_a_ledger_that_balances(self, api: TestClient, image: bytes) -> None:
        answer = api.post("/v1/explain", content=image, headers={"Accept": JSON})
        assert (answer.json()["balanced"], answer.json()["warnings"]) == (True, [])
        assert answer.headers["X-Clearfold-Balanced"] == "true"

    @pytest.mark.usefixtures("lossy")
    def test_one_that_does_not_is_answered_with_a_warning(self, api: TestClient, image: bytes) -> None:
        answer = api.post("/v1/explain", content=image, headers={"Accept": JSON})
        said = answer.json()
        assert (answer.status_code, said["balanced"]) == (200, False)
        (warning,) = said["warnings"]
        sums = said["sums"]
        assert f"{abs(sums['score'] - sums['input']):.3g} is missing" in warning
        assert "float64" in warning
        for accept in (NPY, "image/png"):
            other = api.post("/v1/explain", content=image, headers={"Accept": accept})
            assert (other.status_code, other.headers["X-Clearfold-Balanced"]) == (200, "false")

    @pytest.mark.parametrize("accept", [JSON, NPY, "image/png"])
    def test_relevance_that_is_not_finite_is_refused(
        self, api: TestClient, image: bytes, accept: str
    ) -> None:
        ask = {"composite": "EpsilonGammaBox", "gamma": "1e38"}
        answer = api.post("/v1/explain", params=ask, content=image, headers={"Accept": accept})
        assert (answer.status_code, answer.json()["type"]) == (500, "/problems/unbalanced-ledger")
        assert "not finite" in answer.json()["detail"]


class TestLoad:
    def test_in_parallel_as_one_after_the_other(self, api: TestClient) -> None:
        images = [encoded(picture(seed)) for seed in range(8)]

        def explain(content: bytes) -> bytes:
            answer = api.post("/v1/explain", content=content, headers={"Accept": NPY})
            assert answer.status_code == 200
            return answer.content

        serial = [explain(content) for content in images]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(explain, images)) == serial

    def test_a_full_queue_says_when_to_come_back(
        self, prepared: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = threading.Event()
        settings = Settings(data=prepared, device="cpu", concurrency=1, queue=1)
        with TestClient(create_app(settings)) as api, ThreadPoolExecutor(2) as pool:
            real = api.app.state.service.engine.ready  # type: ignore[attr-defined]

            def slow(*arguments: object) -> object:
                gate.wait(30)
                return real(*arguments)

            while api.get("/readyz").status_code != 200:
                gate.wait(0.05)
            monkeypatch.setattr(api.app.state.service.engine, "ready", slow)  # type: ignore[attr-defined]
            waiting = [pool.submit(api.post, "/v1/explain", content=image) for _ in range(2)]
            pending = lambda: api.app.state.service.explaining._pending  # type: ignore[attr-defined]  # noqa: E731
            while pending() < 2:
                gate.wait(0.01)
            answer = api.post("/v1/explain", content=image)
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/overloaded")
            assert int(answer.headers["Retry-After"]) >= 1
            assert api.get("/healthz").status_code == 200
            gate.set()
            assert [future.result().status_code for future in waiting] == [200, 200]

    def test_each_network_is_loaded_once(
        self, prepared: Path, image: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loads: list[Path] = []
        real = service_module.Engine._load
        monkeypatch.setattr(
            service_module.Engine,
            "_load",
            lambda self, model: (loads.append(model.folder), real(self, model))[1],
        )
        with TestClient(create_app(Settings(data=prepared, device="cpu", concurrency=4))) as api:
            with ThreadPoolExecutor(8) as pool:
                names = [name for name in list(COMPOSITES)[:2] for _ in range(4)]
                answers = list(
                    pool.map(
                        lambda name: api.post("/v1/explain", params={"composite": name}, content=image),
                        names,
                    )
                )
            assert {answer.status_code for answer in answers} == {200}
        assert len(loads) == 1


def _png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims to be this large, and nothing more."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
