"""Stored networks of older versions, brought to today's form one version at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusion.errors import ArtefactError

Json = dict[str, Any]
Upgrade = Callable[[Json], Json]

VERSION = 2
# What changed:
# 1: one output, the class scores.
# 2: outputs by name, with what each holds.


def _named_output(graph: Json) -> Json:
    *nodes, output = graph["nodes"]
    return {**graph, "nodes": [*nodes, {**output, "names": ["output"], "kinds": ["scores"]}]}


def _listed_output(manifest: Json) -> Json:
    scores = {"name": "output", "kind": "scores", "shape": [None, manifest.get("classes")]}
    return {**manifest, "outputs": [scores]}


# From each version to the next one.
_GRAPHS: Mapping[int, Upgrade] = {1: _named_output}
_MANIFESTS: Mapping[int, Upgrade] = {1: _listed_output}


def upgrade_graph(graph: Json, name: str) -> Json:
    """The content of the file `name`, a graph.json, as this version writes it. Raises ArtefactError where it is of no
    version that is known."""
    return _upgrade(graph, name, _GRAPHS)


def upgrade_manifest(manifest: Json, name: str) -> Json:
    """The same for a manifest.json."""
    return _upgrade(manifest, name, _MANIFESTS)


def _upgrade(content: Json, name: str, upgrades: Mapping[int, Upgrade]) -> Json:
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < min(upgrades):
        raise ArtefactError(f"{name} is damaged: it is of version {version!r}. Upload the network again.")
    if version > VERSION:
        raise ArtefactError(
            f"{name} was written by a newer Clearfold: it is of version {version}, and up to {VERSION} are read here. "
            "Update Clearfold, or upload the network again."
        )
    for number in range(version, VERSION):
        try:
            content = upgrades[number](content)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtefactError(f"{name} is damaged ({error!r}). Upload the network again.") from error
    return {**content, "version": VERSION}
