"""Errors as RFC 9457 problem documents: one table of what can go wrong, one way to say it."""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from fusion.errors import ClearfoldError

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Kind:
    """A kind of problem: the HTTP status and a title that does not change from one occurrence to the next."""

    status: int
    title: str


KINDS: dict[str, Kind] = {
    # the request
    "bad-request": Kind(400, "The request cannot be read"),
    "not-found": Kind(404, "There is nothing at this address"),
    "method-not-allowed": Kind(405, "The address does not take this method"),
    "not-acceptable": Kind(406, "No answer in a format that was asked for"),
    "body-too-large": Kind(413, "The body is too large"),
    "unsupported-media-type": Kind(415, "The body's media type is not taken here"),
    "invalid-parameter": Kind(422, "A parameter is missing or wrong"),
    "request-failed": Kind(400, "The request failed"),
    # images and explanations
    "bad-input": Kind(422, "The image or its description cannot be used"),
    "bad-target": Kind(422, "The network has no such target"),
    "bad-layer": Kind(422, "The network has no such layer, or the layer no such channels"),
    "bad-composite": Kind(422, "The method, the composite or one of their parameters is wrong"),
    "explanation-timeout": Kind(422, "The explanation took too long"),
    "unbalanced-ledger": Kind(500, "The explanation does not add up"),
    # models
    "model-not-found": Kind(404, "There is no such network"),
    "model-not-ready": Kind(503, "The network is not ready yet"),
    "model-protected": Kind(409, "The built-in network stays"),
    "bad-file": Kind(422, "The file is no network that can be read"),
    "missing-data": Kind(422, "The network's weights are in a file that is not there"),
    "unsafe-file": Kind(422, "The file could do more than describe a network"),
    "capture-failed": Kind(422, "The network cannot be captured"),
    "unsupported-operator": Kind(422, "The network uses an operator that is not supported"),
    "no-class-scores": Kind(422, "The network gives no class scores"),
    "nothing-to-explain": Kind(422, "The network has no output that can be explained"),
    "non-finite-weights": Kind(422, "The network's weights are not finite"),
    "not-equivalent": Kind(422, "The network was not read back exactly"),
    "format-refused": Kind(422, "The file's format is not taken here"),
    "conversion-failed": Kind(422, "The network could not be converted"),
    "conversion-timeout": Kind(422, "The conversion took too long"),
    "conversion-out-of-memory": Kind(422, "The conversion needed too much memory"),
    "bad-artefact": Kind(500, "A stored network is damaged"),
    # the server
    "disk-full": Kind(507, "The server's disk is full"),
    "overloaded": Kind(503, "The server is busy"),
    "internal-error": Kind(500, "The server failed"),
    "clearfold-error": Kind(422, "The network cannot be explained"),
}

BY_STATUS = {404: "not-found", 405: "method-not-allowed", 406: "not-acceptable", 413: "body-too-large",
             415: "unsupported-media-type", 422: "invalid-parameter", 400: "bad-request"}  # fmt: skip


class Problem(Exception):
    """Something to tell the caller: what is wrong with this request, and what to do about it."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        status: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = dict(headers or {})
        self.errors = list(errors)
        self.kind = KINDS.get(code, KINDS["clearfold-error"])
        self.status = status or self.kind.status

    def response(self, instance: str) -> JSONResponse:
        content: dict[str, Any] = {
            "type": f"/problems/{self.code}",
            "title": self.kind.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
        }
        if self.errors:
            content["errors"] = self.errors
        return JSONResponse(content, self.status, self.headers, MEDIA_TYPE)


def busy(seconds: int, detail: str, code: str = "overloaded") -> Problem:
    """A problem that goes away by itself: try again after so many seconds."""
    return Problem(code, detail, headers={"Retry-After": str(seconds)})


def from_exception(error: Exception) -> Problem | None:
    """The problem that an error of the library or the system stands for; None for a mistake of ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ClearfoldError):
        return Problem(error.code, str(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem(
            "disk-full",
            "The disk of the model store is full, so nothing was stored: "
            "delete networks that are no longer needed, or give the server's data folder more room.",
        )
    return None
