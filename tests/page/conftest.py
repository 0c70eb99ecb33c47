"""A real server, a real browser, and a visit that watches everything that the page does."""

import json
import os
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from page_visit import Visit
from playwright.sync_api import Browser, sync_playwright

from app.main import create_app
from app.settings import Settings

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
)
READY_SECONDS = 180


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a store of its own and the built-in network ready."""
    listener = socket.create_server(("127.0.0.1", 0))
    settings = Settings(data=tmp_path_factory.mktemp("store"), device="cpu", log_level="warning")
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="page-server")
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        _wait_until_ready(url)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)


def _wait_until_ready(url: str) -> None:
    answer = "nothing"
    for _ in range(READY_SECONDS * 2):
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10):
                return
        except urllib.error.HTTPError as error:
            answer = error.read().decode()
        except OSError as error:
            answer = str(error)
        time.sleep(0.5)
    pytest.fail(f"the server did not become ready: {answer}")


@pytest.fixture(scope="module")  # it leaves an event loop running, which tests of other folders may not find
def browser() -> Iterator[Browser]:
    path = os.environ.get("CLEARFOLD_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no browser: install chromium, or name one in CLEARFOLD_CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Visit]:
    """A fresh page, not yet opened. After the test it must have kept quiet and stayed at home."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    visit = Visit(context.new_page(), address)
    yield visit
    visit.check()
    context.close()


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one convolution, a batch normalization and a linear layer: 24x24 RGB to 5 classes."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": rng.normal(size=(6, 3, 3, 3)) * 0.3,
        "bn.weight": rng.uniform(0.5, 1.5, 6),
        "bn.bias": rng.normal(size=6) * 0.1,
        "bn.mean": rng.normal(size=6) * 0.1,
        "bn.var": rng.uniform(0.5, 1.5, 6),
        "head.weight": rng.normal(size=(5, 6)),
        "head.bias": rng.normal(size=5),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "conv.weight"], ["c"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node(
                "BatchNormalization", ["c", "bn.weight", "bn.bias", "bn.mean", "bn.var"], ["b"], "bn"
            ),
            helper.make_node("Relu", ["b"], ["r"], "relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
            helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["scores"], "head", transB=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 24, 24])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("networks") / "tiny.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def split_onnx(tiny_onnx: Path) -> tuple[Path, Path]:
    """The same with its weights in a data file, which comes second."""
    import onnx

    path = tiny_onnx.with_name("split.onnx")
    onnx.save(
        onnx.load(tiny_onnx), path, save_as_external_data=True, location="split.onnx.data", size_threshold=0
    )
    return path, path.with_name("split.onnx.data")


@pytest.fixture
def second_network(address: str, tiny_onnx: Path) -> Iterator[str]:
    """The id of a network beside the built-in one; gone afterwards."""
    upload = urllib.request.Request(
        f"{address}/v1/models?filename=second.onnx",
        data=tiny_onnx.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
    )
    with urllib.request.urlopen(upload, timeout=120) as answer:
        model = json.load(answer)["id"]
    yield model
    urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/models/{model}", method="DELETE"), timeout=30
    ).close()
