"""A whole detector over HTTP: uploaded with its suppression, explained by what that chooses from, and said so."""

import hashlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from onnx import helper, numpy_helper
from PIL import Image

from app.main import create_app
from app.settings import Settings
from models.convert import convert
from models.store import Store

SIDE = 16
JSON = "application/json"


def detector(batch: int | str) -> onnx.ModelProto:
    """Scores [N, 3, 64] and boxes [N, 64, 4] of a place each, and NonMaxSuppression of another runtime behind them."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.5).astype(np.float32)

    weights = {
        "stem": weight(8, 3, 3, 3),
        "head": weight(7, 8, 1, 1),
        "rows": np.array([0, 7, -1]),
        "parts": np.array([4, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["images", "stem"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["f"]),
        helper.make_node("Conv", ["f", "head"], ["h"]),
        helper.make_node("Reshape", ["h", "rows"], ["r"]),
        helper.make_node("Split", ["r", "parts"], ["coordinates", "logits"], axis=1),
        helper.make_node("Transpose", ["coordinates"], ["boxes"], perm=[0, 2, 1]),
        helper.make_node("Transpose", ["logits"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Sigmoid", ["turned"], ["scores"]),
        helper.make_node("EfficientNMS_TRT", ["boxes", "scores"], ["count", "kept"], "nms", domain="TRT"),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_empty_tensor_value_info(name) for name in ("count", "kept")],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("TRT", 1)], ir_version=8
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = "names", "{0: 'cat', 1: 'dog', 2: 'bird'}"
    return model


@pytest.fixture(scope="module")
def api(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("detectors") / "data"))
    store = Store(folder)
    for name, batch in (("detector", "N"), ("single", 1)):
        file = folder / f"{name}.onnx"
        file.write_bytes(detector(batch).SerializeToString())
        with store.workspace() as work:
            convert(file, work / "artefact", name=name)
            store.publish(work / "artefact", hashlib.sha256(file.read_bytes()).hexdigest())
    with TestClient(create_app(Settings(data=folder, device="cpu", default_model="detector"))) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["detector", "single"])
def test_what_suppression_chooses_from_is_listed_and_said(api: TestClient, name: str) -> None:
    model = api.get(f"/v1/models/{name}").json()
    assert [(output["name"], output["kind"]) for output in model["outputs"]] == [
        ("scores", "rows"),
        ("boxes", "boxes"),
    ]
    assert model["labels"] == ["cat", "dog", "bird"]
    assert any("everything behind 'nms' is left off" in note for note in model["notes"])
    assert model["certificate"]["max_relative"] < 1e-5


@pytest.mark.parametrize("name", ["detector", "single"])
def test_the_best_score_is_explained_by_default(api: TestClient, image: bytes, name: str) -> None:
    answer = api.post(f"/v1/models/{name}/explain", content=image, headers={"Accept": JSON}).json()
    assert answer["target"]["output"] == "scores"
    assert "the largest value" in answer["target"]["explained"]
    assert answer["balanced"] is True


def test_a_class_by_its_label_and_a_box(api: TestClient, image: bytes) -> None:
    def target(text: str) -> dict:
        answer = api.post("/v1/explain", content=image, params={"target": text}, headers={"Accept": JSON})
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["target"])

    dog = target('{"output": "scores", "channel": "dog", "reduce": "max"}')
    assert (dog["channel"], dog["label"]) == (1, "dog")
    assert target('{"output": "boxes", "index": [17, 0]}')["position"] == [17, 0]
