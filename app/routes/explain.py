"""Predict, explain, preview: what a network says of an image, and why."""

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from app import bodies, composites, encoding, methods, negotiation
from app.explaining import Question, explain, predict, preview
from app.inside import channels_by_layer
from app.methods import Limits, WrongOption
from app.problems import Problem
from app.routes import EXPLAIN_PROBLEMS, IMAGE_PROBLEMS, problems
from app.schemas import (
    CompositeInfo,
    CompositeList,
    ExplanationSummary,
    MethodInfo,
    MethodList,
    MethodOption,
    Predictions,
)
from app.service import Service, Serving
from lrp.heatmap import COLORMAPS
from models.preprocess import InputSpec

router = APIRouter(prefix="/v1", tags=["explain"])

ModelId = Annotated[str, Path(description="Id, unique prefix of an id (8 characters or more), or name")]

Top = Annotated[int, Query(ge=1, le=1000, description="How many")]


class Options(BaseModel):
    """How to explain, and how to draw it. Further fields are parameters of the composite, or options of the method."""

    model_config = ConfigDict(extra="allow")

    target: str | None = Field(
        None,
        max_length=100_000,
        description="Class index or label, by default the best class; or JSON for a number made of an output: `output` "
        "(name or position), `index` (one value), `channel`, `region` (`wins`, {`box`: [top, left, bottom, right], "
        "`of`: input or output}, {`mask`: rows}), `reduce` (sum, mean, max, norm, cosine), `like`, `axis`. Without "
        "class scores, by default: of maps the sum where the class wins that wins at most places, of rows the largest "
        "value, of anything else the norm",
        examples=["star", '{"output": "out", "channel": 15, "region": "wins"}'],
    )
    method: str = Field(methods.DEFAULT, description="See GET /v1/methods, also for what else it takes")
    composite: str = Field(composites.DEFAULT, description="See GET /v1/composites, also for its parameters")
    view: Literal["heatmap", "overlay"] = Field("heatmap", description="Of the PNG")
    cmap: str = Field("bwr", description=f"Colour map of the PNG: {', '.join(COLORMAPS)}")
    opacity: float = Field(0.6, ge=0, le=1, description="Of the heatmap over the image")
    clip: float = Field(99.5, gt=0, le=100, description="Percentile of |relevance| that gets the full colour")
    gain: float = Field(1.0, gt=0, le=1000, description="Factor on the colours' strength")
    pool: bool = Field(
        False, description="NPY with the channels summed, [H, W]; of a layer its rows and columns"
    )
    against: str | None = Field(
        None,
        description="Class index or label: why the target rather than this class (the difference of their scores is "
        "explained); `others` is the mean of all other classes",
    )
    layer: str | None = Field(
        None,
        max_length=300,
        description="A layer of GET /v1/models/{id}/layers: PNG and NPY have the relevance there, JSON its channels "
        "with the most, NPZ both. With GradCAM: the layer whose maps are weighed",
    )
    top: int = Field(10, ge=1, le=10_000, description="How many channels of the layer are named")
    through: str | None = Field(
        None,
        max_length=20_000,
        description="JSON, layers with channels: of the relevance at these layers, only that of these channels "
        "goes on to the pixels (what goes past a layer, along a skip connection, is not touched)",
        examples=['{"layer3.0.conv2": [17, 42]}'],
    )

    def look(self) -> encoding.Look:
        if self.cmap not in COLORMAPS:
            raise _invalid("cmap", f"there is none called {self.cmap[:40]!r}, but {', '.join(COLORMAPS)}")
        return encoding.Look(self.view, self.cmap, self.opacity, self.clip, self.gain, self.pool)

    def channels(self) -> dict[str, list[int]]:
        """What `through` says. Raises the problem 422."""
        try:
            return {} if self.through is None else channels_by_layer(self.through)
        except ValueError as error:
            raise _invalid("through", str(error)) from None

    def parameters(self) -> dict[str, Any]:
        """The composite's parameters, or the method's options. Raises BadComposite and the problem 422."""
        stated = dict(self.model_extra or {})
        if self.layer and "layer" in methods.of(self.method).options:
            stated["layer"] = self.layer
        try:
            methods.refuse_others(self.method, self.model_fields_set)
            return methods.read(self.method, stated, self.composite, also=tuple(Options.model_fields))
        except WrongOption as error:
            raise _invalid(error.field, str(error)) from None


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The explanation, in the format that Accept asks for (PNG by default)",
        "headers": {
            "X-Clearfold-Method": {"description": "As it was asked for", "schema": {"type": "string"}},
            "X-Clearfold-Target": {
                "description": "Explained class; left out for anything else",
                "schema": {"type": "integer"},
            },
            "X-Clearfold-Explained": {
                "description": "What was explained, in words, percent-encoded",
                "schema": {"type": "string"},
            },
            "X-Clearfold-Label": {"description": "Its label, percent-encoded", "schema": {"type": "string"}},
            "X-Clearfold-Score": {"description": "Its score", "schema": {"type": "number"}},
            "X-Clearfold-Sum": {"description": "Sum of the relevance", "schema": {"type": "number"}},
            "X-Clearfold-Composite": {
                "description": "As it was asked for; LRP only",
                "schema": {"type": "string"},
            },
            "X-Clearfold-Picked": {
                "description": "Composite that was used; LRP only",
                "schema": {"type": "string"},
            },
            "X-Clearfold-Balanced": {
                "description": "Whether the score is accounted for; JSON and NPZ say what is wrong; LRP only",
                "schema": {"type": "boolean"},
            },
        },
        "content": {
            encoding.PNG: {"schema": bodies.FILE},
            encoding.NPY: {"schema": bodies.FILE},
            encoding.NPZ: {"schema": bodies.FILE},
        },
        "model": ExplanationSummary,
    }
}
_PNG: dict[int | str, dict[str, Any]] = {
    200: {"description": "The image", "content": {encoding.PNG: {"schema": bodies.FILE}}}
}


@router.post(
    "/explain",
    summary="Explain an image with the default network",
    response_class=Response,
    responses=EXPLAIN_PROBLEMS | _ANSWERS,
    openapi_extra=bodies.QUESTION_BODY,
)
async def explain_default(
    request: Request, options: Annotated[Options, Query()], service: Serving
) -> Response:
    """The shortest call: POST an image, get the heatmap of the class that the network sees in it."""
    return await _explain(request, service, service.settings.default_model, options)


@router.post(
    "/models/{model_id}/explain",
    summary="Explain an image",
    response_class=Response,
    responses=EXPLAIN_PROBLEMS | _ANSWERS,
    openapi_extra=bodies.QUESTION_BODY,
)
async def explain_with(
    request: Request, model_id: ModelId, options: Annotated[Options, Query()], service: Serving
) -> Response:
    """Relevance of each pixel for the class `target`, or a number made of any output, as PNG, NPY, NPZ or JSON,
    whichever Accept asks for. A form may bring a `mask` and a `reference` image, and the target.

    `against` explains why this class rather than another, `layer` looks at the relevance inside the network, `through`
    lets only the relevance of chosen channels pass. Further query parameters are parameters of the composite, as in
    `?composite=EpsilonPlus&epsilon=1e-3`, or options of another method, as in `?method=IntegratedGradients&n_steps=32`.
    """
    return await _explain(request, service, model_id, options)


async def _explain(request: Request, service: Service, model_id: str, options: Options) -> Response:
    media_type = negotiation.choose(request.headers.get("accept"), tuple(encoding.ENCODERS))
    look, parameters, through = options.look(), options.parameters(), options.channels()
    sent = await bodies.question(request, service.settings.max_image)
    question = Question(
        sent.image,
        sent.target or options.target,
        options.composite,
        parameters,
        options.method,
        options.against or None,
        options.layer or None,
        options.top,
        through,
        sent.mask,
        sent.reference,
    )
    rules = (options.composite, parameters) if options.method == methods.LRP else ()
    load = partial(service.engine.ready, model_id, *rules)
    limits = Limits(service.settings.explanation_memory, service.settings.explanation_seconds)

    def work() -> Response:
        answer = explain(load, question, limits)
        content = encoding.ENCODERS[media_type](answer, look)
        headers = {**encoding.headers(answer.summary), "Vary": "Accept"}
        return Response(content, media_type=media_type, headers=headers)

    return await service.explain(model_id, work)


@router.post(
    "/predict",
    summary="The best classes of an image, by the default network",
    response_model=Predictions,
    responses=IMAGE_PROBLEMS,
    openapi_extra=bodies.IMAGE_BODY,
)
async def predict_default(request: Request, service: Serving, top: Top = 5) -> dict[str, Any]:
    return await predict_with(request, service.settings.default_model, service, top)


@router.post(
    "/models/{model_id}/predict",
    summary="The best classes of an image",
    response_model=Predictions,
    responses=IMAGE_PROBLEMS,
    openapi_extra=bodies.IMAGE_BODY,
)
async def predict_with(request: Request, model_id: ModelId, service: Serving, top: Top = 5) -> dict[str, Any]:
    image = await bodies.image(request, service.settings.max_image)
    return await service.explain(model_id, lambda: predict(service.engine.ready(model_id), image, top))


@router.post(
    "/models/{model_id}/preview",
    summary="What the network sees of an image",
    response_class=Response,
    responses=IMAGE_PROBLEMS | _PNG,
    openapi_extra=bodies.IMAGE_BODY,
)
async def preview_with(request: Request, model_id: ModelId, service: Serving) -> Response:
    """The image, resized and cropped to the network's input, as PNG."""
    image = await bodies.image(request, service.settings.max_image)

    def work() -> Response:
        spec = InputSpec.from_json(service.store.get(model_id).manifest["input"])
        return Response(encoding.png(preview(spec, image)), media_type=encoding.PNG)

    return await service.explain(model_id, work)


@router.get("/composites", summary="The composites and their parameters", responses=problems())
async def all_composites() -> CompositeList:
    return CompositeList(
        composites=[
            CompositeInfo(
                name=name, description=composites.describe(name), parameters=composites.parameters(name)
            )
            for name in composites.names()
        ],
        default=composites.DEFAULT,
    )


@router.get("/methods", summary="The methods and their options", responses=problems())
async def all_methods() -> MethodList:
    """`method` of an explanation, each with what else it takes: the bounds are those of this service."""
    return MethodList(methods=[_described(name) for name in methods.names()], default=methods.DEFAULT)


def _described(name: str) -> MethodInfo:
    method, defaults = methods.of(name), methods.defaults(name)
    return MethodInfo(
        name=name,
        description=method.description,
        parameters=[
            MethodOption(
                name=option,
                type=what.type,
                description=what.description,
                default=defaults[option],
                minimum=what.minimum,
                maximum=what.maximum,
                choices=list(what.choices) or None,
            )
            for option, what in method.options.items()
        ],
    )


def _invalid(field: str, message: str) -> Problem:
    return Problem(
        "invalid-parameter",
        f"{field}: {message}.",
        errors=[{"in": "query", "field": field, "message": message}],
    )
