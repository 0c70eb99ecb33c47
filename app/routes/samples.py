"""The bundled sample images, to try things out with."""

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

from app.problems import Problem
from app.routes import problems
from app.schemas import Sample, SampleList
from models.zoo.samples import sample_files

router = APIRouter(prefix="/v1/samples", tags=["samples"])


@router.get("", summary="The bundled sample images", responses=problems())
async def samples() -> SampleList:
    return SampleList(samples=[Sample(name=name, url=f"/v1/samples/{name}.png") for name in _files()])


@router.get(
    "/{name}.png",
    summary="One sample image",
    response_class=FileResponse,
    responses=problems("not-found", "invalid-parameter")
    | {200: {"content": {"image/png": {}}, "description": "The image"}},
)
async def sample(name: str) -> FileResponse:
    path = _files().get(name)
    if path is None:
        raise Problem("not-found", f"There is no sample {name[:80]!r}: GET /v1/samples lists them.")
    return FileResponse(path, media_type="image/png", headers={"Cache-Control": "max-age=3600"})


@cache
def _files() -> dict[str, Path]:
    return {sample.name: sample.image for sample in sample_files()}
