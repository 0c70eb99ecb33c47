"""From a file to a stored model: convert it apart, publish it whole. The service and the CLI share this."""

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app import __version__
from app.conversion import Converter, Request
from fusion.errors import BadInput
from fusion.outputs import labelled
from models.store import BUILTIN, Manifest, Store, Stored, UnknownModel

BUILTIN_NAME = "Clearfold objects"


@dataclass(frozen=True)
class Added:
    """A model of the store, and whether it was not there before."""

    model: Stored
    new: bool


class Library:
    """The store together with the one way into it. Safe to use from several threads."""

    def __init__(self, store: Store, converter: Converter) -> None:
        self.store = store
        self.converter = converter
        self._turns: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def add(
        self, request: Request, model_id: str, folder: Path, say: Callable[[str], None] = lambda stage: None
    ) -> Added:
        """Convert what the request says in `folder` (a workspace of the store) and publish it as `model_id`.

        The same file with the same statements, or with none, is the model that is already there. With other
        statements it takes its place.
        """
        stated = _stated(request)
        with self._turns[model_id]:
            present = self._present(model_id)
            if present is not None and stated in ({}, present.manifest.get("stated")):
                return Added(self._rename(present, request.name), new=False)
            self.converter.run(replace(request, name=request.name or _old_name(present)), folder, say)
            _state(folder / "artefact" / "manifest.json", stated)
            return Added(self.store.publish(folder / "artefact", model_id), new=present is None)

    def ensure_builtin(self) -> Stored:
        """The built-in network, made when it is not there yet or was made from other weights or code."""
        request = Request(BUILTIN, name=BUILTIN_NAME)
        present = self._present(BUILTIN)
        if present is not None and present.manifest.get("stated") == _stated(request):
            return present
        with self.store.workspace() as folder:
            return self.add(request, BUILTIN, folder).model

    def label(self, reference: str, labels: Sequence[str]) -> Stored:
        """Name the classes. Raises BadInput where there is not one label per class."""
        return self.store.update(
            reference, lambda manifest: {**manifest, "labels": checked(labels, manifest)}
        )

    def _present(self, model_id: str) -> Stored | None:
        try:
            return self.store.get(model_id)
        except UnknownModel:
            return None

    def _rename(self, model: Stored, name: str | None) -> Stored:
        if name is None or name == model.manifest.get("name"):
            return model
        return self.store.update(model.id, lambda manifest: {**manifest, "name": name})


def checked(labels: Sequence[str], manifest: Manifest) -> list[str]:
    """The labels, where they are one per class (or channel of the output that is explained by default). Raises
    BadInput."""
    count = labelled([(output["kind"], output["shape"]) for output in manifest["outputs"]])
    if count is None:
        raise BadInput("The network has neither classes nor channels that labels could name.")
    if len(labels) != count:
        raise BadInput(f"There must be {count} labels, one per class, not {len(labels)}.")
    return list(labels)


def _stated(request: Request) -> dict[str, Any]:
    """What the user said of the file that changes its artefact."""
    stated: dict[str, Any] = dict(request.description or {})
    if request.size:
        stated["size"] = list(request.size)
    if isinstance(request.source, str):
        stated |= {"source": request.source, "made_by": __version__}
    if request.source == BUILTIN:
        stated["weights"] = _builtin_weights()
    return stated


def _builtin_weights() -> str | None:
    """The SHA-256 of the weights that come with the library; None where they are missing."""
    from models.zoo.network import WEIGHTS_FILE

    if not WEIGHTS_FILE.is_file():
        return None
    with WEIGHTS_FILE.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path, stated: dict[str, Any]) -> None:
    """Note in the manifest what was stated, so that the same upload can be told from another one."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, "stated": stated}), encoding="utf-8")


def _old_name(model: Stored | None) -> str | None:
    return str(model.manifest["name"]) if model is not None and "name" in model.manifest else None
