"""What a conversion leaves behind is taken over only as what it must be: plain files, and a whole artefact.

The process that wrote it read a file from outside and is not trusted.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

import fusion
from app.schemas import ModelDetail
from fusion.artefact import GRAPH, MANIFEST, WEIGHTS
from fusion.errors import ArtefactError, ClearfoldError
from fusion.footprint import footprint
from models.opened import classes_of, named_channels
from models.preprocess import InputSpec

MIB = 2**20
GIB = 2**30

_TEXTS = {GRAPH: 32 * MIB, MANIFEST: 32 * MIB}


class NotAdmitted(ClearfoldError):
    """A conversion left something behind that is no artefact."""

    code = "conversion-failed"


class TooLarge(ClearfoldError):
    """A network whose values take more memory than is given for it."""

    code = "conversion-out-of-memory"


class _Described(ModelDetail):
    """A manifest as the service answers it, word by word."""

    model_config = ConfigDict(strict=True)

    name: str = Field(max_length=300)
    format: str = Field(pattern=r"^[a-z]{1,20}$")
    created: str = Field(max_length=40)
    labels: list[Annotated[str, Field(max_length=1000)]] | None
    notes: list[Annotated[str, Field(max_length=4000)]] = Field(max_length=100)


def take(scratch: Path, target: Path, files: Mapping[str, int | None]) -> None:
    """Move the files of these names (-> most bytes) from the folder of an ended child; links, devices and whatever
    else is no plain file of its own are refused. Raises NotAdmitted."""
    with _folder(scratch) as source, _folder(target) as sink:
        for name, most in files.items():
            try:
                found = os.stat(name, dir_fd=source, follow_symlinks=False)
            except OSError as error:
                raise NotAdmitted(f"The conversion left no {name} behind ({error.strerror}).") from error
            plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid()
            if not plain:
                raise NotAdmitted(f"What the conversion left as {name} is no plain file; it was thrown away.")
            if most is not None and found.st_size > most:
                raise NotAdmitted(f"{name} has {found.st_size} bytes, more than the {most} that are taken.")
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=sink)


def artefact(scratch: Path, target: Path, most: int | None) -> dict[str, Any]:
    """Take an artefact over into the new folder `target`, the weights of at most so many bytes, and return its
    manifest. Raises NotAdmitted, TooLarge, NonFiniteWeights."""
    target.mkdir()
    take(scratch, target, {**_TEXTS, WEIGHTS: most})
    try:
        network, manifest = fusion.load(target)
        needed = footprint(network)
    except ArtefactError as error:
        raise NotAdmitted(f"The conversion wrote no network that can be used: {error}") from error
    try:
        described = _Described.model_validate_json(json.dumps({**manifest, "id": "", "default": False}))
        spec = InputSpec.from_json(manifest["input"])
    except (ValidationError, ClearfoldError) as error:
        raise NotAdmitted(
            f"The conversion wrote a manifest that makes no sense ({_first(error)})."
        ) from error
    _check(network, manifest, described, spec)
    _measure(needed, most)
    return manifest


def _check(
    network: fusion.Network, manifest: dict[str, Any], described: ModelDetail, spec: InputSpec
) -> None:
    """What the manifest says of the network is so."""
    outputs = [{"name": o.name, "kind": o.kind, "shape": list(o.shape)} for o in network.outputs]
    labels = described.labels
    agreed = {
        "input": [tuple(o.shape) for o in network.inputs] == [(None, spec.channels, *spec.size)],
        "outputs": manifest.get("outputs") == outputs,
        "classes": described.classes == classes_of(network),
        "labels": labels is None or len(labels) == named_channels(network),
    }
    for field, agrees in agreed.items():
        if not agrees:
            raise NotAdmitted(f"The conversion wrote a manifest whose '{field}' is not that of its network.")


def _measure(needed: int, most: int | None) -> None:
    """What its explanations will hold in memory is within bounds, however small the file was."""
    if most is not None and needed > most:
        raise TooLarge(
            f"One image's values in this network take {needed / GIB:.3g} GiB, more than the {most / GIB:.3g} GiB that "
            "a conversion may hold: raise the server's CLEARFOLD_CONVERSION_MEMORY, or state a smaller input size."
        )


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        entry = error.errors()[0]
        return f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
    return str(error)
