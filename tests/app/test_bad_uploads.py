"""Uploads that go wrong, against a real server: bad files, a full disk, a client that hangs up, kill -9."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from torch import nn

from app import uploads
from app.main import create_app
from app.settings import Settings
from tests.support.served import (
    Running,
    encoded,
    eventually,
    free_port,
    picture,
    save_onnx,
    save_torchscript,
    tiny_network,
)

BINARY = {"Content-Type": "application/octet-stream"}


@contextmanager
def serving(data: Path, *wrapper: str, **environment: str) -> Iterator[SimpleNamespace]:
    """A server process of its own, so that it can be killed."""
    port = free_port()
    command = [*wrapper, sys.executable, "-c", "from app.cli import main; main()", "serve"]
    options = ["--port", str(port), "--data", str(data), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, *options], env={**os.environ, **environment}, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: _ready(url))
        yield SimpleNamespace(url=url, port=port, process=process)
    finally:
        process.kill()
        process.wait()


def _ready(url: str) -> bool:
    try:
        return httpx.get(url + "/readyz").status_code == 200
    except httpx.TransportError:
        return False


def upload(url: str, content: bytes, filename: str, **query: str) -> httpx.Response:
    return httpx.post(
        url + "/v1/models",
        params={"filename": filename, **query},
        content=content,
        headers=BINARY,
        timeout=120,
    )


def begin_upload(port: int, content: bytes, promised: int) -> socket.socket:
    """Send the head of an upload and a part of its body, and keep the line open."""
    line = socket.create_connection(("127.0.0.1", port))
    head = (
        "POST /v1/models?filename=slow.onnx HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/octet-stream\r\nContent-Length: {promised}\r\n\r\n"
    )
    line.sendall(head.encode() + content)
    return line


def workspaces(data: Path) -> list[Path]:
    return list((data / "tmp").iterdir())


def uploaded_bytes(data: Path) -> int:
    return sum(path.stat().st_size for path in (data / "tmp").glob("*/upload/slow.onnx"))


class TestBadFiles:
    @pytest.fixture(autouse=True)
    def nothing_is_lost(self, server: Running) -> Iterator[None]:
        """Whatever is uploaded, the server goes on, has the models it had, and has cleaned up."""
        before = httpx.get(server.url + "/v1/models").json()
        yield
        assert httpx.get(server.url + "/v1/models").json() == before
        assert workspaces(server.settings.data) == []
        assert (
            httpx.post(server.url + "/v1/explain", content=encoded(picture()), timeout=60).status_code == 200
        )

    def test_a_truncated_onnx(self, server: Running, onnx_file: Path) -> None:
        answer = upload(server.url, onnx_file.read_bytes()[:-50], "cut.onnx")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-file")
        assert "cut.onnx" in answer.json()["detail"]

    def test_a_text_file_named_onnx(self, server: Running) -> None:
        answer = upload(server.url, b"Buy milk.\n", "notes.onnx")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-file")
        assert "notes.onnx" in answer.json()["detail"]

    def test_an_empty_file(self, server: Running) -> None:
        answer = upload(server.url, b"", "empty.onnx")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad-file")
        assert "empty" in answer.json()["detail"]

    def test_an_unsupported_operator_names_operator_and_layer(self, server: Running, tmp_path: Path) -> None:
        network = nn.Sequential()
        network.add_module("stem", nn.Conv2d(3, 4, 3))
        network.add_module("sorter", _Sorting())
        file = save_torchscript(network.eval(), tmp_path / "odd.pt")
        answer = upload(server.url, file.read_bytes(), "odd.pt", size="32x32")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/unsupported-operator")
        assert "matrix_exp" in answer.json()["detail"]
        assert "'sorter'" in answer.json()["detail"]

    def test_nothing_to_explain(self, server: Running, tmp_path: Path) -> None:
        file = save_onnx(_Deciding(), tmp_path / "classes.onnx")
        answer = upload(server.url, file.read_bytes(), "classes.onnx")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/nothing-to-explain")
        assert "before arg-max" in answer.json()["detail"]

    def test_nan_in_the_weights(self, server: Running, tmp_path: Path) -> None:
        network = tiny_network(3)
        with torch.no_grad():
            next(network.parameters())[0, 0, 0, 0] = float("nan")
        answer = upload(server.url, save_onnx(network, tmp_path / "nan.onnx").read_bytes(), "nan.onnx")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/non-finite-weights")
        assert "weight" in answer.json()["detail"]

    def test_a_client_that_hangs_up(self, server: Running) -> None:
        data = server.settings.data
        line = begin_upload(server.settings.port, b"x" * 3_000_000, 10_000_000)
        eventually(lambda: uploaded_bytes(data) > 0)
        line.close()
        eventually(lambda: workspaces(data) == [])


class _Deciding(nn.Module):
    """It decides pixel by pixel, so there is nothing that it chooses from but the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).flatten(1).int()


class _Sorting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(x @ x.transpose(-1, -2) * 1e-3).mean((2, 3))


class TestLimits:
    def test_a_file_that_is_too_large(self, data: Path, onnx_file: Path) -> None:
        with TestClient(create_app(Settings(data=data, device="cpu", max_upload=1000))) as api:
            declared = api.post("/v1/models", content=onnx_file.read_bytes(), headers=BINARY)
            streamed = api.post("/v1/models", content=iter([onnx_file.read_bytes()]), headers=BINARY)
            for answer in (declared, streamed):
                assert (answer.status_code, answer.json()["type"]) == (413, "/problems/body-too-large")
        assert workspaces(data) == []

    def test_formats_that_run_code_are_refused_unless_they_are_switched_on(
        self, data: Path, torchscript_file: Path, exported_file: Path
    ) -> None:
        with TestClient(create_app(Settings(data=data, device="cpu"))) as api:
            for file, called in ((torchscript_file, "TorchScript"), (exported_file, "torch.export")):
                answer = api.post("/v1/models", content=file.read_bytes(), headers=BINARY)
                assert (answer.status_code, answer.json()["type"]) == (422, "/problems/format-refused")
                for word in (called, "ONNX", "CLEARFOLD_ALLOW_EXECUTABLE"):
                    assert word in answer.json()["detail"]
        assert workspaces(data) == []

    def test_a_conversion_that_takes_too_long(self, data: Path, onnx_file: Path) -> None:
        with TestClient(create_app(Settings(data=data, device="cpu", conversion_seconds=0.5))) as api:
            answer = api.post("/v1/models", content=onnx_file.read_bytes(), headers=BINARY)
            assert (answer.status_code, answer.json()["type"]) == (422, "/problems/conversion-timeout")
            assert api.get("/healthz").status_code == 200
        assert workspaces(data) == []


class TestFullDisk:
    def test_a_write_that_fails(self, data: Path, onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The device of the store has no room: /dev/full answers every write as a full disk does."""
        real = os.open

        def full(path: str | Path, *rest: int, **options: int) -> int:
            uploaded = Path(path).name == "net.onnx"
            return real("/dev/full", os.O_WRONLY) if uploaded else real(path, *rest, **options)

        with TestClient(create_app(Settings(data=data, device="cpu"))) as api:
            monkeypatch.setattr(uploads.os, "open", full)
            answer = api.post(
                "/v1/models", params={"filename": "net.onnx"}, content=onnx_file.read_bytes(), headers=BINARY
            )
            monkeypatch.undo()
            assert (answer.status_code, answer.json()["type"]) == (507, "/problems/disk-full")
            assert "delete networks" in answer.json()["detail"]
            assert workspaces(data) == []
            assert len(api.get("/v1/models").json()["models"]) == 1

    def test_a_disk_that_is_really_full(self, prepared: Path, tmp_path: Path, onnx_file: Path) -> None:
        """The store is on a small file system of the server's own; freed, the same upload succeeds."""
        mount = tmp_path / "small"
        mount.mkdir()
        inside = f'mount -t tmpfs -o size=12m tmpfs {mount} && cp -r {prepared}/. {mount} && exec "$@"'
        wrapper = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
        if not shutil.which("unshare") or subprocess.run([*wrapper, "true"], capture_output=True).returncode:
            pytest.skip("no small file system can be mounted here")
        with serving(mount, *wrapper) as server:
            filling = upload(server.url, os.urandom(13_000_000), "large.onnx")
            assert (filling.status_code, filling.json()["type"]) == (507, "/problems/disk-full")
            models = httpx.get(server.url + "/v1/models").json()["models"]
            assert [model["id"] for model in models] == ["builtin"]
            # The file has room, but what becomes of it has not.
            network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 5))
            large = save_onnx(network.eval(), tmp_path / "large.onnx").read_bytes()
            tight = upload(server.url, large, "large.onnx")
            assert (tight.status_code, tight.json()["type"]) == (507, "/problems/disk-full")
            assert upload(server.url, onnx_file.read_bytes(), "net.onnx").status_code == 201


def test_kill_9_in_the_middle_of_uploads_loses_nothing(
    data: Path, onnx_file: Path, other_onnx_file: Path
) -> None:
    """One network is stored, one upload is half sent, one is being converted; then the server is killed."""
    content, other = onnx_file.read_bytes(), other_onnx_file.read_bytes()
    with serving(data) as server:
        kept = upload(server.url, content, "net.onnx", name="kept").json()
        lines = [begin_upload(server.port, b"x" * 3_000_000, 10_000_000)]
        eventually(lambda: uploaded_bytes(data) > 3_000_000 - 2**20 - 1)
        lines.append(begin_upload(server.port, other, len(other)))
        eventually(lambda: list((data / "tmp").glob("*/stderr")))
        converters = _converters(data)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        for line in lines:
            line.close()
    assert len(workspaces(data)) == 2  # nobody could clean up
    eventually(lambda: not any(map(_alive, converters)), seconds=20)
    with serving(data) as server:
        models = httpx.get(server.url + "/v1/models").json()["models"]
        assert [model["id"] for model in models] == ["builtin", kept["id"]]
        assert models[1] == kept
        assert workspaces(data) == []
        address = f"{server.url}/v1/models/kept"
        assert httpx.post(address + "/explain", content=encoded(picture()), timeout=60).status_code == 200
        assert upload(server.url, content, "net.onnx").json() == kept
        assert upload(server.url, other, "other.onnx").status_code == 201
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=20)
    assert workspaces(data) == []


def test_a_network_can_go_and_come_back_while_it_explains(server: Running, onnx_file: Path) -> None:
    """Every answer is an explanation or a clear 404, and a new upload is as good as the first."""
    image = encoded(picture())
    with httpx.Client(base_url=server.url, timeout=120) as api:
        address = upload(server.url, onnx_file.read_bytes(), "net.onnx").headers["Location"]
        codes: list[int] = []
        stop = threading.Event()

        def explain() -> None:
            while not stop.is_set():
                codes.append(api.post(address + "/explain", content=image).status_code)

        threads = [threading.Thread(target=explain) for _ in range(2)]
        for thread in threads:
            thread.start()
        api.delete(address)
        for order in ("BGR", "RGB"):
            upload(server.url, onnx_file.read_bytes(), "net.onnx", order=order)
        stop.set()
        for thread in threads:
            thread.join()
        assert set(codes) <= {200, 404}
        assert codes[-1] == 200
        api.delete(address)


def _converters(data: Path) -> list[int]:
    """The conversion processes at work in this store."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "models.worker" in command and str(data) in command:
            found.append(int(folder.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
