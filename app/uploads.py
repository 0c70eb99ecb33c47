"""Networks as they are uploaded: one file, or a form with data files beside it, streamed to the disk within a limit."""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request

from app import forms
from app.bodies import FILE, limited, too_large
from app.problems import Problem
from models.beside import MOST_FILES, identity, plain

_BLOCK = 2**20
_FORM_OVERHEAD = 2**20  # boundaries and heads of the parts

# For the OpenAPI document: these bodies are read by hand, so the framework cannot know them.
BODY = {
    "requestBody": {
        "required": True,
        "description": "The model file, byte by byte (curl --data-binary @net.onnx); or a form with an ONNX file and "
        "the data files that it names (curl -F file=@net.onnx -F data=@net.onnx.data)",
        "content": {
            "application/octet-stream": {"schema": FILE},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": FILE,
                        "data": {
                            "type": "array",
                            "items": FILE,
                            "maxItems": MOST_FILES,
                            "description": "Each under the name that the network has for it, with its folders if there "
                            "are any",
                        },
                    },
                }
            },
        },
    }
}


@dataclass(frozen=True)
class Uploaded:
    """A network's file in a folder, the names of its data files there, and what all of them are known by."""

    network: Path
    data: tuple[str, ...]
    identity: str


async def receive(request: Request, folder: Path, filename: str | None, limit: int) -> Uploaded:
    """Take what a request brings into an empty folder: `limit` bytes of files at most. `filename` is the network's;
    without it a form's own counts. Raises the problems 413, 415, 422 and 400."""
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request, content_type, folder, filename, limit)
    if kind != "application/octet-stream":
        raise Problem(
            "unsupported-media-type",
            "Send the file itself, as Content-Type application/octet-stream, or multipart/form-data with the fields "
            "'file' and 'data'.",
        )
    network = folder / safe(filename)
    return Uploaded(network, (), await _write(network, limited(request, limit)))


def safe(filename: str | None) -> str:
    """A name that is only a name, whatever it was: no folders, no hidden files, no odd characters."""
    name = Path((filename or "").replace("\\", "/")).name
    return re.sub(r"[^\w.-]+", "_", name)[-100:].lstrip(".-") or "network"


async def _form(
    request: Request, content_type: str, folder: Path, filename: str | None, limit: int
) -> Uploaded:
    network: str | None = None
    hashes: dict[str, str] = {}
    received = 0
    async for head, content in forms.parts(content_type, limited(request, limit, _FORM_OVERHEAD)):
        name = _name(head, filename)
        if head.field == "file" and network is not None:
            raise _wrong("file", "there is more than one: send one network with its data files")
        if len(hashes) > MOST_FILES:
            raise _wrong("data", f"there are more than {MOST_FILES:,} files")
        network = name if head.field == "file" else network
        try:
            hashes[name] = await _write(folder / name, content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise _wrong(head.field, f"there are two files of the name {name!r}") from None
        received += (folder / name).stat().st_size
        if received > limit:
            raise too_large(limit)
    if network is None:
        raise _wrong("file", "there is no network: send its file in this field, and its data files in 'data'")
    own = hashes.pop(network)
    return Uploaded(folder / network, tuple(hashes), identity(own, hashes))


def _name(head: forms.Head, filename: str | None) -> str:
    """Where a part goes in the folder."""
    if head.field not in ("file", "data"):
        raise _wrong(head.field[:40], "the form has the fields 'file' and 'data' only")
    if head.filename is None:
        raise _wrong(head.field, "this is no file: send it with its name (curl -F data=@net.onnx.data)")
    if head.field == "file":
        return safe(filename or head.filename)
    name = plain(head.filename)
    if name is None:
        raise _wrong("data", f"{head.filename[:200]!r} is no name of a data file beside the network's")
    return name


async def _write(path: Path, pieces: AsyncIterator[bytes]) -> str:
    """A new file of these bytes; returns their SHA-256 in hex."""
    digest = hashlib.sha256()
    descriptor = await asyncio.to_thread(_create, path)
    try:
        async for block in _gathered(pieces):
            await asyncio.to_thread(_store, descriptor, block)
            digest.update(block)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _create(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


async def _gathered(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Larger blocks, so that each is worth a trip to another thread."""
    buffer = bytearray()
    async for piece in pieces:
        buffer += piece
        if len(buffer) >= _BLOCK:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def _store(descriptor: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


def _wrong(field: str, message: str) -> Problem:
    errors = [{"in": "body", "field": field, "message": message}]
    return Problem("invalid-parameter", f"{field}: {message}.", errors=errors)
