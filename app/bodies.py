"""Request bodies, read with a limit while they come in: images into memory, model files to disk."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from app.problems import Problem

_BLOCK = 2**20
_FORM_OVERHEAD = 2**16  # boundaries and headers of a multipart body

FILE = {"type": "string", "format": "binary"}
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "application/octet-stream")

# For the OpenAPI document: these bodies are read by hand, so the framework cannot know them.
IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "description": "The image, as the body itself or as the field `image` of a form",
        "content": {media_type: {"schema": FILE} for media_type in IMAGE_TYPES}
        | {
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["image"], "properties": {"image": FILE}}
            }
        },
    }
}
FILE_BODY = {
    "requestBody": {
        "required": True,
        "description": "The model file, byte by byte (curl --data-binary @net.onnx)",
        "content": {"application/octet-stream": {"schema": FILE}},
    }
}


async def image(request: Request, limit: int) -> bytes:
    """The image that a request brings, as its body or in a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        data = b"".join([block async for block in limited(request, limit)])
    else:
        data = await _form_image(request, limit)
    if not data:
        raise Problem("bad-input", "There is no image: send it as the body, or as the form field 'image'.")
    return data


async def to_file(request: Request, path: Path, limit: int) -> str:
    """Stream the body to a new file, synced to the disk; returns its SHA-256 in hex."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        async for block in _gathered(limited(request, limit)):
            await asyncio.to_thread(_store, descriptor, block)
            digest.update(block)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


async def limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body in pieces. Raises the problem 413 before a byte too much is taken."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > limit:
            raise _too_large(limit)
        yield piece


def _too_large(limit: int) -> Problem:
    size = f"{limit / 2**20:.4g} MiB" if limit >= 2**20 else f"{limit} bytes"
    return Problem(
        "body-too-large",
        f"The body is larger than the {size} that are taken here.",
        headers={"Connection": "close"},
    )


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


async def _form_image(request: Request, limit: int) -> bytes:
    """The form's field `image`. The whole body is read first: a form parser knows no limit."""
    body = b"".join([block async for block in limited(request, limit + _FORM_OVERHEAD)])

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, replay).form(max_files=1, max_fields=8)
    except (MultiPartException, HTTPException) as error:
        reason = getattr(error, "detail", None) or getattr(error, "message", "")
        raise Problem(
            "bad-request", f"The form cannot be read ({reason}): send one file, the field 'image'."
        ) from error
    field = form.get("image")
    if not isinstance(field, UploadFile):
        raise Problem("bad-input", "The form has no file in the field 'image'.")
    return await field.read()
