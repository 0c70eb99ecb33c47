"""Networks that are uploaded together with their data files: forms, what they may hold, and what comes of them."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import onnx
import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request

from app import forms, uploads
from app.main import create_app
from app.problems import Problem
from app.settings import Settings
from models.beside import MOST_FILES, identity
from tests.support import hostile
from tests.support.served import CLASSES, eventually

MIB = 2**20
BOUNDARY = "limit"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
Part = tuple[str, str | None, bytes]


def form(*parts: Part) -> bytes:
    body = b""
    for field, filename, content in parts:
        name = "" if filename is None else f'; filename="{filename}"'
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"{name}\r\nX-Other: 1\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


class TestForms:
    PARTS: tuple[Part, ...] = (
        ("file", "net.onnx", b"a\r\n--limi\r\n--limited\r\n"),
        ("data", "größe 1.bin", b""),
        ("data", "w", bytes(range(256)) * 3),
        ("text", None, b"of no file"),
    )

    def read(self, body: bytes, step: int, content_type: str = CONTENT_TYPE) -> list[Part]:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), step):
                yield body[start : start + step]

        async def gathered() -> list[Part]:
            found = []
            async for head, content in forms.parts(content_type, pieces()):
                found.append((head.field, head.filename, b"".join([piece async for piece in content])))
            return found

        return asyncio.run(gathered())

    @pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 10_000])
    def test_what_went_in_comes_out_however_it_is_cut(self, step: int) -> None:
        assert self.read(form(*self.PARTS), step) == list(self.PARTS)

    def test_content_that_is_not_read_is_passed_over(self) -> None:
        async def heads() -> list[str | None]:
            async def body() -> AsyncIterator[bytes]:
                yield form(*self.PARTS)

            return [head.filename async for head, _ in forms.parts(CONTENT_TYPE, body())]

        assert asyncio.run(heads()) == [filename for _, filename, _ in self.PARTS]

    def test_one_that_is_cut_off(self) -> None:
        body = form(*self.PARTS)
        for length in (0, 5, 60, len(body) // 2, len(body) - 6):
            with pytest.raises(Problem, match="ends in the middle"):
                self.read(body[:length], 50)

    @pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary="])
    def test_one_without_a_boundary(self, content_type: str) -> None:
        with pytest.raises(Problem, match="no boundary"):
            self.read(form(*self.PARTS), 50, content_type)

    def test_nonsense(self) -> None:
        with pytest.raises(Problem, match="cannot be read"):
            self.read(b"Buy milk.", 50)
        endless = form(("f" * 10_000, "n", b""))
        with pytest.raises(Problem, match="cannot be read"):
            self.read(endless, 50)


def test_nothing_is_held_in_memory(tmp_path: Path) -> None:
    head, tail = form(("file", "net.onnx", b"CONTENT")).split(b"CONTENT")
    pieces = iter([head, *[bytes(MIB // 4)] * 256, tail])

    async def receive() -> dict[str, object]:
        piece = next(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    headers = [(b"content-type", CONTENT_TYPE.encode())]
    request = Request({"type": "http", "headers": headers}, receive)
    tracemalloc.start()
    try:
        sent = asyncio.run(uploads.receive(request, tmp_path, None, 64 * MIB))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sent.network.stat().st_size == 64 * MIB
    assert peak < 8 * MIB


@pytest.fixture
def api(data: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(data=data, device="cpu", max_upload=MIB))) as client:
        eventually(lambda: client.get("/readyz").status_code == 200)
        yield client
        eventually(lambda: list((data / "tmp").iterdir()) == [])  # whatever was sent


def send(api: TestClient, *parts: Part, **query: str) -> httpx.Response:
    return api.post("/v1/models", params=query, content=form(*parts), headers={"Content-Type": CONTENT_TYPE})


@pytest.fixture
def parts(split_file: Path) -> list[Part]:
    data = split_file.with_name("split.onnx.data")
    return [("file", split_file.name, split_file.read_bytes()), ("data", data.name, data.read_bytes())]


def problem(answer: httpx.Response, status: int, code: str) -> str:
    assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{code}"), answer.text
    return str(answer.json()["detail"])


@pytest.mark.usefixtures("quick")
class TestUpload:
    def test_a_network_with_its_data(self, api: TestClient, parts: list[Part]) -> None:
        answer = send(api, *parts)
        assert answer.status_code == 201, answer.text
        model = answer.json()
        assert (model["name"], model["format"], model["classes"]) == ("split", "onnx", CLASSES)
        assert model["certificate"]["max_relative"] < 1e-5
        own, weights = (sha256(content).hexdigest() for _, _, content in parts)
        assert model["id"] == identity(own, {"split.onnx.data": weights})
        again = send(api, *reversed(parts), filename="other.onnx")
        assert (again.status_code, again.json()["id"]) == (200, model["id"])

    def test_other_data_is_another_network(self, api: TestClient, parts: list[Part]) -> None:
        field, name, content = parts[1]
        other = (field, name, content[:100] + bytes([content[100] ^ 1]) + content[101:])
        ids = {send(api, parts[0], data).json()["id"] for data in (parts[1], other)}
        assert len(ids) == 2

    def test_a_single_file_in_a_form_has_the_id_of_the_file(self, api: TestClient, onnx_file: Path) -> None:
        content = onnx_file.read_bytes()
        answer = send(api, ("file", "net.onnx", content))
        assert (answer.status_code, answer.json()["id"]) == (201, sha256(content).hexdigest())

    def test_data_in_a_folder(self, api: TestClient, split_file: Path, tmp_path: Path) -> None:
        (tmp_path / "a b").mkdir()
        path, place = tmp_path / "net.onnx", "a b/größe.bin"
        onnx.save(onnx.load(split_file), path, save_as_external_data=True, location=place, size_threshold=0)
        sent = [("file", "net.onnx", path.read_bytes()), ("data", place, (tmp_path / place).read_bytes())]
        assert send(api, *sent).status_code == 201

    def test_data_that_was_not_sent_is_named(self, api: TestClient, parts: list[Part]) -> None:
        assert "'split.onnx.data'" in problem(send(api, parts[0]), 422, "missing-data")
        other = ("data", "weights.bin", parts[1][2])
        assert "'split.onnx.data'" in problem(send(api, parts[0], other), 422, "missing-data")
        raw = api.post(
            "/v1/models", content=parts[0][2], headers={"Content-Type": "application/octet-stream"}
        )
        assert "'split.onnx.data'" in problem(raw, 422, "missing-data")

    def test_names_that_no_data_file_has(self, api: TestClient, parts: list[Part], data: Path) -> None:
        before = sorted(data.parent.rglob("*"))
        for name in ("../x", "/etc/passwd", "a/../../x", "C:x", "a\\b", ".", "..", "", "a\x07b", "n" * 300):
            answer = send(api, parts[0], ("data", name, b"x"))
            assert "no name of a data file" in problem(answer, 422, "invalid-parameter")
            assert answer.json()["errors"][0]["field"] == "data"
        assert sorted(data.parent.rglob("*")) == before

    @pytest.mark.parametrize("name", ["split.onnx", "split.onnx.data", "split.onnx/x", "split.onnx.data/x"])
    def test_two_files_of_one_name(self, api: TestClient, parts: list[Part], name: str) -> None:
        answer = send(api, *parts, ("data", name, b"x"))
        assert "two files of the name" in problem(answer, 422, "invalid-parameter")

    def test_forms_that_are_no_upload(self, api: TestClient, parts: list[Part]) -> None:
        assert "more than one" in problem(send(api, *parts, parts[0]), 422, "invalid-parameter")
        assert "there is no network" in problem(send(api, parts[1]), 422, "invalid-parameter")
        assert "there is no network" in problem(send(api), 422, "invalid-parameter")
        assert "'file' and 'data' only" in problem(send(api, ("image", "x", b"")), 422, "invalid-parameter")
        assert "this is no file" in problem(send(api, ("data", None, b"x")), 422, "invalid-parameter")
        cut = api.post("/v1/models", content=form(*parts)[:-30], headers={"Content-Type": CONTENT_TYPE})
        assert "ends in the middle" in problem(cut, 400, "bad-request")
        other = api.post("/v1/models", content=b"x", headers={"Content-Type": "text/plain"})
        assert "multipart/form-data" in problem(other, 415, "unsupported-media-type")

    def test_too_many_files(self, api: TestClient, parts: list[Part]) -> None:
        many = [("data", str(i), b"") for i in range(MOST_FILES + 1)]
        assert "more than 2,000 files" in problem(send(api, parts[0], *many), 422, "invalid-parameter")

    def test_all_files_together_have_the_limit(self, api: TestClient, parts: list[Part]) -> None:
        half = MIB // 2
        problem(
            send(api, *parts, ("data", "a", bytes(half)), ("data", "b", bytes(half))), 413, "body-too-large"
        )
        problem(send(api, *parts, ("data", "a", bytes(3 * MIB))), 413, "body-too-large")

    @pytest.mark.parametrize("place", ["stderr", "scratch", "artefact/graph.json", ".owner", "upload"])
    def test_nothing_of_the_servers_own_can_be_named(self, api: TestClient, place: str) -> None:
        answer = send(api, ("file", "net.onnx", hostile.external(place)))
        assert f"'{place}', which is not beside it" in problem(answer, 422, "missing-data")


def test_the_waiting_process_takes_the_data_too(data: Path, parts: list[Part]) -> None:
    """Unlike in the tests above, a process of its own reads what is sent."""
    with TestClient(create_app(Settings(data=data, device="cpu"))) as api:
        eventually(lambda: api.get("/readyz").status_code == 200)
        answer = send(api, *parts)
        assert answer.status_code == 201, answer.text
        again = send(api, parts[0], ("data", "weights.bin", parts[1][2]))
        assert "'split.onnx.data'" in problem(again, 422, "missing-data")
    assert list((data / "tmp").iterdir()) == []
