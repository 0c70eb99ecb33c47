"""The model store: a folder of artefacts that is whole at every moment, whatever process dies when.

    <root>/models/<id>/<revision>/   graph.json, weights.safetensors, manifest.json; the last revision counts
    <root>/tmp/<workspace>/          work in progress, locked by the process that owns it
    <root>/trash/                    what is being removed

Nothing is ever changed under a reader: a model comes, goes and is replaced by one rename each, after its
files are on the disk. Several processes may use one store.
"""

import errno
import fcntl
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import ArtefactError, ClearfoldError
from fusion.versions import upgrade_manifest
from models.removal import remove

BUILTIN = "builtin"
MANIFEST = "manifest.json"
SHORTEST_PREFIX = 8

_log = logging.getLogger(__name__)

Manifest = dict[str, Any]

_ID = re.compile(rf"[0-9a-f]{{64}}|{BUILTIN}")


class UnknownModel(ClearfoldError):
    """No stored model goes by this id or name."""

    code = "model-not-found"


@dataclass(frozen=True)
class Stored:
    """One model as it is in the store: its id, the folder of its artefact, what its manifest says."""

    id: str
    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return str(self.manifest.get("name") or self.id)

    @property
    def etag(self) -> str:
        """Another one after every change, so that caches can tell."""
        return str(self.manifest["etag"])


class Store:
    """Artefacts under one folder, by the SHA-256 of the file, or files (`models.beside`), that they were made from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models, self._tmp, self._trash = (root / name for name in ("models", "tmp", "trash"))
        for folder in (self._models, self._tmp, self._trash):
            folder.mkdir(parents=True, exist_ok=True)

    def models(self) -> list[Stored]:
        """Every model, the built-in one first, then by age."""
        models = []
        for folder in self._models.iterdir():
            try:
                model = self._read(folder.name) if _ID.fullmatch(folder.name) else None
            except ArtefactError as damaged:
                _log.warning("%s", damaged)
                continue
            if model is not None:
                models.append(model)
        return sorted(models, key=lambda model: (model.id != BUILTIN, str(model.manifest.get("created", ""))))

    def get(self, reference: str) -> Stored:
        """The model of this id, unique prefix of an id (8 characters or more), or unique name."""
        if _ID.fullmatch(reference):
            model = self._read(reference)
            if model is not None:
                return model
        matches = [model for model in self.models() if _refers(reference, model)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UnknownModel(f"{len(matches)} models go by {reference!r}: use more of the id's characters.")
        raise UnknownModel(f"There is no model {reference[:80]!r} here: list the models to see their ids.")

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder on the store's volume for one piece of work; it goes away with the work or its process."""
        with self._locked():
            folder = self._tmp / uuid.uuid4().hex
            folder.mkdir()
            owner = _lock(folder / ".owner")
        try:
            assert owner is not None  # nobody else knows the name
            yield folder
        finally:
            remove(folder)
            if owner is not None:
                os.close(owner)

    def publish(self, artefact: Path, model_id: str) -> Stored:
        """Make the finished artefact folder (on this volume) the model `model_id`, in place of any before."""
        if not _ID.fullmatch(model_id):
            raise ArtefactError(f"{model_id!r} is no model id: it must be the SHA-256 of the model's file.")
        manifest = _read_manifest(artefact / MANIFEST)
        _write_manifest(artefact, {**manifest, "id": model_id, "etag": uuid.uuid4().hex})
        _sync_tree(artefact)
        with self._locked():
            home = self._models / model_id
            home.mkdir(exist_ok=True)
            old = _revisions(home)
            target = home / str(_number(old[-1]) + 1 if old else 1)
            artefact.rename(target)
            _sync(home)
            _sync(self._models)
            self._discard(old)
            return Stored(model_id, target, _read_manifest(target / MANIFEST))

    def update(self, reference: str, change: Callable[[Manifest], Manifest]) -> Stored:
        """Replace the manifest by `change(manifest)`; the network itself stays as it is."""
        with self._locked():
            model = self.get(reference)
            manifest = {**change(dict(model.manifest)), "id": model.id, "etag": uuid.uuid4().hex}
            _write_manifest(model.folder, manifest)
            _sync(model.folder)
            return Stored(model.id, model.folder, manifest)

    def delete(self, reference: str) -> None:
        with self._locked():
            self._discard([self._models / self.get(reference).id])
            _sync(self._models)

    def sweep(self) -> None:
        """Remove what dead processes left behind; call it at startup."""
        with self._locked():
            for folder in self._tmp.iterdir():
                owner = _lock(folder / ".owner")
                if owner is not None:
                    remove(folder)
                    os.close(owner)
            for home in self._models.iterdir():
                self._discard(_revisions(home)[:-1])
                with suppress(OSError):  # only an empty one goes: its publication never came
                    home.rmdir()
            self._discard(list(self._trash.iterdir()))

    def _read(self, model_id: str) -> Stored | None:
        # A revision can be replaced between the listing and the reading: then look again.
        for _ in range(5):
            try:
                revisions = _revisions(self._models / model_id)
                if not revisions:
                    return None
                return Stored(model_id, revisions[-1], _read_manifest(revisions[-1] / MANIFEST))
            except FileNotFoundError:
                continue
        return None

    def _discard(self, folders: list[Path]) -> None:
        """Out of sight by one rename each, then away."""
        for folder in folders:
            doomed = folder
            if folder.parent != self._trash:
                doomed = folder.rename(self._trash / uuid.uuid4().hex)
            remove(doomed)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, among the threads and processes that share the store."""
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _refers(reference: str, model: Stored) -> bool:
    long_enough = len(reference) >= SHORTEST_PREFIX
    return (long_enough and model.id.startswith(reference)) or model.manifest.get("name") == reference


def _lock(path: Path) -> int | None:
    """Hold the lock file until the descriptor is closed or the process ends; None when another holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # gone meanwhile, or no lock at all
            return None
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _revisions(home: Path) -> list[Path]:
    """The complete revisions of a model, oldest first."""
    try:
        return sorted((path for path in home.iterdir() if path.name.isdecimal()), key=_number)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _number(revision: Path) -> int:
    return int(revision.name)


def _read_manifest(path: Path) -> Manifest:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged: delete the model and upload it again.") from error
    if not isinstance(manifest, dict):
        raise ArtefactError(f"{path} holds no manifest: delete the model and upload it again.")
    return upgrade_manifest(manifest, str(path))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replaced by a rename, so that a reader sees the old one or the new one."""
    draft = folder / f".{MANIFEST}.new"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(folder / MANIFEST)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
