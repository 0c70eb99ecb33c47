"""The store is whole at every moment: publishing, replacing, deleting, and dying in the middle of it."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import ArtefactError
from fusion.versions import VERSION
from models import store as store_module
from models.store import BUILTIN, Store, UnknownModel

A, B = "a" * 64, "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data")


def publish(store: Store, model_id: str = A, **manifest: Any) -> None:
    with store.workspace() as folder:
        store.publish(artefact(folder, **manifest), model_id)


def artefact(folder: Path, **manifest: Any) -> Path:
    made = folder / "artefact"
    made.mkdir()
    (made / "manifest.json").write_text(
        json.dumps({"version": VERSION, "name": "net", "created": "2026-01-01", **manifest})
    )
    (made / "weights.safetensors").write_bytes(b"weights")
    return made


def leftovers(store: Store) -> list[str]:
    return [path.name for folder in ("tmp", "trash") for path in (store.root / folder).iterdir()]


class TestPublishing:
    def test_a_published_model_is_listed_and_found(self, store: Store) -> None:
        publish(store, classes=10)
        (model,) = store.models()
        assert (model.id, model.name, model.manifest["classes"]) == (A, "net", 10)
        assert store.get(A) == model
        assert (model.folder / "weights.safetensors").read_bytes() == b"weights"
        assert leftovers(store) == []

    def test_another_store_on_the_same_folder_sees_it(self, store: Store) -> None:
        publish(store)
        assert [model.id for model in Store(store.root).models()] == [A]

    def test_publishing_again_replaces(self, store: Store) -> None:
        publish(store, name="old")
        before = store.get(A)
        publish(store, name="new")
        after = store.get(A)
        assert (after.name, len(store.models())) == ("new", 1)
        assert after.etag != before.etag
        assert not before.folder.exists()

    def test_the_builtin_model_is_first(self, store: Store) -> None:
        publish(store, A, created="2020-01-01")
        publish(store, BUILTIN, created="2026-01-01")
        assert [model.id for model in store.models()] == [BUILTIN, A]

    @pytest.mark.parametrize("bad", ["", "..", "../x", "A" * 64, "a" * 63, "builtin/..", "a" * 64 + "\n"])
    def test_an_id_is_a_hash_and_nothing_else(self, store: Store, bad: str) -> None:
        with store.workspace() as folder, pytest.raises(ArtefactError):
            store.publish(artefact(folder), bad)
        with pytest.raises(UnknownModel):
            store.get(bad)

    def test_a_failed_publication_leaves_the_old_model(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(store, name="old")

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(store_module.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            publish(store, name="new")
        assert store.get(A).name == "old"
        assert leftovers(store) == []


class TestFinding:
    def test_by_prefix_and_by_name(self, store: Store) -> None:
        publish(store, A, name="first")
        publish(store, B, name="second")
        assert store.get("aaaaaaaa").id == A
        assert store.get("abababab").id == B
        assert store.get("second").id == B

    def test_a_short_prefix_is_no_id(self, store: Store) -> None:
        publish(store)
        with pytest.raises(UnknownModel, match="list the models"):
            store.get("aaaaaaa")

    def test_an_ambiguous_name_is_said_to_be_one(self, store: Store) -> None:
        publish(store, A, name="same")
        publish(store, B, name="same")
        with pytest.raises(UnknownModel, match="2 models"):
            store.get("same")

    def test_a_damaged_model_does_not_hide_the_others(self, store: Store) -> None:
        publish(store, A)
        publish(store, B)
        (store.get(A).folder / "manifest.json").write_text("{")
        assert [model.id for model in store.models()] == [B]
        with pytest.raises(ArtefactError, match="upload it again"):
            store.get(A)


class TestChanging:
    def test_update_changes_the_manifest_and_its_etag(self, store: Store) -> None:
        publish(store)
        before = store.get(A)
        store.update(A, lambda manifest: {**manifest, "name": "better"})
        after = store.get("better")
        assert (after.id, after.folder) == (A, before.folder)
        assert after.etag != before.etag

    def test_deleted_is_gone_at_once(self, store: Store) -> None:
        publish(store)
        store.delete(A)
        assert store.models() == []
        assert leftovers(store) == []
        with pytest.raises(UnknownModel):
            store.delete(A)

    def test_a_deleted_model_can_come_back(self, store: Store) -> None:
        publish(store, name="first")
        store.delete(A)
        publish(store, name="second")
        assert store.get(A).name == "second"


class TestSweeping:
    def test_a_workspace_in_use_stays_and_a_dead_one_goes(self, store: Store) -> None:
        dead = store.root / "tmp" / "dead"
        dead.mkdir()
        (dead / ".owner").touch()
        with store.workspace() as folder:
            (folder / "upload").write_bytes(b"half")
            Store(store.root).sweep()
            assert (folder / "upload").exists()
        assert leftovers(store) == []

    def test_the_rest_of_an_interrupted_replacement_goes(self, store: Store) -> None:
        publish(store, name="old")
        old = store.get(A).folder
        with store.workspace() as folder:
            artefact(folder, name="new", id=A, etag="x").rename(old.parent / "2")  # and then the power went
        assert store.get(A).name == "new"
        store.sweep()
        assert [path.name for path in old.parent.iterdir()] == ["2"]

    def test_trash_and_empty_homes_go(self, store: Store) -> None:
        (store.root / "trash" / "x").mkdir()
        (store.root / "models" / B).mkdir()
        assert store.models() == []
        store.sweep()
        assert leftovers(store) == []
        assert list((store.root / "models").iterdir()) == []


def test_threads_that_publish_and_read_the_same_model_agree(store: Store) -> None:
    publish(store, name="0")
    names = {str(number) for number in range(8)}
    seen: list[str] = []

    def read() -> None:
        for _ in range(100):
            seen.append(store.get(A).name)

    threads = [threading.Thread(target=publish, args=(store,), kwargs={"name": name}) for name in names]
    threads.append(threading.Thread(target=read))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) <= names
    assert len(seen) == 100
    assert len(list(store.get(A).folder.parent.iterdir())) == 1


_PUBLISH_FOREVER = """
import json, sys
from pathlib import Path
from fusion.versions import VERSION
from models.store import Store
store = Store(Path(sys.argv[1]))
for number in range(10**6):
    with store.workspace() as folder:
        artefact = folder / "artefact"
        artefact.mkdir()
        (artefact / "manifest.json").write_text(json.dumps({"version": VERSION, "name": str(number)}))
        (artefact / "weights.safetensors").write_text(str(number))
        store.publish(artefact, "a" * 64)
    if number == 3:
        print("going", flush=True)
"""


@pytest.mark.parametrize("delay", [0.002, 0.013])
def test_a_process_killed_while_publishing_leaves_a_whole_model(store: Store, delay: float) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _PUBLISH_FOREVER, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "going\n"
    threading.Event().wait(delay)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()

    survivor = Store(store.root)
    survivor.sweep()
    model = survivor.get(A)
    assert (model.folder / "weights.safetensors").read_text() == model.name
    assert leftovers(survivor) == []
    publish(survivor, name="next")
    assert survivor.get(A).name == "next"
