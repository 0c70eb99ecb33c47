"""The networks: upload, list, describe, change, download, delete."""

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from app import bodies, composites, uploads
from app.conversion import Request as Conversion
from app.library import Added, checked
from app.problems import Problem
from app.routes import problems
from app.schemas import (
    InnerLayerInfo,
    InnerLayerList,
    InputChange,
    Model,
    ModelChange,
    ModelDetail,
    ModelList,
)
from app.service import Service, Serving
from app.work import entered
from fusion.errors import BadInput
from models.preprocess import InputSpec
from models.store import BUILTIN, Manifest, Stored

router = APIRouter(prefix="/v1/models", tags=["models"])

ModelId = Annotated[str, Path(description="Id, unique prefix of an id (8 characters or more), or name")]
Numbers = Annotated[str | None, Query(pattern=r"^\s*-?[\d.eE+-]+(\s*,\s*-?[\d.eE+-]+)*\s*$")]

_UPLOAD_PROBLEMS = problems(
    "body-too-large", "unsupported-media-type", "invalid-parameter", "bad-file", "missing-data", "unsafe-file",
    "unsupported-operator", "nothing-to-explain", "non-finite-weights", "capture-failed", "not-equivalent",
    "format-refused", "conversion-failed", "conversion-timeout", "conversion-out-of-memory", "disk-full",
    "overloaded", "model-not-ready",
)  # fmt: skip
_LOCATION = {"Location": {"description": "Address of the model", "schema": {"type": "string"}}}


@router.get("", summary="All networks", responses=problems())
def models(service: Serving) -> ModelList:
    return ModelList(models=[_model(stored, service) for stored in service.store.models()])


@router.post(
    "",
    summary="Upload a network",
    status_code=201,
    response_model=Model,
    responses=_UPLOAD_PROBLEMS
    | {
        201: {"description": "The network is new here", "headers": _LOCATION},
        200: {"description": "The same file was here already", "model": Model, "headers": _LOCATION},
    },
    openapi_extra=uploads.BODY,
)
async def upload(
    request: Request,
    service: Serving,
    filename: Annotated[
        str | None, Query(max_length=300, description="The file's name, for messages")
    ] = None,
    name: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    size: Annotated[str | None, Query(pattern=r"^\d{1,5}(x\d{1,5})?$", examples=["224x224"])] = None,
    mean: Numbers = None,
    std: Numbers = None,
    order: Literal["RGB", "BGR", "L"] | None = None,
    scale: Annotated[float | None, Query(gt=0)] = None,
    resize: Literal["squash", "crop"] | None = None,
    crop_fraction: Annotated[float | None, Query(gt=0, le=1)] = None,
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None,
) -> JSONResponse:
    """The body is the file (ONNX; TorchScript, torch.export program where the operator has switched them on), or a form
    with an ONNX file and the data files that it keeps its weights in. It is converted at once and not kept.

    What is not stated about the input is taken from the file where it says so, and by default where not. The
    same file again is the same network; with other statements it takes the old one's place.
    """
    description = {
        "mean": _numbers(mean, "mean"),
        "std": _numbers(std, "std"),
        "order": order,
        "scale": scale,
        "resize": resize,
        "crop_fraction": crop_fraction,
        "interpolation": interpolation,
    }
    async with entered(service.store.workspace()) as folder:
        inbox = folder / "upload"  # a network may name any file beside it, so there is none but what was sent
        await asyncio.to_thread(inbox.mkdir)
        sent = await uploads.receive(request, inbox, filename, service.settings.max_upload)
        conversion = Conversion(
            sent.network,
            sent.data,
            size=_size(size),
            description={key: value for key, value in description.items() if value is not None},
            name=name,
            refused=service.refused_formats,
        )
        added: Added = await service.converting.run(
            partial(service.library.add, conversion, sent.identity, folder)
        )
    content = _model(added.model, service).model_dump(mode="json")
    return JSONResponse(content, 201 if added.new else 200, {"Location": f"/v1/models/{added.model.id}"})


@router.get(
    "/{model_id}",
    summary="Everything about a network",
    responses=problems("model-not-found", "invalid-parameter", "bad-artefact"),
)
def describe(model_id: ModelId, service: Serving) -> ModelDetail:
    stored = service.store.get(model_id)
    return ModelDetail(**_fields(stored, service), layers=stored.manifest["layers"])


@router.get(
    "/{model_id}/layers",
    summary="The layers whose relevance can be asked for",
    responses=problems(
        "model-not-found",
        "invalid-parameter",
        "bad-composite",
        "bad-artefact",
        "overloaded",
        "model-not-ready",
    ),
)
async def layers(
    model_id: ModelId,
    service: Serving,
    composite: Annotated[str, Query(description="Its rules say where relevance flows")] = composites.DEFAULT,
) -> InnerLayerList:
    """What `layer` and `through` of an explanation can name, in execution order."""

    def work() -> InnerLayerList:
        found = service.engine.ready(model_id, composite).explainer.inner_layers()
        return InnerLayerList(
            layers=[
                InnerLayerInfo(name=e.name, op=e.op, channels=e.channels, shape=list(e.shape)) for e in found
            ]
        )

    return await service.explain(model_id, work)


@router.patch(
    "/{model_id}",
    summary="Change a network's name, input description or labels",
    responses=problems("model-not-found", "invalid-parameter"),
)
def change(model_id: ModelId, wanted: ModelChange, service: Serving) -> Model:
    return _model(service.store.update(model_id, partial(_changed, wanted)), service)


@router.delete(
    "/{model_id}",
    summary="Delete a network",
    status_code=204,
    responses=problems("model-not-found", "invalid-parameter", "model-protected"),
)
def delete(model_id: ModelId, service: Serving) -> Response:
    if service.store.get(model_id).id == BUILTIN:
        raise Problem("model-protected", "The built-in network comes with the server and cannot be deleted.")
    service.store.delete(model_id)
    return Response(status_code=204)


@router.get(
    "/{model_id}/fused",
    summary="The fused network as a file",
    response_class=FileResponse,
    responses=problems("model-not-found", "invalid-parameter", "overloaded")
    | {200: {"description": "The file", "content": {"application/octet-stream": {"schema": bodies.FILE}}}},
)
async def fused(
    model_id: ModelId, service: Serving, format: Annotated[Literal["onnx", "pt2"], Query()] = "onnx"
) -> FileResponse:
    """The network with its normalizations folded away, as ONNX or as a torch.export program."""
    stored = await asyncio.to_thread(service.store.get, model_id)
    async with AsyncExitStack() as stack:
        path = await stack.enter_async_context(entered(service.store.workspace())) / f"fused.{format}"
        await service.converting.run(partial(service.library.converter.export, stored.folder, path))
        return FileResponse(
            path,
            media_type="application/octet-stream",
            filename=f"{uploads.safe(stored.name)}.fused.{format}",
            background=BackgroundTask(stack.pop_all().aclose),  # the file goes when it is sent
        )
    raise AssertionError("an exit stack swallows nothing")


def _fields(stored: Stored, service: Service) -> dict[str, Any]:
    default = service.settings.default_model
    return {
        **{key: stored.manifest.get(key) for key in Model.model_fields if key in stored.manifest},
        "id": stored.id,
        "name": stored.name,
        "default": default in (stored.id, stored.manifest.get("name")),
    }


def _model(stored: Stored, service: Service) -> Model:
    return Model(**_fields(stored, service))


def _changed(wanted: ModelChange, manifest: Manifest) -> Manifest:
    changed = dict(manifest)
    if wanted.name is not None:
        changed["name"] = wanted.name
    if wanted.labels is not None:
        try:
            changed["labels"] = checked(wanted.labels, manifest)
        except BadInput as error:
            raise _wrong("labels", str(error)) from error
    if wanted.input is not None:
        changed["input"] = _input(wanted.input, manifest["input"])
        changed["stated"] = None  # no upload states this, so the next one with a description counts
    return changed


def _input(wanted: InputChange, present: dict[str, Any]) -> dict[str, Any]:
    stated = wanted.model_dump(mode="json", exclude_none=True)
    for key in ("size", "channels"):
        if stated.get(key, present[key]) != present[key]:
            raise _wrong(f"input.{key}", "it is part of the network: upload the file again to change it")
    try:
        return InputSpec.from_json({**present, **stated}).to_json()
    except BadInput as error:
        raise _wrong("input", str(error)) from error


def _wrong(field: str, message: str) -> Problem:
    errors = [{"in": "body", "field": field, "message": message.rstrip(".")}]
    return Problem("invalid-parameter", f"{field}: {message.rstrip('.')}.", errors=errors)


def _numbers(text: str | None, field: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise _wrong(field, "these must be numbers with commas between them, one per channel") from None


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not 0 < int(height) <= 8192 or not 0 < int(width or height) <= 8192:
        raise _wrong("size", "height and width must be between 1 and 8192")
    return int(height), int(width or height)
