"""The API's resources, a module each."""

from typing import Any

from app.problems import KINDS, MEDIA_TYPE
from app.schemas import ProblemDocument

Responses = dict[int | str, dict[str, Any]]


def problems(*codes: str) -> Responses:
    """The declared problem answers of an operation, for the OpenAPI document; every one has a 500."""
    responses: Responses = {}
    for code in (*codes, "internal-error"):
        kind = KINDS[code]
        entry = responses.setdefault(
            kind.status,
            {"description": "", "content": {MEDIA_TYPE: {"schema": {"$ref": _SCHEMA}, "examples": {}}}},
        )
        entry["description"] += ("; " if entry["description"] else "") + kind.title
        entry["content"][MEDIA_TYPE]["examples"][code] = {
            "summary": kind.title,
            "value": {"type": f"/problems/{code}", "title": kind.title, "status": kind.status,
                      "detail": "What is wrong, and what to do about it.", "instance": "4f0c..."},
        }  # fmt: skip
    return responses


_SCHEMA = f"#/components/schemas/{ProblemDocument.__name__}"
_IMAGE_CODES = ("bad-request", "model-not-found", "body-too-large", "invalid-parameter", "bad-input",
                "overloaded", "model-not-ready")  # fmt: skip
IMAGE_PROBLEMS = problems(*_IMAGE_CODES, "no-class-scores")
EXPLAIN_PROBLEMS = problems(
    *_IMAGE_CODES, "bad-target", "no-class-scores", "bad-layer", "bad-composite", "explanation-timeout",
    "not-acceptable", "unbalanced-ledger",
)  # fmt: skip
