"""Looking inside over HTTP: layers, their relevance and top channels, relevance through channels, and contrasts."""

import io
import json
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import timm.models.vision_transformer
import torch
from fastapi.testclient import TestClient
from PIL import Image

from fusion.tracing import TRACING

NPY, NPZ, JSON = "application/x-npy", "application/x-npz", "application/json"
SIDE = 128  # of the built-in network


@pytest.fixture(scope="module")
def layer(api: TestClient) -> dict:
    """A convolution in the middle of the network, as the service describes it."""
    layers = api.get("/v1/models/builtin/layers").json()["layers"]
    convolutions = [layer for layer in layers if layer["op"] == "conv2d"]
    return convolutions[len(convolutions) // 2]


def ask(api: TestClient, image: bytes, accept: str, **query: object) -> httpx.Response:
    return api.post("/v1/explain", params=query, content=image, headers={"Accept": accept})


@pytest.fixture(scope="module")
def vit(api: TestClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The id of a network of 3 x 4 patches and 3 other tokens."""
    torch.manual_seed(0)
    module = timm.models.vision_transformer.VisionTransformer(
        img_size=(24, 32), patch_size=8, num_classes=5, embed_dim=12, depth=2, num_heads=2, reg_tokens=2
    )
    path = tmp_path_factory.mktemp("vit") / "vit.pt2"
    with TRACING:
        program = torch.export.export(
            module.eval(), (torch.randn(2, 3, 24, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        torch.export.save(program, path)
    answer = api.post(
        "/v1/models?filename=vit.pt2",
        content=path.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
    )
    assert answer.status_code == 201, answer.text
    yield answer.json()["id"]
    api.delete(f"/v1/models/{answer.json()['id']}")


class TestLayers:
    def test_every_listed_layer_can_be_asked_for(self, api: TestClient, image: bytes) -> None:
        layers = api.get("/v1/models/builtin/layers").json()["layers"]
        names = [layer["name"] for layer in layers]
        assert len(set(names)) == len(names) > 10
        for layer in layers[::7]:
            said = ask(api, image, JSON, layer=layer["name"])
            assert said.status_code == 200, said.text
            inner = said.json()["inner"]
            assert (inner["layer"], inner["channels"]) == (layer["name"], layer["channels"])
            assert inner["shape"] == [size for size in layer["shape"] if size is not None]

    def test_of_nobody_and_by_no_rules(self, api: TestClient) -> None:
        assert api.get("/v1/models/nobody/layers").json()["type"] == "/problems/model-not-found"
        answer = api.get("/v1/models/builtin/layers", params={"composite": "Magic"})
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-composite")


class TestAt:
    def test_arrays_words_and_picture_are_of_one_relevance(
        self, api: TestClient, image: bytes, layer: dict
    ) -> None:
        values = np.load(io.BytesIO(ask(api, image, NPY, layer=layer["name"]).content))
        assert list(values.shape) == layer["shape"][1:]
        pooled = np.load(io.BytesIO(ask(api, image, NPY, layer=layer["name"], pool="true").content))
        np.testing.assert_allclose(pooled, values.sum(0), rtol=1e-5, atol=1e-6)
        with np.load(io.BytesIO(ask(api, image, NPZ, layer=layer["name"]).content)) as arrays:
            np.testing.assert_array_equal(arrays["inner"], values)
            plain = np.load(io.BytesIO(ask(api, image, NPY).content))
            np.testing.assert_array_equal(arrays["relevance"], plain)
        inner = ask(api, image, JSON, layer=layer["name"], top=3).json()["inner"]
        by_channel = values.sum((1, 2))
        best = np.argsort(-by_channel)[:3]
        assert [entry["channel"] for entry in inner["top"]] == best.tolist()
        np.testing.assert_allclose([e["relevance"] for e in inner["top"]], by_channel[best], rtol=1e-4)
        assert inner["sum"] == pytest.approx(values.sum(), rel=1e-4)
        assert (inner["grid"], inner["outside"]) == (list(pooled.shape), 0)
        drawn = Image.open(io.BytesIO(ask(api, image, "image/png", layer=layer["name"]).content))
        assert drawn.size == (SIDE, SIDE)
        assert drawn.text["Layer"] == layer["name"]  # type: ignore[attr-defined]
        cells = np.asarray(drawn)[:: SIDE // pooled.shape[0], :: SIDE // pooled.shape[1]]
        np.testing.assert_array_equal(
            np.asarray(drawn), np.kron(cells, np.ones((SIDE // pooled.shape[0],) * 2 + (1,)))
        )
        assert drawn.tobytes() != Image.open(io.BytesIO(ask(api, image, "image/png").content)).tobytes()

    def test_what_has_no_places_has_no_picture(self, api: TestClient, image: bytes) -> None:
        flat = next(
            entry["name"]
            for entry in api.get("/v1/models/builtin/layers").json()["layers"]
            if len(entry["shape"]) == 2
        )
        answer = ask(api, image, "image/png", layer=flat)
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-layer")
        assert "ask for JSON" in answer.json()["detail"]
        assert ask(api, image, JSON, layer=flat).json()["inner"]["top"]

    def test_no_such_layer(self, api: TestClient, image: bytes) -> None:
        answer = ask(api, image, JSON, layer="layer99")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-layer")
        assert "layer99" in answer.json()["detail"]
        assert "Among the layers" in answer.json()["detail"]


class TestTokens:
    def test_the_map_of_tokens(self, api: TestClient, image: bytes, vit: str) -> None:
        layers = api.get(f"/v1/models/{vit}/layers").json()["layers"]
        layer = next(e for e in layers if e["shape"] == [None, 15, 12] and e["op"] == "linear")["name"]

        def found(accept: str, **query: object) -> httpx.Response:
            answer = api.post(
                f"/v1/models/{vit}/explain",
                params={"layer": layer, **query},
                content=image,
                headers={"Accept": accept},
            )
            assert answer.status_code == 200, answer.text
            return answer

        inner = found(JSON).json()["inner"]
        values = np.load(io.BytesIO(found(NPY).content))
        assert values.shape == (15, 12)
        assert inner["grid"] == [3, 4]
        assert inner["outside"] == pytest.approx(values[:3].sum(), rel=1e-4, abs=1e-6)
        want = values[3:].sum(1).reshape(3, 4)
        pooled = np.load(io.BytesIO(found(NPY, pool="true").content))
        np.testing.assert_allclose(pooled, want, rtol=1e-4, atol=1e-7)
        with np.load(io.BytesIO(found(NPZ).content)) as arrays:
            np.testing.assert_array_equal(arrays["inner_map"], pooled)
        drawn = Image.open(io.BytesIO(found("image/png").content))
        assert drawn.size == (32, 24)
        pixels = np.asarray(drawn)
        np.testing.assert_array_equal(pixels, np.kron(pixels[::8, ::8], np.ones((8, 8, 1))))
        assert (pixels[::8, ::8].std((0, 1)) > 0).any()

    def test_a_layer_of_one_place_alone_has_none(self, api: TestClient, image: bytes, vit: str) -> None:
        answer = api.post(
            f"/v1/models/{vit}/explain", params={"layer": "head"}, content=image, headers={"Accept": NPZ}
        )
        with np.load(io.BytesIO(answer.content)) as arrays:
            assert "inner_map" not in arrays
            inner = json.loads(arrays["summary"].tobytes())["inner"]
        assert (inner["grid"], inner["outside"]) == (None, None)


class TestThrough:
    def test_the_channels_add_up(self, api: TestClient, image: bytes) -> None:
        """At a layer that nothing goes past."""
        layers = api.get("/v1/models/builtin/layers").json()["layers"]
        layer = next(layer for layer in layers if layer["op"] == "conv2d")
        half = layer["channels"] // 2
        parts = [range(half), range(half, layer["channels"])]
        maps = [
            np.load(io.BytesIO(ask(api, image, NPY, through=json.dumps({layer["name"]: list(part)})).content))
            for part in parts
        ]
        whole = np.load(io.BytesIO(ask(api, image, NPY).content))
        scale = np.abs(whole).max()
        np.testing.assert_allclose((maps[0] + maps[1]) / scale, whole / scale, atol=1e-4)
        assert all(np.abs(part - whole).max() > 1e-3 * scale for part in maps)

    def test_the_ledger_has_the_rest(self, api: TestClient, image: bytes, layer: dict) -> None:
        said = ask(api, image, JSON, through=json.dumps({layer["name"]: 0}), layer=layer["name"]).json()
        assert said["through"] == {layer["name"]: [0]}
        assert [e for e in said["ledger"]["entries"] if e["op"] == "through"]
        assert said["sums"]["input"] + said["sums"]["kept"] == pytest.approx(said["sums"]["score"], rel=1e-3)
        assert all(entry["relevance"] == 0 for entry in said["inner"]["top"] if entry["channel"] != 0)

    @pytest.mark.parametrize(
        ("through", "code", "word"),
        [
            ("{", "invalid-parameter", "JSON"),
            ("[3]", "invalid-parameter", "object of layers"),
            ("{}", "invalid-parameter", "object of layers"),
            ('{"LAYER": [true]}', "invalid-parameter", "whole numbers"),
            ('{"LAYER": "3"}', "invalid-parameter", "whole numbers"),
            ('{"LAYER": []}', "bad-layer", "at least one"),
            ('{"LAYER": [99999]}', "bad-layer", "no channel 99999"),
            ('{"LAYER": [-1]}', "bad-layer", "no channel -1"),
            ('{"nowhere": [1]}', "bad-layer", "nowhere"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, api: TestClient, image: bytes, layer: dict, through: str, code: str, word: str
    ) -> None:
        answer = ask(api, image, JSON, through=through.replace("LAYER", layer["name"]))
        assert (answer.status_code, answer.json()["type"]) == (422, f"/problems/{code}")
        assert word in answer.json()["detail"]


class TestAgainst:
    def test_a_contrast_is_the_difference(self, api: TestClient, image: bytes) -> None:
        scores = {
            p["index"]: p["score"]
            for p in api.post("/v1/predict?top=10", content=image).json()["predictions"]
        }
        label = api.get("/v1/models/builtin").json()["labels"][4]
        said = ask(api, image, JSON, target=1, against=label).json()
        assert said["against"] == {"index": 4, "label": label}
        assert said["target"]["score"] == pytest.approx(scores[1] - scores[4], rel=1e-4, abs=1e-4)
        both = np.load(io.BytesIO(ask(api, image, NPY, target=1, against=4).content))
        one, other = (np.load(io.BytesIO(ask(api, image, NPY, target=t).content)) for t in (1, 4))
        np.testing.assert_allclose(both, one - other, atol=1e-4 * np.abs(one).max())

    def test_all_others(self, api: TestClient, image: bytes) -> None:
        scores = [p["score"] for p in api.post("/v1/predict?top=10", content=image).json()["predictions"]]
        said = ask(api, image, JSON, against="others").json()
        assert said["against"] == "others"
        assert said["target"]["score"] == pytest.approx(scores[0] - sum(scores[1:]) / 9, rel=1e-4)
        assert ask(api, image, JSON).json().get("against") is None

    @pytest.mark.parametrize(
        ("against", "word"), [("3", "two different"), ("10", "0 to 9"), ("unicorn", "unicorn")]
    )
    def test_what_is_wrong_is_named(self, api: TestClient, image: bytes, against: str, word: str) -> None:
        answer = ask(api, image, JSON, target=3, against=against)
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-target")
        assert word in answer.json()["detail"]


def test_it_is_in_the_openapi_document(api: TestClient) -> None:
    document = api.get("/openapi.json").json()
    for path in ("/v1/explain", "/v1/models/{model_id}/explain"):
        operation = document["paths"][path]["post"]
        parameters = {p["name"]: p for p in operation["parameters"]}
        assert all(parameters[name]["description"] for name in ("against", "layer", "top", "through"))
        assert "bad-layer" in operation["responses"]["422"]["content"]["application/problem+json"]["examples"]
    assert {"inner", "against", "through"} <= set(
        document["components"]["schemas"]["ExplanationSummary"]["properties"]
    )
