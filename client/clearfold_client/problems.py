"""The server's problem documents (RFC 9457) as exceptions: one class per kind worth catching."""

from typing import Any, ClassVar

import httpx


class Problem(Exception):
    """Something the server could not do, and what to do about it. `code` is the last part of the type."""

    codes: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        title: str,
        *,
        status: int,
        detail: str = "",
        type: str = "about:blank",
        instance: str = "",
        errors: list[dict[str, Any]] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail or title)
        self.title = title
        self.status = status
        self.detail = detail
        self.type = type
        self.instance = instance
        self.errors = errors or []
        self.retry_after = retry_after

    @property
    def code(self) -> str:
        return self.type.rpartition("/")[2]


class ModelNotFound(Problem):
    """The server has no such network."""

    codes = frozenset({"model-not-found"})


class InvalidImage(Problem):
    """The image cannot be read or is too large."""

    codes = frozenset({"bad-input"})


class BadTarget(Problem):
    """The network has no such class or output."""

    codes = frozenset({"bad-target", "no-class-scores"})


class BadLayer(Problem):
    """The network has no such layer, or the layer no such channels."""

    codes = frozenset({"bad-layer"})


class InvalidParameter(Problem):
    """A parameter is wrong; `errors` names each."""

    codes = frozenset({"invalid-parameter", "bad-composite"})


class UnsupportedModel(Problem):
    """The uploaded file cannot be converted."""

    codes = frozenset(
        {
            "bad-file",
            "missing-data",
            "unsafe-file",
            "capture-failed",
            "unsupported-operator",
            "nothing-to-explain",
            "non-finite-weights",
            "not-equivalent",
            "format-refused",
            "conversion-failed",
            "conversion-timeout",
            "conversion-out-of-memory",
        }
    )


class TooLarge(Problem):
    """The file is larger than the server takes."""

    codes = frozenset({"body-too-large"})


class TookTooLong(Problem):
    """The server gave an explanation up: ask for less."""

    codes = frozenset({"explanation-timeout"})


class Overloaded(Problem):
    """The server is busy or not ready yet: wait `retry_after` seconds."""

    codes = frozenset({"overloaded", "model-not-ready"})


class NotReachable(Problem):
    """No answer: no server at this address, or none within the time limit."""

    codes = frozenset({"not-reachable"})


_CLASSES = {code: kind for kind in Problem.__subclasses__() for code in kind.codes}


def from_response(response: httpx.Response) -> Problem:
    """The exception for an answer that is no success; its body must have been read."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict) or "title" not in document:
        return Problem(
            response.reason_phrase or "Failed",
            status=response.status_code,
            detail=f"{response.request.url} answered {response.status_code} and no reason: is it Clearfold?",
        )
    kind = str(document.get("type", "about:blank"))
    return _CLASSES.get(kind.rpartition("/")[2], Problem)(
        str(document["title"]),
        status=response.status_code,
        detail=str(document.get("detail", "")),
        type=kind,
        instance=str(document.get("instance", "")),
        errors=document.get("errors"),
        retry_after=_seconds(response.headers.get("Retry-After")),
    )


def from_transport(error: httpx.TransportError, url: str) -> Problem:
    """The exception for a request that got no answer."""
    late = isinstance(error, httpx.TimeoutException)
    return NotReachable(
        "No answer in time" if late else "The server cannot be reached",
        status=0,
        type="/problems/not-reachable",
        detail=f"{url} did not answer in time: give the client a longer timeout, or ask for less."
        if late
        else f"{url} cannot be reached ({error}): check the address, and that the server is running.",
    )


def _seconds(value: str | None) -> float | None:
    return float(value) if value and value.isdecimal() else None
