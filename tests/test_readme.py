"""The README's examples, run as they stand against a real server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = README[README.index("## Use it") : README.index("## The built-in network")]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", EXAMPLES, re.S)
SHELL = [block for language, block in BLOCKS if language == "sh"]
PYTHON = [block for language, block in BLOCKS if language == "python"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample images where the examples look for them."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "models" / "zoo" / "samples", folder / "models" / "zoo" / "samples")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user whose shell finds the installed commands."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "CLEARFOLD_DATA": str(tmp_path_factory.mktemp("data")),
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="module")
def address(environment: dict[str, str]) -> Iterator[str]:
    """A server started as the README says, by its command."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-c",
        "from app.cli import main; main()",
        "serve",
        "--port",
        url.rpartition(":")[2],
    ]
    server = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None, "the server ended"
            time.sleep(0.3)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_one_example_of_each_kind() -> None:
    assert len(SHELL) == 2
    assert len(PYTHON) == 3
    assert "curl" in SHELL[0]
    assert "clearfold explain" in SHELL[1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_example(address: str, workplace: Path, environment: dict[str, str]) -> None:
    run(["sh", "-ec", SHELL[0].replace("http://127.0.0.1:8000", address)], workplace, environment)
    assert (workplace / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_the_client_example(address: str, workplace: Path, environment: dict[str, str]) -> None:
    code = PYTHON[0].replace("http://127.0.0.1:8000", address)
    printed = run([sys.executable, "-c", code], workplace, environment)
    assert printed.startswith("gear (3, 128, 128)")
    assert (workplace / "gear.heatmap.png").is_file()


def test_the_library_example(workplace: Path, environment: dict[str, str]) -> None:
    printed = run([sys.executable, "-c", PYTHON[1]], workplace, environment)
    assert "layer3.0.conv1" in printed
    assert "Gamma(gamma=0.1)" in printed
    assert "score" in printed
    assert (workplace / "star.heatmap.png").is_file()


def test_the_example_of_other_outputs(workplace: Path, environment: dict[str, str]) -> None:
    printed = run([sys.executable, "-c", PYTHON[2]], workplace, environment)
    assert "'out' (map, N x 21 x 64 x 96)" in printed
    assert "where it wins" in printed
    assert "score" in printed


def test_the_command_line_example(address: str, workplace: Path, environment: dict[str, str]) -> None:
    printed = run(["sh", "-ec", SHELL[1]], workplace, environment)
    assert (workplace / "heart.heatmap.png").is_file()
    assert (workplace / "fused.onnx").is_file()
    assert "folded" in printed
    assert "builtin" in printed


def test_what_the_readme_says_of_the_built_in_network_is_what_was_measured() -> None:
    from models.zoo.network import WEIGHTS_FILE, read_card

    card = read_card()
    section = README[README.index("## The built-in network") :]
    assert f"{card['training']['images']:,} generated images" in section.replace("\n", " ")
    assert f"{card['training']['epochs']} epochs" in section.replace("\n", " ")
    assert f"{card['evaluation']['accuracy']:.2%}".replace("%", " %") in section
    assert f"of {card['evaluation']['images']:,} unseen" in section.replace("\n", " ")
    assert f"{WEIGHTS_FILE.stat().st_size / 1e6:.1f} MB" in section
