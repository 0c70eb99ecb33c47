"""Networks without class scores over HTTP: what they answer is listed, and any of it can be explained."""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from clearfold_client import calls
from clearfold_client.results import Explanation, Model
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor, nn

from app.main import create_app
from app.settings import Settings
from fusion.tracing import TRACING
from models.convert import convert
from models.store import Store

SIDE = 16
JSON, NPY, NPZ = "application/json", "application/x-npy", "application/x-npz"


class Segmenter(nn.Module):
    """A map of classes, and an embedding; `out` ends in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.head, self.norm = nn.Conv2d(6, 4, 1), nn.LayerNorm(6)
        nn.init.normal_(self.head.weight, std=3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        big = nn.functional.interpolate(self.head(y), (SIDE, SIDE), mode="bilinear")
        return {"out": big.softmax(1), "embedding": self.norm(y.mean((2, 3)))}


class Labels(nn.Module):
    """Several labels may hold of an image: a sigmoid decides each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3))).sigmoid()  # type: ignore[no-any-return]


def added(store: Store, module: nn.Module, name: str) -> None:
    file = store.root / f"{name}.pt2"
    with TRACING:
        shapes = ({0: torch.export.Dim("batch")},)
        example = (torch.randn(2, 3, SIDE, SIDE),)
        torch.export.save(torch.export.export(module.eval(), example, dynamic_shapes=shapes), file)
    with store.workspace() as work:
        convert(file, work / "artefact", name=name)
        store.publish(work / "artefact", hashlib.sha256(file.read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def api(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The service with the segmenter as its default network."""
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("outputs") / "data"))
    store = Store(folder)
    added(store, Segmenter(), "segmenter")
    added(store, Labels(), "labels")
    with TestClient(create_app(Settings(data=folder, device="cpu", default_model="segmenter"))) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> bytes:
    return png(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def said(api: TestClient, image: bytes, target: object = None, **files: bytes) -> dict:
    """The JSON answer; files are sent as a form."""
    text = target if isinstance(target, str | None) else json.dumps(target)
    params = {} if text is None else {"target": text}
    if files:
        answer = api.post(
            "/v1/explain", files={"image": image, **files}, params=params, headers={"Accept": JSON}
        )
    else:
        answer = api.post("/v1/explain", content=image, params=params, headers={"Accept": JSON})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_the_outputs_are_listed(api: TestClient) -> None:
    model = api.get("/v1/models/segmenter").json()
    assert model["classes"] is None
    assert model["outputs"] == [
        {"name": "out", "kind": "map", "shape": [None, 4, SIDE, SIDE]},
        {"name": "embedding", "kind": "vector", "shape": [None, 6]},
    ]
    read = Model.from_json(model)
    assert (read.classes, [output.kind for output in read.outputs]) == (None, ["map", "vector"])
    assert read.default_output == model["default_output"] == "out"


def test_the_shortest_call_says_what_it_explained(api: TestClient, image: bytes) -> None:
    answer = said(api, image)
    target = answer["target"]
    assert answer["prediction"] is None
    assert target["output"] == "out"
    assert target["index"] is None
    assert "where it wins" in target["explained"]
    assert "before the final softmax" in target["explained"]
    assert answer["balanced"] is True
    assert answer["sums"]["score"] == pytest.approx(target["score"])
    picture = api.post("/v1/explain", content=image)
    assert picture.headers["content-type"] == "image/png"
    assert "X-Clearfold-Target" not in picture.headers
    assert "where it wins" in picture.headers["X-Clearfold-Explained"]


def test_a_target_as_json(api: TestClient, image: bytes) -> None:
    box = said(api, image, {"channel": 1, "region": {"box": [0, 0, 4, 8]}, "reduce": "mean"})["target"]
    assert (box["channel"], box["places"]) == (1, 32)
    one = said(api, image, {"output": "out", "index": [1, 0, 0]})["target"]
    assert one["position"] == [1, 0, 0]
    mask = np.zeros((SIDE, SIDE))
    mask[:4, :8] = 1
    same = said(api, image, {"channel": 1, "region": {"mask": mask.tolist()}, "reduce": "mean"})["target"]
    assert same["score"] == pytest.approx(box["score"], rel=1e-5)
    norm = said(api, image, {"output": "embedding"})["target"]
    assert norm["explained"] == "the norm of 'embedding'"
    winner = said(api, image)["target"]
    assert said(api, image, str(winner["channel"]))["target"]["score"] == pytest.approx(winner["score"])


def test_a_form_brings_a_mask_and_a_reference(api: TestClient, image: bytes) -> None:
    box = said(api, image, {"channel": 1, "region": {"box": [0, 0, 4, 8]}})["target"]
    painted = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    painted[:4, :8] = 255
    masked = said(api, image, {"channel": 1}, mask=png(painted))["target"]
    assert masked["score"] == pytest.approx(box["score"], rel=1e-5)
    itself = said(api, image, {"output": "embedding"}, reference=image)["target"]
    assert itself["score"] == pytest.approx(1, rel=1e-5)
    assert "the cosine" in itself["explained"]
    form = {"target": json.dumps({"channel": 1, "region": {"box": [0, 0, 4, 8]}})}
    answer = api.post("/v1/explain", files={"image": image}, data=form, headers={"Accept": JSON})
    assert answer.json()["target"] == box


def test_labels_name_the_channels(api: TestClient, image: bytes) -> None:
    labels = ["sky", "tree", "road", "car"]
    assert api.patch("/v1/models/segmenter", json={"labels": labels}).json()["labels"] == labels
    target = said(api, image, {"channel": "tree", "reduce": "mean"})["target"]
    assert (target["channel"], target["label"]) == (1, "tree")
    wrong = api.patch("/v1/models/segmenter", json={"labels": labels[:2]})
    assert (wrong.status_code, wrong.json()["detail"]) == (
        422,
        "labels: There must be 4 labels, one per class, not 2.",
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ('{"output": "aux"}', "'out' (map, N x 4 x 16 x 16), 'embedding' (vector, N x 6)"),
        ('{"channel": 9}', "0 to 3"),
        ('{"region": {"box": [0, 0, 99, 1]}}', "16 rows and 16 columns"),
        ('{"index": [0, 0, 16]}', "0 to 15"),
        ('{"chanel": 1}', "chanel"),
        ("{", "JSON"),
        ('{"channel": "cloud"}', "cloud"),
        ("unicorn", "unicorn"),
    ],
)
def test_what_does_not_fit_is_named(api: TestClient, image: bytes, target: str, words: str) -> None:
    answer = api.post("/v1/explain", content=image, params={"target": target})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-target")
    assert words in answer.json()["detail"]


def test_questions_about_classes_have_no_answer(api: TestClient, image: bytes) -> None:
    for answer in (
        api.post("/v1/predict", content=image),
        api.post("/v1/explain", content=image, params={"against": "others"}),
    ):
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/no-class-scores")


def test_other_methods_explain_outputs_too(api: TestClient, image: bytes) -> None:
    params = {"target": '{"channel": 1, "reduce": "mean"}', "method": "InputXGradient"}
    answer = api.post("/v1/explain", content=image, params=params, headers={"Accept": JSON}).json()
    assert answer["target"]["explained"].startswith("the mean of channel 1 of 'out'")


def test_the_client_asks_and_reads(api: TestClient, image: bytes) -> None:
    call = calls.explain(image, target={"output": "embedding"}, reference=image)
    answer = api.post(
        f"/{call.path}", params=call.query, files=call.files, data=call.form, headers=dict(call.headers)
    )
    explanation = call.parse(answer)
    assert isinstance(explanation, Explanation)
    assert explanation.prediction is None
    assert explanation.target.output == "embedding"
    assert explanation.score == pytest.approx(1, rel=1e-5)
    plain = calls.explain(image, target={"channel": 1})
    assert (plain.query["target"], plain.body) == ('{"channel": 1}', image)


def test_a_softmax_that_was_left_out_is_said_for_classes_too(prepared: Path, image: bytes) -> None:
    with TestClient(create_app(Settings(data=prepared, device="cpu"))) as client:
        target = client.post("/v1/explain", content=image, headers={"Accept": JSON}).json()["target"]
    assert target["explained"] == f"class {target['index']} of '{target['output']}'"


def test_labels_that_a_sigmoid_decides_have_probabilities_of_their_own(api: TestClient, image: bytes) -> None:
    predictions = api.post("/v1/models/labels/predict", content=image).json()["predictions"]
    for one in predictions:
        assert one["probability"] == pytest.approx(1 / (1 + np.exp(-one["score"])))
    answer = api.post("/v1/models/labels/explain", content=image, headers={"Accept": JSON}).json()
    assert answer["sums"]["score"] == pytest.approx(predictions[0]["score"], rel=1e-5)
    assert "before the final sigmoid" in answer["target"]["explained"]
