"""The networks over HTTP: upload, list, describe, change, download, delete."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest
import torch
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.support.served import (
    CLASSES,
    SIZE,
    Branches,
    Running,
    encoded,
    eventually,
    picture,
    save_onnx,
    tiny_network,
)

pytestmark = pytest.mark.usefixtures("quick")

BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def api(data: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(data=data, device="cpu"))) as client:
        # Tracing a network, here in this process, disturbs another that is made ready at the same time.
        eventually(lambda: client.get("/readyz").status_code == 200)
        yield client


def upload(api: httpx.Client, file: Path, **query: str) -> httpx.Response:
    return api.post(
        "/v1/models", params={"filename": file.name, **query}, content=file.read_bytes(), headers=BINARY
    )


def work_left(data: Path) -> list[Path]:
    return [path for folder in ("tmp", "trash") for path in (data / folder).iterdir()]


class TestUpload:
    def test_a_new_file_is_converted_and_listed(self, api: TestClient, onnx_file: Path, data: Path) -> None:
        answer = upload(api, onnx_file, name="my tiny", mean="0.1,0.2,0.3", order="BGR")
        assert answer.status_code == 201, answer.text
        model = answer.json()
        assert model["id"] == sha256(onnx_file.read_bytes()).hexdigest()
        assert answer.headers["Location"] == f"/v1/models/{model['id']}"
        assert (model["name"], model["format"], model["classes"]) == ("my tiny", "onnx", CLASSES)
        assert model["input"]["size"] == [SIZE, SIZE]
        assert (model["input"]["mean"], model["input"]["order"]) == ([0.1, 0.2, 0.3], "BGR")
        assert model["fusion"] == {"folded": 2, "partly": 0, "kept": 0}
        assert model["certificate"]["max_relative"] < 1e-5
        assert model["default"] is False
        assert api.get("/v1/models").json()["models"][1] == model
        assert work_left(data) == []

    def test_only_the_artefact_is_kept(self, api: TestClient, onnx_file: Path, data: Path) -> None:
        model = upload(api, onnx_file).json()
        kept = {path.name for path in (data / "models" / model["id"]).rglob("*") if path.is_file()}
        assert kept == {"graph.json", "weights.safetensors", "manifest.json"}

    def test_the_same_file_twice_is_one_model(self, api: TestClient, onnx_file: Path) -> None:
        first, again = upload(api, onnx_file), upload(api, onnx_file)
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json() == again.json()
        assert len(api.get("/v1/models").json()["models"]) == 2

    def test_the_same_file_with_another_name_is_renamed(self, api: TestClient, onnx_file: Path) -> None:
        upload(api, onnx_file, name="one")
        assert upload(api, onnx_file, name="two").json()["name"] == "two"

    def test_another_description_takes_the_place_of_the_old_one(
        self, api: TestClient, onnx_file: Path, data: Path
    ) -> None:
        first = upload(api, onnx_file, name="net").json()
        image = encoded(picture())
        before = api.post(f"/v1/models/{first['id']}/predict", content=image).json()
        answer = upload(api, onnx_file, mean="0,0,0", std="1,1,1")
        assert (answer.status_code, answer.json()["id"], answer.json()["name"]) == (200, first["id"], "net")
        assert answer.json()["input"]["mean"] == [0, 0, 0]
        assert api.post(f"/v1/models/{first['id']}/predict", content=image).json() != before
        assert len(list((data / "models" / first["id"]).iterdir())) == 1
        assert work_left(data) == []

    def test_the_same_file_at_the_same_time_is_one_model(
        self, server: Running, other_onnx_file: Path
    ) -> None:
        with httpx.Client(base_url=server.url, timeout=120) as api, ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: upload(api, other_onnx_file), range(4)))
            assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]
            assert len({answer.json()["id"] for answer in answers}) == 1
            api.delete(f"/v1/models/{answers[0].json()['id']}")

    @pytest.mark.parametrize(
        ("query", "field"),
        [
            ({"size": "big"}, "size"),
            ({"size": "0x4"}, "size"),
            ({"mean": "a,b"}, "mean"),
            ({"mean": "1,,2"}, "mean"),
            ({"order": "RBG"}, "order"),
            ({"scale": "-1"}, "scale"),
            ({"name": ""}, "name"),
        ],
    )
    def test_a_wrong_statement_is_named(
        self, api: TestClient, onnx_file: Path, query: dict[str, str], field: str
    ) -> None:
        answer = upload(api, onnx_file, **query)
        assert answer.status_code == 422
        assert answer.json()["type"] == "/problems/invalid-parameter"
        assert field in answer.json()["detail"]

    def test_a_statement_that_does_not_fit_the_network(self, api: TestClient, onnx_file: Path) -> None:
        answer = upload(api, onnx_file, mean="0.5,0.5")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-input")
        assert "mean has 2 values for 3 channels" in answer.json()["detail"]

    def test_a_form_without_files_is_no_file(self, api: TestClient) -> None:
        answer = api.post("/v1/models", data={"file": "net.onnx"})
        assert answer.status_code == 415
        assert "application/octet-stream" in answer.json()["detail"]

    @pytest.mark.parametrize(
        "filename", ["../../../../tmp/evil.onnx", "a/b\\..\\c.onnx", ".hidden", "", "artefact"]
    )
    def test_a_file_name_is_only_a_name(
        self, api: TestClient, onnx_file: Path, data: Path, filename: str
    ) -> None:
        before = {path for path in data.parent.rglob("*") if "models" not in path.parts}
        answer = api.post(
            "/v1/models", params={"filename": filename}, content=onnx_file.read_bytes(), headers=BINARY
        )
        assert answer.status_code == 201, answer.text
        assert "/" not in answer.json()["name"]
        assert {path for path in data.parent.rglob("*") if "models" not in path.parts} == before


class TestReading:
    def test_a_description_has_the_report_the_certificate_and_the_layers(
        self, api: TestClient, onnx_file: Path
    ) -> None:
        model = upload(api, onnx_file).json()
        whole = api.get(f"/v1/models/{model['id'][:8]}").json()
        assert [row["outcome"] for row in whole["fusion"]["rows"]] == ["folded", "folded"]
        assert all(row["into"] for row in whole["fusion"]["rows"])
        assert whole["certificate"]["inputs"] >= 8
        assert whole["layers"][0]["shape"] == [None, 8, SIZE, SIZE]
        assert {key: whole[key] for key in model if key != "fusion"} == {
            key: value for key, value in model.items() if key != "fusion"
        }

    def test_a_description_names_the_layers_that_became_one(self, api: TestClient, tmp_path: Path) -> None:
        model = upload(api, save_onnx(Branches().eval(), tmp_path / "branches.onnx")).json()
        whole = api.get(f"/v1/models/{model['id']}").json()
        assert whole["fusion"]["merged"] == [{"layer": "narrow", "into": "wide"}]

    def test_the_builtin_network_is_the_default(self, api: TestClient) -> None:
        (model,) = api.get("/v1/models").json()["models"]
        assert (model["id"], model["default"], model["classes"]) == ("builtin", True, 10)
        assert len(model["labels"]) == 10

    @pytest.mark.parametrize("unknown", ["f" * 64, "f" * 8, "nobody", "..%2f..%2fetc", "%00"])
    def test_an_unknown_network(self, api: TestClient, unknown: str) -> None:
        answer = api.get(f"/v1/models/{unknown}")
        assert answer.status_code == 404
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "list the models" in answer.json()["detail"] or "openapi.json" in answer.json()["detail"]

    def test_the_fused_network_as_onnx_computes_the_same(
        self, api: TestClient, onnx_file: Path, tmp_path: Path, data: Path
    ) -> None:
        model = upload(api, onnx_file).json()
        answer = api.get(f"/v1/models/{model['id']}/fused", params={"format": "onnx"})
        assert answer.headers["Content-Disposition"] == 'attachment; filename="tiny.fused.onnx"'
        session = onnxruntime.InferenceSession(answer.content, providers=["CPUExecutionProvider"])
        x = torch.rand(3, 3, SIZE, SIZE)
        (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(scores, tiny_network()(x).numpy(), rtol=1e-4, atol=1e-5)
        assert work_left(data) == []

    def test_the_fused_network_as_a_torch_export_program_computes_the_same(
        self, api: TestClient, onnx_file: Path, tmp_path: Path
    ) -> None:
        model = upload(api, onnx_file).json()
        file = tmp_path / "fused.pt2"
        file.write_bytes(api.get(f"/v1/models/{model['id']}/fused", params={"format": "pt2"}).content)
        x = torch.rand(3, 3, SIZE, SIZE)
        with torch.no_grad():
            torch.testing.assert_close(
                torch.export.load(file).module()(x), tiny_network()(x), rtol=1e-4, atol=1e-5
            )

    def test_no_other_format(self, api: TestClient) -> None:
        assert api.get("/v1/models/builtin/fused", params={"format": "h5"}).status_code == 422


class TestChanging:
    def test_name_labels_and_input(self, api: TestClient, onnx_file: Path) -> None:
        address = upload(api, onnx_file).headers["Location"]
        labels = ["cat", "dog", "eel", "fox", "gnu"]
        wanted = {"name": "zoo", "labels": labels, "input": {"mean": [0, 0, 0], "scale": 1}}
        changed = api.patch(address, json=wanted).json()
        assert (changed["name"], changed["labels"]) == ("zoo", labels)
        assert (changed["input"]["mean"], changed["input"]["scale"]) == ([0, 0, 0], 1)
        assert api.get("/v1/models/zoo").json()["labels"] == labels
        answer = api.post(address + "/explain", params={"target": "eel"}, content=encoded(picture()))
        assert (answer.headers["X-Clearfold-Target"], answer.headers["X-Clearfold-Label"]) == ("2", "eel")

    def test_a_changed_input_counts_at_once(self, api: TestClient, onnx_file: Path) -> None:
        address = upload(api, onnx_file).headers["Location"]
        image = encoded(picture())
        before = api.post(address + "/predict", content=image).json()
        api.patch(address, json={"input": {"order": "BGR"}})
        assert api.post(address + "/predict", content=image).json() != before

    @pytest.mark.parametrize(
        ("wanted", "word"),
        [
            ({"labels": ["one"]}, "5 labels"),
            ({"input": {"size": [16, 16]}}, "upload the file again"),
            ({"input": {"std": [0, 0, 0]}}, "std must be above 0"),
            ({"input": {"nonsense": 1}}, "nonsense"),
            ({"format": "onnx"}, "format"),
        ],
    )
    def test_what_cannot_be(
        self, api: TestClient, onnx_file: Path, wanted: dict[str, object], word: str
    ) -> None:
        address = upload(api, onnx_file).headers["Location"]
        before = api.get(address).json()
        answer = api.patch(address, json=wanted)
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid-parameter")
        assert word in answer.json()["detail"]
        assert api.get(address).json() == before

    def test_an_upload_that_states_what_was_changed_since_counts(
        self, api: TestClient, onnx_file: Path
    ) -> None:
        address = upload(api, onnx_file, order="RGB").headers["Location"]
        api.patch(address, json={"input": {"order": "BGR"}})
        assert upload(api, onnx_file).json()["input"]["order"] == "BGR"
        assert upload(api, onnx_file, order="RGB").json()["input"]["order"] == "RGB"


class TestDeleting:
    def test_it_is_gone_and_can_come_back(self, api: TestClient, onnx_file: Path, data: Path) -> None:
        address = upload(api, onnx_file).headers["Location"]
        assert api.delete(address).status_code == 204
        assert api.get(address).status_code == 404
        assert api.delete(address).status_code == 404
        assert api.post(address + "/explain", content=encoded(picture())).status_code == 404
        assert work_left(data) == []
        assert upload(api, onnx_file).status_code == 201
        assert api.post(address + "/explain", content=encoded(picture())).status_code == 200

    def test_the_builtin_network_stays(self, api: TestClient) -> None:
        answer = api.delete("/v1/models/builtin")
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/model-protected")
