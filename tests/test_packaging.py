"""Docker and compose files as text: whatever they name exists, and they install as the README says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in (line.strip() for line in lines)
    ]


def values(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def copied() -> list[tuple[list[str], str]]:
    """(sources, destination) of every COPY from the build context."""
    parts = [arguments.split() for arguments in values("COPY") if "--from" not in arguments]
    return [(words[:-1], words[-1]) for words in parts]


def test_everything_that_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for sources, _ in copied():
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source not in ignored
    assert {"app", "fusion", "lrp", "models", "client"} <= {
        Path(s).name for sources, _ in copied() for s in sources
    }


def test_it_runs_slim_without_rights_and_with_a_health_check() -> None:
    assert all("slim" in base for base in values("FROM"))
    version = re.search(r"python:(\d+)\.(\d+)", values("FROM")[0])
    assert version is not None
    assert (int(version[1]), int(version[2])) >= (3, 11)
    assert values("USER") == ["10001"]
    assert "/readyz" in values("HEALTHCHECK")[0]


def test_its_commands_and_variables_exist() -> None:
    command = json.loads(values("CMD")[-1])
    assert command[0] in PROJECT["project"]["scripts"]
    from app.settings import Settings

    named = set(re.findall(r"CLEARFOLD_(\w+)", (ROOT / "Dockerfile").read_text() + compose_text()))
    assert named <= {name.upper() for name in Settings.model_fields}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    made = [word for run in values("RUN") for word in re.findall(r"\bmake (\w+)$", run)]
    assert made == ["venv"]
    assert set(made) <= set(targets)


def test_the_probed_paths_are_routes() -> None:
    from app.main import create_app

    paths = create_app().openapi()["paths"]
    (probed,) = re.findall(r"127\.0\.0\.1:8000(/\w+)", values("HEALTHCHECK")[0])
    assert probed in paths


def test_nothing_but_the_built_in_model_is_baked_in() -> None:
    left_out = (ROOT / ".dockerignore").read_text().split()
    weights = [p.relative_to(ROOT) for p in ROOT.rglob("*.safetensors")]
    baked = [p.as_posix() for p in weights if p.parts[0] not in left_out]
    assert baked == ["models/zoo/weights/builtin.safetensors"]


def compose_text() -> str:
    return "".join((ROOT / name).read_text() for name in ("docker-compose.yml", "docker-compose.gpu.yml"))


def compose(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


def test_compose_runs_on_a_cpu_host_and_the_gpu_is_an_override() -> None:
    service = compose("docker-compose.yml")["services"]["clearfold"]
    assert "deploy" not in service
    assert service["build"]["args"]["TORCH_BACKEND"] == "cpu"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["volumes"] == ["models:/data"]
    override = compose("docker-compose.gpu.yml")["services"]["clearfold"]
    (device,) = override["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    declared = {argument.split("=")[0] for argument in values("ARG")}
    assert {*service["build"]["args"], *override["build"]["args"]} <= declared


def test_dependencies_have_both_bounds() -> None:
    lists = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for requirement in (r for each in lists for r in each if not r.startswith("clearfold[")):
        assert ">=" in requirement, requirement
        assert "<" in requirement.split(";")[0], requirement


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_dockerfiles_steps_run_in_order_in_a_clean_directory(tmp_path: Path) -> None:
    for sources, _ in copied():
        for source in sources:
            origin, goal = ROOT / source, tmp_path / source
            if origin.is_dir():
                shutil.copytree(origin, goal, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(origin, goal)
    subprocess.run(["make", "venv"], cwd=tmp_path, check=True)
    command = [
        str(tmp_path / ".venv" / "bin" / "clearfold"),
        "explain",
        "models/zoo/samples/gear.png",
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["prediction"]["label"] == "gear"
