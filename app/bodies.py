"""Request bodies, read with a limit while they come in: images into memory."""

import copy
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message

from app.problems import Problem

_FORM_OVERHEAD = 2**18  # boundaries and headers of a multipart body, and a target
_FILES = ("image", "mask", "reference")

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
QUESTION_BODY = copy.deepcopy(IMAGE_BODY)
QUESTION_BODY["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"] |= {  # type: ignore[index]
    "target": {"type": "string", "description": "As the parameter `target`, which it takes the place of"},
    "mask": {
        **FILE,
        "description": "An image of the same size: its bright pixels say where the output counts",
    },
    "reference": {**FILE, "description": "An image whose output this one's is compared with"},
}


@dataclass(frozen=True)
class Sent:
    """An image, and what a form may bring beside it."""

    image: bytes
    target: str | None = None
    mask: bytes | None = None
    reference: bytes | None = None


async def image(request: Request, limit: int) -> bytes:
    """The image that a request brings, as its body or in a form."""
    return (await question(request, limit)).image


async def question(request: Request, limit: int) -> Sent:
    """The image that a request brings, as its body or in a form, with the form's other fields."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        sent = Sent(b"".join([block async for block in limited(request, limit)]))
    else:
        sent = await _form(request, limit)
    if not sent.image:
        raise Problem("bad-input", "There is no image: send it as the body, or as the form field 'image'.")
    return sent


async def limited(request: Request, limit: int, beside: int = 0) -> AsyncIterator[bytes]:
    """The body in pieces. Raises the problem 413 before a byte too much is taken; `beside` is what a form may have
    around its files."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit + beside:
        raise too_large(limit)
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > limit + beside:
            raise too_large(limit)
        yield piece


def too_large(limit: int) -> Problem:
    """The problem with a body of more than so many bytes."""
    size = f"{limit / 2**20:.4g} MiB" if limit >= 2**20 else f"{limit} bytes"
    return Problem(
        "body-too-large",
        f"The body is larger than the {size} that are taken here.",
        headers={"Connection": "close"},
    )


async def _form(request: Request, limit: int) -> Sent:
    """The fields of a form. The whole body is read first: a form parser knows no limit."""
    body = b"".join([block async for block in limited(request, limit, _FORM_OVERHEAD)])

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, replay).form(max_files=len(_FILES), max_fields=8)
    except (MultiPartException, HTTPException) as error:
        reason = getattr(error, "detail", None) or getattr(error, "message", "")
        raise Problem(
            "bad-request",
            f"The form cannot be read ({reason}): send a file in the field 'image' (an explanation also takes 'mask' "
            "and 'reference').",
        ) from error
    files = {}
    for name in _FILES:
        field = form.get(name)
        if isinstance(field, UploadFile):
            files[name] = await field.read()
    if "image" not in files:
        raise Problem("bad-input", "The form has no file in the field 'image'.")
    target = form.get("target")
    return Sent(**files, target=target if isinstance(target, str) else None)
