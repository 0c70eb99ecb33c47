"""A store that an older version filled: its networks are listed, shown, explained and handed out."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings

STORED = Path(__file__).parents[1] / "fusion" / "stored"
ID = "ab" * 32


@pytest.fixture(scope="module", params=sorted(path.name for path in STORED.iterdir()))
def old(
    request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    data = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("old") / "data"))
    model = Path(shutil.copytree(STORED / request.param, data / "models" / ID / "1"))
    manifest = json.loads((model / "manifest.json").read_text())
    # As the store of the time left it.
    (model / "manifest.json").write_text(json.dumps({**manifest, "id": ID, "etag": "0"}))
    with TestClient(create_app(Settings(data=data, device="cpu"))) as client:
        yield client


def test_it_is_listed_and_shown(old: TestClient) -> None:
    assert ID in [model["id"] for model in old.get("/v1/models").json()["models"]]
    shown = old.get(f"/v1/models/{ID}").json()
    assert (shown["name"], shown["classes"]) == ("small", 3)


def test_it_explains(old: TestClient, image: bytes) -> None:
    answer = old.post(f"/v1/models/{ID}/explain", content=image, headers={"Accept": "application/json"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["balanced"] is True


def test_it_is_handed_out_and_named_anew(old: TestClient) -> None:
    assert old.get(f"/v1/models/{ID}/fused").status_code == 200
    assert old.patch(f"/v1/models/{ID}", json={"name": "renamed"}).json()["name"] == "renamed"
    assert old.get(f"/v1/models/{ID}").json()["name"] == "renamed"
