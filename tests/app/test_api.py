"""What holds for the whole API: problem documents, headers, the OpenAPI document, health, samples."""

import io
import logging
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from app import errors
from app.main import create_app
from app.middleware import Envelope
from app.problems import KINDS
from app.settings import Settings
from tests.support.served import eventually


class TestProblems:
    @pytest.mark.parametrize(
        ("method", "path", "status", "code"),
        [
            ("GET", "/v1/nothing", 404, "not-found"),
            ("GET", "/static/nothing.js", 404, "not-found"),
            ("GET", "/v1/models/nobody", 404, "model-not-found"),
            ("GET", "/v1/samples/unicorn.png", 404, "not-found"),
            ("DELETE", "/v1/models", 405, "method-not-allowed"),
            ("POST", "/healthz", 405, "method-not-allowed"),
            ("PATCH", "/v1/models/builtin", 422, "invalid-parameter"),
            ("POST", "/v1/predict?top=0", 422, "invalid-parameter"),
        ],
    )
    def test_every_error_is_a_problem_document(
        self, api: TestClient, method: str, path: str, status: int, code: str
    ) -> None:
        answer = api.request(method, path)
        assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")
        problem = answer.json()
        assert problem["type"] == f"/problems/{code}"
        assert problem["status"] == status
        assert problem["title"] == KINDS[code].title
        assert problem["detail"]
        assert problem["instance"] == answer.headers["X-Request-ID"]

    def test_its_type_is_an_address(self, api: TestClient) -> None:
        for code, kind in KINDS.items():
            assert api.get(f"/problems/{code}").json()["title"] == kind.title
        assert api.get("/problems/none").status_code == 404

    def test_a_mistake_of_ours_shows_nothing_but_an_id(self) -> None:
        log = io.StringIO()
        handler = logging.StreamHandler(log)
        logging.getLogger("app.middleware").addHandler(handler)
        app = FastAPI()
        errors.install(app)
        app.add_middleware(Envelope)

        @app.get("/")
        def fail() -> None:
            raise KeyError("the secret")

        answer = TestClient(app).get("/", headers={"X-Request-ID": "my-request"})
        logging.getLogger("app.middleware").removeHandler(handler)
        assert (answer.status_code, answer.json()["type"]) == (500, "/problems/internal-error")
        assert "secret" not in answer.text
        assert (answer.json()["instance"], answer.headers["X-Request-ID"]) == ("my-request", "my-request")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "the secret" in log.getvalue()
        assert "my-request" in log.getvalue()


class TestHeaders:
    @pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/static/index.html"])
    def test_security_headers_are_everywhere(self, api: TestClient, path: str) -> None:
        headers = api.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert "img-src 'self' blob: data:" in headers["Content-Security-Policy"]
        assert re.fullmatch(r"[0-9a-f]{32}", headers["X-Request-ID"])

    def test_an_odd_request_id_is_not_repeated(self, api: TestClient) -> None:
        assert (
            api.get("/healthz", headers={"X-Request-ID": "a b<script>"}).headers["X-Request-ID"]
            != "a b<script>"
        )


class TestOpenApi:
    @pytest.fixture
    def document(self, api: TestClient) -> dict:
        return api.get("/openapi.json").json()

    def test_every_operation_is_described(self, document: dict) -> None:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                assert operation["summary"], (method, path)
                assert operation["tags"], (method, path)
                responses = operation["responses"]
                assert "500" in responses, (method, path)
                failures = [response for status, response in responses.items() if status >= "400"]
                assert all("application/problem+json" in response["content"] for response in failures), (
                    method,
                    path,
                )
                for status, response in responses.items():
                    assert status == "204" or response.get("content"), (method, path, status)

    def test_bodies_are_described(self, document: dict) -> None:
        for path, operations in document["paths"].items():
            if "post" in operations:
                content = operations["post"]["requestBody"]["content"]
                assert all("schema" in entry for entry in content.values()), path
        explain = document["paths"]["/v1/explain"]["post"]
        assert {"image/png", "image/jpeg", "multipart/form-data"} <= set(explain["requestBody"]["content"])
        assert set(explain["responses"]["200"]["content"]) == {
            "image/png",
            "application/x-npy",
            "application/x-npz",
            "application/json",
        }
        assert {parameter["name"] for parameter in explain["parameters"]} >= {
            "target",
            "composite",
            "view",
            "cmap",
        }

    def test_every_reference_leads_somewhere(self, document: dict) -> None:
        schemas = document["components"]["schemas"]
        references = set(re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(document)))
        assert references
        assert references <= set(schemas)
        assert "HTTPValidationError" not in references


class TestHealth:
    def test_ready_when_the_default_network_is(self, api: TestClient) -> None:
        assert api.get("/healthz").json() == {"status": "ok"}
        while (answer := api.get("/readyz")).status_code == 503:
            assert "preparing" in answer.json()["detail"]
            assert answer.headers["Retry-After"]
        assert answer.json()["status"] == "ready"

    def test_an_operator_sees_what_uploads_are_read_in(self, api: TestClient) -> None:
        eventually(lambda: api.get("/readyz").json().get("sandbox"))
        sandbox = api.get("/readyz").json()["sandbox"]
        assert {*sandbox["layers"], *sandbox["missing"]} == {"privileges", "landlock", "seccomp", "limits"}
        assert "memory" in sandbox["layers"]["limits"]

    def test_a_default_network_that_is_missing_is_said_to_be(self, prepared: Path) -> None:
        settings = Settings(data=prepared, device="cpu", default_model="nobody")
        with TestClient(create_app(settings)) as api:
            while "preparing" in (answer := api.get("/readyz")).text:
                pass
            assert answer.status_code == 503
            assert "nobody" in answer.json()["detail"]
            assert api.post("/v1/explain", content=b"x").json()["type"] == "/problems/model-not-ready"
            assert api.get("/v1/models/builtin").status_code == 200


def test_samples_are_images_that_the_default_network_explains(api: TestClient) -> None:
    samples = api.get("/v1/samples").json()["samples"]
    assert samples
    for sample in samples:
        answer = api.get(sample["url"])
        assert answer.headers["Content-Type"] == "image/png"
        Image.open(io.BytesIO(answer.content)).verify()
    assert api.post("/v1/explain", content=answer.content).status_code == 200


def test_the_page_is_served(api: TestClient) -> None:
    answer = api.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "Clearfold" in answer.text
