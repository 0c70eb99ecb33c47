"""What the tests of the service, the client and the command line share: small networks, images, a server."""

import io
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import uvicorn
from PIL import Image
from torch import nn

import lrp
from app.conversion import ConversionFailed, Converter, Request
from app.library import Library
from app.main import create_app
from app.settings import Settings
from fusion.errors import ClearfoldError
from fusion.tracing import TRACING
from models.convert import convert
from models.store import Store

SIZE = 32
CLASSES = 5


def tiny_network(seed: int = 0) -> nn.Module:
    """Conv, BN, ReLU twice, and a classifier: everything that matters, in milliseconds."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) * 0.3
            module.running_var = torch.rand(module.num_features) + 0.5
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network.eval()


class Branches(nn.Module):
    """Two convolutions of the same values, added: they become one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (self.wide(x) + self.narrow(x)).relu().mean((2, 3))
        return self.head(y)  # type: ignore[no-any-return]


def save_onnx(network: nn.Module, path: Path, example: torch.Tensor | None = None) -> Path:
    x = torch.zeros(2, 3, SIZE, SIZE) if example is None else example
    with TRACING:  # a server of an earlier test may still be at work in this process
        program = torch.onnx.export(
            network,
            (x,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
            optimize=False,
        )
    assert program is not None
    program.save(path)
    return path


def save_torchscript(network: nn.Module, path: Path) -> Path:
    with TRACING:
        torch.jit.trace(network, torch.zeros(1, 3, SIZE, SIZE)).save(str(path))  # type: ignore[no-untyped-call]
    return path


def picture(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth colourful image, (width, height) large."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_onnx(tiny_network(), tmp_path_factory.mktemp("onnx") / "tiny.onnx")


@pytest.fixture(scope="session")
def other_onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_onnx(tiny_network(1), tmp_path_factory.mktemp("onnx") / "other.onnx")


@pytest.fixture(scope="session")
def split_file(onnx_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with its weights in a data file of the usual name."""
    path = tmp_path_factory.mktemp("split") / "split.onnx"
    onnx.save(
        onnx.load(onnx_file), path, save_as_external_data=True, location="split.onnx.data", size_threshold=0
    )
    return path


@pytest.fixture(scope="session")
def torchscript_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_torchscript(tiny_network(), tmp_path_factory.mktemp("torchscript") / "tiny.pt")


@pytest.fixture(scope="session")
def exported_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "tiny.pt2"
    with TRACING:
        torch.export.save(torch.export.export(tiny_network(), (torch.zeros(2, 3, SIZE, SIZE),)), file)
    return file


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions in this process: for tests of what comes before and after: a process takes seconds."""

    def run(
        self: Converter, request: Request, folder: Path, say: Callable[[str], None] = print
    ) -> dict[str, object]:
        try:
            return convert(
                request.source,
                folder / "artefact",
                size=request.size,
                description=request.description,
                name=request.name,
                refused=request.refused,
                data=request.data,
                say=say,
            )
        except ClearfoldError as error:
            raise ConversionFailed(error.code, str(error)) from error

    monkeypatch.setattr(Converter, "run", run)


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Explanations whose ledger has lost what the layers kept, so that it does not balance."""
    real = lrp.Explainer.explain

    def explain(self: lrp.Explainer, *arguments: object, **named: object) -> lrp.Explanation:
        explanation = real(self, *arguments, **named)  # type: ignore[arg-type]
        assert explanation.ledger is not None
        return replace(explanation, ledger=replace(explanation.ledger, entries=()))

    monkeypatch.setattr(lrp.Explainer, "explain", explain)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that has the built-in network: copy it, a conversion takes seconds."""
    folder = tmp_path_factory.mktemp("prepared")
    Library(Store(folder), Converter(seconds=500)).ensure_builtin()
    return folder


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    """A data folder of the test's own, with the built-in network in it."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@dataclass(frozen=True)
class Running:
    """A real server on a real port, in a thread."""

    url: str
    settings: Settings


@pytest.fixture(scope="session")
def server(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("server") / "data"))
    settings = Settings(data=folder, device="cpu", port=free_port(), allow_executable=True)
    config = uvicorn.Config(create_app(settings), port=settings.port, log_level="warning")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    eventually(lambda: running.started)
    yield Running(f"http://127.0.0.1:{settings.port}", settings)
    running.should_exit = True
    thread.join(timeout=20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
