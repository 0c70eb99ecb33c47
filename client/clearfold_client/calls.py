"""Every call of the API as a value: the request, and how to read its answer. Nothing here sends anything."""

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx

from clearfold_client.images import ImageLike, encode
from clearfold_client.results import Explanation, Health, Layer, Method, Model, Prediction
from clearfold_client.uploads import BINARY, Progress, Upload, data_beside, of_network

T = TypeVar("T")

NPZ = "application/x-npz"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. `body` is sent, `sink` is the file that takes the answer's body if there is one."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Upload | None = None
    json: Any = None
    files: dict[str, bytes] | None = None  # of a form, with `form`, its other fields
    form: dict[str, str] | None = None
    sink: Path | None = None
    also: frozenset[int] = frozenset()  # statuses that are answers although they are no success
    then: "Callable[[T], Call[T]] | None" = None


def explain(
    image: ImageLike,
    model: str | None = None,
    target: int | str | Mapping[str, Any] | None = None,
    composite: str | None = None,
    *,
    method: str | None = None,
    against: int | str | None = None,
    layer: str | None = None,
    top: int | None = None,
    through: Mapping[str, int | Sequence[int]] | None = None,
    mask: ImageLike | None = None,
    reference: ImageLike | None = None,
    **parameters: float | str | tuple[int, int],
) -> Call[Explanation]:
    """The relevance of each pixel for the class `target` (index or label; by default the best one).

    `image` is a path, the bytes of an image file, a PIL image or a uint8 array [H, W, 3]; `model` an id, the
    start of one, or a name; `parameters` are those of the composite. `method`: another one than LRP, as
    `method="IntegratedGradients", n_steps=32`; `methods()` has them with what they take, and there is no composite and
    no ledger then. `against`: why not this class (index or label, or "others"). `layer`: the relevance there as well,
    as `inner`, with its `top` channels; for GradCAM, the layer whose maps are weighed. `through`: channels by layer;
    only relevance that passes these goes on to the pixels. `layers()` has the layers' names.

    `target` may also be a number made of one of the network's outputs (`model().outputs`), as
    `{"output": "out", "channel": 15, "region": "wins"}`: the server's documentation of `target` has all fields. `mask`:
    an image of the size of `image`; its bright pixels say where the output counts. `reference`: an image whose output
    this one's is compared with (by the cosine, if the target says nothing else). Raises ModelNotFound,
    InvalidImage, BadTarget, BadLayer, InvalidParameter, TookTooLong, Overloaded, NotReachable.
    """
    path = "v1/explain" if model is None else f"v1/models/{_id(model)}/explain"
    channels = None if through is None else {name: _channels(value) for name, value in through.items()}
    if isinstance(target, Mapping):
        target = json.dumps(dict(target))
    also = {"mask": mask, "reference": reference}
    files = {name: encode(picture) for name, picture in also.items() if picture is not None}
    query = _query(
        target=target if not files else None,
        method=method,
        composite=composite,
        against=against,
        layer=layer,
        top=top,
        through=None if channels is None else json.dumps(channels),
        **{name: _size(value) if isinstance(value, tuple) else value for name, value in parameters.items()},
    )
    if files:
        form = {} if target is None else {"target": str(target)}
        files["image"] = encode(image)
        return Call("POST", path, _explanation, query, {"Accept": NPZ}, files=files, form=form)
    return Call("POST", path, _explanation, query, {"Accept": NPZ, "Content-Type": BINARY}, encode(image))


def predict(image: ImageLike, model: str | None = None, top: int = 5) -> Call[tuple[Prediction, ...]]:
    """The `top` classes, best first."""
    path = "v1/predict" if model is None else f"v1/models/{_id(model)}/predict"
    return Call("POST", path, _predictions, _query(top=top), {"Content-Type": BINARY}, encode(image))


def models() -> Call[tuple[Model, ...]]:
    """All networks on the server."""
    return Call("GET", "v1/models", lambda response: tuple(map(Model.from_json, response.json()["models"])))


def model(id: str) -> Call[Model]:
    """Everything about a network: `raw` holds its layers and its fusion report too."""
    return Call("GET", f"v1/models/{_id(id)}", _model)


def layers(id: str, composite: str | None = None) -> Call[tuple[Layer, ...]]:
    """The layers that `layer` and `through` of an explanation can name, in execution order."""
    query = _query(composite=composite)
    return Call("GET", f"v1/models/{_id(id)}/layers", _layers, query)


def upload_model(
    path: str | Path,
    *,
    name: str | None = None,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float | None = None,
    order: Literal["RGB", "BGR", "L"] | None = None,
    resize: Literal["squash", "crop"] | None = None,
    crop_fraction: float | None = None,
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None,
    labels: Sequence[str] | None = None,
    data: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Call[Model]:
    """Upload a network's file and wait until it is converted. Files are streamed, so they may be large.

    An ONNX file that keeps its weights in other files brings those beside it that are called by its own name
    (`net.onnx.data`, `net.onnx_data`, `net.data`) and that it mentions; `data` has the paths of others. What is not
    stated about the input is taken from the file, or by default. `progress(sent, total)` is called with bytes. Raises
    UnsupportedModel (its `code` is "missing-data" where a data file was not sent), Overloaded, NotReachable.
    """
    file = Path(path)
    query = _query(
        filename=file.name,
        name=name,
        size=None if size is None else _size(size),
        mean=_numbers(mean),
        std=_numbers(std),
        scale=scale,
        order=order,
        resize=resize,
        crop_fraction=crop_fraction,
        interpolation=interpolation,
    )
    then = None if labels is None else lambda uploaded: change_model(uploaded.id, labels=labels)
    upload = of_network(file, (*data_beside(file), *map(Path, data)), progress)
    return Call("POST", "v1/models", _model, query, upload.headers(), upload, then=then)


def change_model(
    id: str,
    *,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    input: dict[str, Any] | None = None,
) -> Call[Model]:
    """Change a network's name, its classes' labels, or fields of its input description (mean, std, ...)."""
    wanted = {"name": name, "labels": None if labels is None else list(labels), "input": input}
    given = {key: value for key, value in wanted.items() if value is not None}
    return Call("PATCH", f"v1/models/{_id(id)}", _model, json=given)


def delete_model(id: str) -> Call[None]:
    """Delete a network. Raises ModelNotFound."""
    return Call("DELETE", f"v1/models/{_id(id)}", lambda response: None)


def download_fused(id: str, path: str | Path, format: Literal["onnx", "pt2"] = "onnx") -> Call[Path]:
    """Write the network with its normalizations folded away to `path`, as ONNX or torch.export program."""
    file = Path(path)
    return Call("GET", f"v1/models/{_id(id)}/fused", lambda response: file, _query(format=format), sink=file)


def composites() -> Call[dict[str, dict[str, Any]]]:
    """The composites by name, each with its parameters and their defaults."""
    return Call("GET", "v1/composites", _composites)


def methods() -> Call[tuple[Method, ...]]:
    """The methods of `explain`, each with the options that it takes."""
    return Call(
        "GET", "v1/methods", lambda response: tuple(map(Method.from_json, response.json()["methods"]))
    )


def health() -> Call[Health]:
    """Whether the server can serve."""
    return Call("GET", "readyz", _health, also=frozenset({503}))


def _explanation(response: httpx.Response) -> Explanation:
    return Explanation.from_npz(response.content)


def _predictions(response: httpx.Response) -> tuple[Prediction, ...]:
    return tuple(Prediction(**prediction) for prediction in response.json()["predictions"])


def _model(response: httpx.Response) -> Model:
    return Model.from_json(response.json())


def _layers(response: httpx.Response) -> tuple[Layer, ...]:
    return tuple(Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in response.json()["layers"])


def _composites(response: httpx.Response) -> dict[str, dict[str, Any]]:
    return {composite["name"]: composite["parameters"] for composite in response.json()["composites"]}


def _health(response: httpx.Response) -> Health:
    return Health(ready=response.is_success, detail=str(response.json().get("detail", "")))


def _channels(value: int | Sequence[int]) -> list[int]:
    return [operator.index(channel) for channel in ([value] if isinstance(value, int) else value)]


def _id(id: str) -> str:
    return quote(id, safe="")


def _query(**values: Any) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}


def _size(size: tuple[int, int]) -> str:
    """Height and width."""
    return f"{size[0]}x{size[1]}"


def _numbers(values: Sequence[float] | None) -> str | None:
    return None if values is None else ",".join(repr(float(value)) for value in values)
