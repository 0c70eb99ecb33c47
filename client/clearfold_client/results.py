"""What the server's answers become: frozen data classes with numpy arrays and PIL images."""

import io
import json
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clearfold_client import colors


@dataclass(frozen=True)
class Prediction:
    """One class and how much the network believes in it; `score` is the network's raw output."""

    index: int
    label: str | None
    probability: float
    score: float


@dataclass(frozen=True)
class Target:
    """What an explanation is for: a class, or a number made of one of the network's outputs.

    index: the class's, None for anything else. label: of the class, or of the channel. channel, position: the one
    channel or value of the output, where it is one; places: how many values count. explained: all of it in words.
    """

    index: int | None
    label: str | None
    score: float
    output: str = ""
    channel: int | None = None
    position: tuple[int, ...] | None = None
    places: int = 1
    explained: str = ""

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Target":
        known = {f.name for f in fields(cls)} - {"position"}
        position = document.get("position")
        return cls(
            **{key: value for key, value in document.items() if key in known},
            position=None if position is None else tuple(position),
        )


@dataclass(frozen=True)
class Output:
    """One output of a network, which a target can name. `kind` is scores, value, vector, map, rows, boxes or tensor; a
    size of None in `shape` follows the batch."""

    name: str
    kind: str
    shape: tuple[int | None, ...]


_PLAIN = ("id", "name", "format", "default", "classes", "parameters", "input")


@dataclass(frozen=True)
class Model:
    """A network on the server; `classes` is None where it has no class scores, `outputs` is what can be explained,
    `default_output` what is where a target names none. `raw` has all that the server said of it."""

    id: str
    name: str
    format: str
    default: bool
    classes: int | None
    parameters: int
    labels: tuple[str, ...] | None
    input: dict[str, Any]
    fusion: dict[str, Any]
    certificate: dict[str, Any]
    notes: tuple[str, ...]
    raw: dict[str, Any]
    outputs: tuple[Output, ...] = ()
    default_output: str | None = None

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Model":
        labels = document.get("labels")
        return cls(
            **{key: document[key] for key in _PLAIN},
            labels=tuple(labels) if labels is not None else None,
            fusion=document.get("fusion", {}),
            certificate=document.get("certificate", {}),
            notes=tuple(document.get("notes", ())),
            raw=document,
            outputs=tuple(
                Output(entry["name"], entry["kind"], tuple(entry["shape"]))
                for entry in document.get("outputs") or ()
            ),
            default_output=document.get("default_output"),
        )


@dataclass(frozen=True)
class Health:
    """Whether the server can serve; `detail` says what it is waiting for."""

    ready: bool
    detail: str


@dataclass(frozen=True)
class Layer:
    """A layer inside a network; `shape` is that of its output, None where it follows the batch."""

    name: str
    op: str
    channels: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Option:
    """What a method can be told. `type` is integer, number, size (pixels, or height and width), choice or layer; a
    `default` of None follows from the image or the network."""

    name: str
    type: str
    description: str
    default: Any
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A way to explain, with its options; those of LRP are its composites' parameters."""

    name: str
    description: str
    options: tuple[Option, ...]

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Method":
        options = tuple(
            Option(
                name=entry["name"],
                type=entry["type"],
                description=entry["description"],
                default=entry["default"],
                minimum=entry.get("minimum"),
                maximum=entry.get("maximum"),
                choices=tuple(entry.get("choices") or ()),
            )
            for entry in document["parameters"]
        )
        return cls(document["name"], document["description"], options)


@dataclass(frozen=True, eq=False)
class Inner:
    """The relevance at a layer. `values` are in the layer's layout, `axis` is the channels' in it; `top` has the
    channels that speak most for the target, with their relevance. `on_image` is the relevance by rows and columns of
    the image that the values stand for, tokens and windows each where it belongs; `outside` is the sum over what stands
    for no part of it, as class tokens do. Both are None where the layer has no such rows and columns."""

    layer: str
    values: NDArray[np.float32]
    axis: int
    top: tuple[tuple[int, float], ...]
    on_image: NDArray[np.float32] | None = None
    outside: float | None = None

    @property
    def by_channel(self) -> NDArray[np.float32]:
        """The relevance of every channel."""
        channels = np.moveaxis(self.values, self.axis, 0)
        return np.asarray(channels.reshape(len(channels), -1).sum(axis=1), dtype=np.float32)

    @property
    def map(self) -> NDArray[np.float32]:
        """The relevance of every place, summed over the channels: [H, W] for a convolution."""
        return np.asarray(self.values.sum(axis=self.axis), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where in the image the score of the target comes from.

    `relevance` is [C, H, W] at the network's input size ([1, H, W] by GradCAM), and adds up to `sums["input"]`; `seen`
    is the image as the network saw it, [H, W, 3]; `sums` has score, input, kept, error, `ledger` what each layer kept.
    `prediction` is None where no class scores were explained. `method` is LRP or another one, which has no composite
    and keeps no ledger: `composite`, `sums`, `ledger`, `picked` and `balanced` are None then. `parameters` are the
    composite's or the method's, as they were used. `against` is the class that the target was compared with (its label,
    or its index where it has none), or "others"; the score is then the difference. `inner` is the relevance at the
    layer that was asked for. `picked` is the composite that was used (with the composite "auto", the one that suits the
    network, and `reason` says why); `balanced` is whether the score is accounted for, and `warnings` says what is wrong
    if not. A server that does not say these leaves them None.
    """

    relevance: NDArray[np.float32]
    seen: NDArray[np.uint8]
    model: str
    composite: str | None
    prediction: Prediction | None
    target: Target
    sums: dict[str, float] | None
    ledger: Any
    timings: dict[str, float]
    against: str | int | None = None
    inner: Inner | None = None
    picked: str | None = None
    reason: str | None = None
    balanced: bool | None = None
    warnings: tuple[str, ...] = ()
    method: str = "LRP"
    parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_npz(cls, content: bytes) -> "Explanation":
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            relevance, seen = arrays["relevance"], arrays["image"]
            summary = json.loads(arrays["summary"].tobytes())
            values, on_image = arrays.get("inner"), arrays.get("inner_map")
        return cls(
            relevance=relevance,
            seen=seen,
            model=summary["model"],
            composite=summary["composite"],
            prediction=None if summary["prediction"] is None else Prediction(**summary["prediction"]),
            target=Target.from_json(summary["target"]),
            sums=summary["sums"],
            ledger=summary["ledger"],
            timings=summary["timings"],
            against=_against(summary.get("against")),
            inner=None if values is None else _inner(values, on_image, summary["inner"]),
            picked=summary.get("picked"),
            reason=summary.get("reason"),
            balanced=summary.get("balanced"),
            warnings=tuple(summary.get("warnings", ())),
            method=summary.get("method", "LRP"),
            parameters=summary.get("parameters", {}),
        )

    @property
    def heatmap(self) -> NDArray[np.float32]:
        """The relevance of each pixel, [H, W]: the sum over the channels."""
        return np.asarray(self.relevance.sum(axis=0), dtype=np.float32)

    @property
    def score(self) -> float:
        """The explained score of the target."""
        return self.target.score

    def image(self, cmap: str = "bwr", opacity: float | None = None, clip: float = 99.5) -> Image.Image:
        """The heatmap as a picture: white (or black) is no relevance; with an opacity, over the image."""
        colored = colors.colorize(self.heatmap, cmap, clip)
        if opacity is None:
            return Image.fromarray(colored)
        return Image.fromarray(colors.blend(self.seen, colored, opacity))

    def overlay(self, cmap: str = "bwr", opacity: float = 0.6, clip: float = 99.5) -> Image.Image:
        """The heatmap over the image."""
        return self.image(cmap, opacity, clip)


def _against(compared: Any) -> str | int | None:
    if not isinstance(compared, dict):
        return None if compared is None else str(compared)
    return str(compared["label"]) if compared["label"] is not None else int(compared["index"])


def _inner(values: NDArray[np.float32], on_image: NDArray[np.float32] | None, said: dict[str, Any]) -> Inner:
    top = tuple((int(entry["channel"]), float(entry["relevance"])) for entry in said["top"])
    return Inner(
        layer=str(said["layer"]),
        values=values,
        axis=int(said["axis"]),
        top=top,
        on_image=on_image,
        outside=said.get("outside"),
    )
