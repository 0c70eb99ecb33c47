"""Valid files that end early, at every kilobyte: a clear error each, and none is taken for a whole one."""

from pathlib import Path

import httpx
import pytest

import models
from fusion.errors import BadFile
from tests.support.served import Running, eventually

KIB = 1024
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(params=["onnx_file", "torchscript_file"])
def whole(request: pytest.FixtureRequest) -> Path:
    file: Path = request.getfixturevalue(request.param)
    return file


def cuts(whole: Path) -> list[int]:
    size = whole.stat().st_size
    assert size > 2 * KIB
    return [*range(0, size, KIB), size - 1]


def test_every_kilobyte(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    for cut in cuts(whole):
        short = tmp_path / whole.name
        short.write_bytes(data[:cut])
        with pytest.raises(BadFile) as error:
            models.open(short, size=(32, 32) if whole.suffix == ".pt" else None)
        assert whole.name in str(error.value)
        assert str(error.value).endswith(".")


@pytest.mark.slow
def test_every_kilobyte_through_the_service(whole: Path, server: Running) -> None:
    before = httpx.get(server.url + "/v1/models").json()
    data = whole.read_bytes()
    for cut in cuts(whole):
        parameters = {"filename": whole.name} | ({"size": "32x32"} if whole.suffix == ".pt" else {})
        answer = httpx.post(
            server.url + "/v1/models", params=parameters, content=data[:cut], headers=BINARY, timeout=300
        )
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-file"), cut
    assert httpx.get(server.url + "/v1/models").json() == before
    eventually(lambda: not list((server.settings.data / "tmp").rglob("*.onnx")))
