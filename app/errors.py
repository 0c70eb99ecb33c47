"""Turns every error of a request into a problem document, also those of the framework."""

import logging
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from app.problems import BY_STATUS, Problem, from_exception
from fusion.errors import ClearfoldError

_log = logging.getLogger(__name__)

_ADVICE = {
    404: "Nothing is at {path}: see /openapi.json for what there is.",
    405: "{path} does not take {method}: it takes {allow}.",
}


def install(app: FastAPI) -> None:
    """Register the handlers; what none of them takes goes to `app.middleware`, as an internal error."""
    app.add_exception_handler(Problem, _known)
    app.add_exception_handler(ClearfoldError, _known)
    app.add_exception_handler(OSError, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _gone)


def internal(error: Exception, instance: str) -> JSONResponse:
    """The answer to a mistake of ours: nothing about its inside, but the id to look for in the log."""
    problem = Problem(
        "internal-error",
        f"This is a fault of the server, not of the request. Its log says more: look for {instance}.",
    )
    return problem.response(instance)


async def _known(request: Request, error: Exception) -> Response:
    problem = from_exception(error)
    if problem is None:
        raise error
    if problem.status in (500, 507):
        _log.warning("%s %s: %s", request.method, request.url.path, error)
    return problem.response(_instance(request))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    advice = _ADVICE.get(error.status_code, str(error.detail))
    detail = advice.format(
        path=request.url.path,
        method=request.method,
        allow=headers.get("allow") or headers.get("Allow", "others"),
    )
    code = BY_STATUS.get(error.status_code, "request-failed")
    return Problem(code, detail, headers=headers, status=error.status_code).response(_instance(request))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [_plain(entry) for entry in error.errors()]
    first = errors[0]
    detail = f"{first['field']}: {first['message']}." + (
        f" And {len(errors) - 1} more, see errors." if len(errors) > 1 else ""
    )
    return Problem("invalid-parameter", detail, errors=errors).response(_instance(request))


def _plain(entry: Any) -> dict[str, str]:
    where = [str(part) for part in entry["loc"]]
    return {"in": where[0], "field": ".".join(where[1:]) or where[0], "message": entry["msg"]}


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


def _instance(request: Request) -> str:
    return str(request.scope.get("clearfold.request_id", ""))
