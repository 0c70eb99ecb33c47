"""The fixtures that the tests of the service share, beside those of the client and the command line."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.support.served import *  # noqa: F403
from tests.support.served import encoded, picture


@pytest.fixture(scope="module")
def api(prepared: Path) -> Iterator[TestClient]:
    """The service with the built-in network, for networks of every format."""
    with TestClient(create_app(Settings(data=prepared, device="cpu", allow_executable=True))) as client:
        yield client


@pytest.fixture(scope="module")
def image() -> bytes:
    return encoded(picture())
