"""What all tests share: where the shared data lies, a seed, memory given back, servers that keep no process waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from models.memory import release

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real networks and data beside the checkout; tests that use it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no folder 'shared' beside the checkout")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _no_spare_converters() -> Iterator[None]:
    """Most servers of tests convert nothing: a process that loads torch for each of them would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLEARFOLD_SPARE_CONVERTER", "false")
        yield


@pytest.fixture(scope="module", autouse=True)
def _memory_back() -> Iterator[None]:
    """What a file's networks and graphs took goes back with it: by the end it would be ten gigabytes."""
    yield
    release()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
