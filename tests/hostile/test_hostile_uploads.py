"""Hostile files, uploaded to a real server: a clear problem each, and a server that goes on."""

import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.problems import KINDS
from app.settings import Settings
from tests.support import hostile
from tests.support.confined import Cell
from tests.support.served import Running, encoded, eventually, picture

BINARY = {"Content-Type": "application/octet-stream"}
GIB = 2**30


def _script(kind: str) -> Callable[[str], bytes]:
    return lambda path: hostile.scripted(getattr(hostile, kind), path)


# What is uploaded, given the path of a file that is to be harmed; as what; the problem's code and what it says.
Attack = tuple[Callable[[str], bytes], str, str, str]
ATTACKS: dict[str, Attack] = {
    "functions-that-multiply": (lambda _: hostile.functions(2, 27), "net.onnx", "bad-file", "67108864 nodes"),
    "functions-in-a-chain": (lambda _: hostile.functions(1, 3000), "net.onnx", "bad-file", "100 deep"),
    "weights-outside": (lambda _: hostile.external("../../etc"), "net.onnx", "bad-file", "outside of its"),
    "weights-beside": (lambda _: hostile.external("secret"), "net.onnx", "missing-data", "'secret', which"),
    "200-gigabytes": (lambda _: hostile.declared(50 * 10**9), "net.onnx", "bad-file", "holds 0"),
    "a-filled-tensor": (lambda _: hostile.filled([2**36]), "net.onnx", "bad-file", "asks for a tensor"),
    "an-endless-loop": (lambda _: hostile.endless(), "net.onnx", "bad-file", "loops unroll"),
    "a-circle": (lambda _: hostile.circle(), "net.onnx", "bad-file", "in a circle"),
    "messages": (lambda _: hostile.messages(5_100_000), "net.onnx", "bad-file", "5,000,000 values"),
    "a-long-name": (lambda _: hostile.named(16_000), "net.onnx", "unsupported-operator", "RRR"),
    "write-on-load": (_script("WritesOnLoad"), "net.pt", "unsafe-file", "aten::save"),
    "read-on-load": (_script("ReadsOnLoad"), "net.pt", "unsafe-file", "aten::from_file"),
    "write-in-forward": (_script("WritesInForward"), "net.pt", "unsafe-file", "aten::save"),
    "read-in-forward": (_script("ReadsInForward"), "net.pt", "unsafe-file", "aten::from_file"),
    "a-zip-bomb": (lambda _: hostile.zip_bomb(256), "net.pt", "unsafe-file", "compressed weights"),
    "a-pickle": (hostile.pickled, "net.pt", "bad-file", "run code"),
    "a-pickle-inside": (hostile.archived, "net.pt", "unsafe-file", "system"),
}
QUICK = ("functions-that-multiply", "write-on-load")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that somebody else has."""
    path = tmp_path / "victim"
    path.write_bytes(b"as it was")
    return path


@pytest.fixture(autouse=True)
def the_server_goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """It has the networks that it had, nothing is left of what was uploaded, and it explains."""
    if "server" not in request.fixturenames:
        yield
        return
    server: Running = request.getfixturevalue("server")
    before = httpx.get(server.url + "/v1/models").json()
    yield
    assert httpx.get(server.url + "/v1/models").json() == before
    eventually(lambda: left_over(server.settings.data) == [])
    assert explain(server.url).status_code == 200


def left_over(data: Path) -> list[Path]:
    """What of an upload or an artefact is left in the store's folder for work in progress."""
    return [
        path
        for path in (data / "tmp").rglob("*")
        if path.suffix in (".onnx", ".pt") or path.name == "artefact"
    ]


def upload(url: str, content: bytes, filename: str) -> httpx.Response:
    parameters = (
        {"filename": filename, "size": "32x32"} if filename.endswith(".pt") else {"filename": filename}
    )
    return httpx.post(url + "/v1/models", params=parameters, content=content, headers=BINARY, timeout=300)


def explain(url: str) -> httpx.Response:
    return httpx.post(url + "/v1/explain", content=encoded(picture()), timeout=300)


def is_clear(answer: httpx.Response, code: str, says: str) -> None:
    """A problem document of a known kind that says what is wrong."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"/problems/{code}", problem
    assert answer.status_code == KINDS[code].status
    assert says in problem["detail"]
    assert problem["detail"].endswith(".")
    assert len(problem["detail"]) <= 4000


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ATTACKS]
)
def test_an_attack_is_answered_with_a_clear_problem(server: Running, victim: Path, name: str) -> None:
    make, filename, code, says = ATTACKS[name]
    is_clear(upload(server.url, make(str(victim)), filename), code, says)
    assert victim.read_bytes() == b"as it was"


# A network, its data file, and what is said of them.
SPLIT: dict[str, tuple[Callable[[], bytes], bytes, str]] = {
    "the-same-data-over-and-over": (
        lambda: hostile.external("data", 2**18, 1000),
        bytes(2**20),
        "share their data",
    ),
    "200-gigabytes": (lambda: hostile.external("data", 50 * 10**9), bytes(100), "which has 100 bytes"),
    "before-the-file": (lambda: hostile.external("data", offset=-8), bytes(100), "'-8' as the offset"),
    "behind-the-file": (lambda: hostile.external("data", offset=2**40), bytes(100), "which has 100 bytes"),
    "another-file-too": (lambda: hostile.external("../stderr"), bytes(100), "outside of its"),
}


@pytest.mark.parametrize(
    "name",
    [name if name.startswith("the-same") else pytest.param(name, marks=pytest.mark.slow) for name in SPLIT],
)
def test_data_files_that_are_made_to_do_harm(server: Running, name: str) -> None:
    make, data, says = SPLIT[name]
    files = [("file", ("net.onnx", make())), ("data", ("data", data))]
    is_clear(httpx.post(server.url + "/v1/models", files=files, timeout=300), "bad-file", says)


@pytest.mark.slow
def test_more_memory_than_there_is_for_a_conversion(data: Path) -> None:
    """Tensors that are each allowed, and together are not."""
    settings = Settings(data=data, device="cpu", conversion_memory=3 * GIB)
    with TestClient(create_app(settings)) as api:
        answer = api.post(
            "/v1/models", params={"filename": "net.onnx"}, content=hostile.hoard(12), headers=BINARY
        )
        assert answer.json()["type"] == "/problems/conversion-out-of-memory", answer.json()
        assert "CLEARFOLD_CONVERSION_MEMORY" in answer.json()["detail"]
        assert api.post("/v1/explain", content=encoded(picture())).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "WritesOnLoad",
        "ReadsInForward",
        pytest.param("WritesInForward", marks=pytest.mark.slow),
        pytest.param("ReadsOnLoad", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("landlock")
def test_the_confinement_holds_alone_where_nothing_was_scanned(cell: Cell, victim: Path, kind: str) -> None:
    cell.source.write_bytes(hostile.scripted(getattr(hostile, kind), str(victim)))
    said = cell.run(
        f"""
        import warnings
        warnings.simplefilter("ignore")
        import torch
        said["ended"] = tried(lambda: torch.jit.load({str(cell.source)!r})(torch.zeros(1, 3, 8, 8)).shape)
        """
    )
    assert victim.read_bytes() == b"as it was"
    if kind.startswith("Reads"):
        assert said["ended"] == "RuntimeError"


@pytest.fixture
def slow_conversions(prepared: Path, tmp_path: Path) -> Iterator[TestClient]:
    folder = Path(shutil.copytree(prepared, tmp_path / "data"))
    with TestClient(create_app(Settings(data=folder, device="cpu", conversion_seconds=15))) as api:
        yield api


@pytest.mark.slow
def test_others_are_served_at_their_usual_speed_meanwhile(slow_conversions: TestClient) -> None:
    """A network of 20,000 layers keeps its conversion busy until its time is up."""
    api, answers = slow_conversions, []

    def attack() -> None:
        answers.append(
            api.post(
                "/v1/models",
                params={"filename": "net.onnx"},
                content=hostile.classifier(20_000),
                headers=BINARY,
            )
        )

    usual = statistics.median(_times(api, 12))
    attacker = threading.Thread(target=attack)
    attacker.start()
    time.sleep(5)  # it has started by then
    meanwhile = _times(api, 12)
    assert attacker.is_alive()
    attacker.join()
    assert answers[0].json()["type"] == "/problems/conversion-timeout"
    # Two processes share what cores there are; beyond that nothing of the attack may be felt.
    assert statistics.median(meanwhile) <= 3 * usual + 0.05


def _times(api: TestClient, count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        assert api.post("/v1/explain", content=encoded(picture())).status_code == 200
        times.append(time.perf_counter() - began)
    return times
