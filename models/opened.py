"""A network together with what is needed to feed it an image and to name its answer."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion.errors import BadFile, CaptureError, NoClassScores
from models.preprocess import MAX_SIZE, InputSpec, prepare

if TYPE_CHECKING:
    from fusion import Network


@dataclass(frozen=True)
class Opened:
    """A network of any format. `original` is the format's own runtime: float tensor [N, C, H, W] in, scores
    [N, K] out, on the CPU. `notes` says what was assumed."""

    network: Network
    original: Callable[[Tensor], Tensor]
    input: InputSpec
    labels: tuple[str, ...] | None
    format: str
    notes: tuple[str, ...]

    def prepare(self, image: Any) -> Tensor:
        """An image (a path, bytes, PIL image or uint8 array) as the network's input [1, C, H, W]."""
        return prepare(image, self.input)


@dataclass(frozen=True)
class Source:
    """What a format's reader hands over: a module to capture (or a network captured already), an example
    input of batch 2, the format's own runtime, and whatever the file says about itself."""

    example: Tensor
    original: Callable[[Tensor], Any]
    module: nn.Module | None = None
    network: Network | None = None
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec | None = None
    labels: tuple[str, ...] | None = None


def assemble(source: Source, format: str, input: InputSpec | None) -> Opened:
    """Captures a source and completes its description: the caller's word, else the file's, else the usual."""
    import fusion

    network = source.network
    if network is None:
        assert source.module is not None
        network = fusion.capture(source.module, (source.example,))
    network = scores_only(network)
    classes = network.outputs[0].shape[1]
    notes = list(source.notes)
    spec = input or source.input or _described(source, notes)
    if spec.channels != source.example.shape[1]:
        raise BadFile(
            f"The network takes images of {source.example.shape[1]} channels, but the input description has "
            f"{spec.channels}. Describe the input that the network was trained on."
        )
    if spec.size != tuple(source.example.shape[2:]):
        _check_size(network, spec)
    labels = source.labels or _labels(source.metadata)
    if labels is not None and len(labels) != classes:
        notes.append(f"The {len(labels)} labels in the file are ignored: the network has {classes} classes.")
        labels = None
    return Opened(network, _scores_of(source.original), spec, labels, format, tuple(notes))


def scores_only(network: Network) -> Network:
    """The network with its class scores [N, K] as the only output. Raises NoClassScores."""
    from fusion.network import annotate

    kept = network.copy()
    chosen = next((node for node in kept.output_values if _is_scores(node.meta["shape"])), None)
    if chosen is None:
        shapes = ", ".join(_text(output.shape) for output in network.outputs) or "nothing"
        raise NoClassScores(
            f"The network's output is {shapes}: no class scores [batch, classes] with 2 classes or more. "
            "Only classifiers can be explained; export the network with its classification head."
        )
    output = kept.output_node
    if len(chosen.meta["shape"]) > 2:
        with kept.graph.inserting_before(output):
            flat = kept.graph.call_function(torch.ops.aten.flatten.using_ints, (chosen, 1))
        flat.meta = {**chosen.meta}
        chosen = flat
    output.args = (chosen,)
    kept.graph.eliminate_dead_code()
    kept.graph.lint()
    return annotate(type(kept)(kept.graph, kept.constants))


def _is_scores(shape: tuple[int | None, ...] | None) -> bool:
    """[N, K] or [N, K, 1, 1] with K >= 2; N is free, or fixed in a measured output."""
    if shape is None or len(shape) < 2:
        return False
    classes, *rest = shape[1:]
    return classes is not None and classes >= 2 and all(side == 1 for side in rest)


def _scores_of(original: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """The same choice among the original's outputs as `scores_only` makes in the network."""

    def run(x: Tensor) -> Tensor:
        for value in _tensors(original(x)):
            if _is_scores(tuple(value.shape)):
                return value.flatten(1)
        raise NoClassScores("The network answered no table of class scores [batch, classes].")

    return run


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _check_size(network: Network, spec: InputSpec) -> None:
    fixed = tuple(network.inputs[0].shape[2:])
    if any(side is not None and side != wanted for side, wanted in zip(fixed, spec.size, strict=False)):
        raise CaptureError(
            f"The network was read for images of {_text(fixed)} pixels, but the input description says "
            f"{_text(spec.size)}. Pass size=HxW along with it."
        )


def _text(shape: tuple[int | None, ...]) -> str:
    return "x".join("batch" if side is None else str(side) for side in shape) or "a single number"


def _described(source: Source, notes: list[str]) -> InputSpec:
    """The input description from the file's metadata, with the field's usual values where it is silent."""
    channels, height, width = source.example.shape[1:]
    if channels not in (1, 3):
        raise BadFile(
            f"The network takes inputs of {channels} channels; only gray (1) and colour (3) images can be "
            "explained. Choose a network for images."
        )
    found = read_metadata(source.metadata)
    found.pop("size", None)  # the example already has it, and the network runs on it
    try:
        spec = InputSpec(size=(height, width), channels=channels, **found)
    except Exception as error:
        spec = InputSpec(size=(height, width), channels=channels)
        notes.append(f"The input description in the file is ignored ({error}).")
        found = {}
    if "mean" not in found and "std" not in found:
        usual = "mean .5 and std .5" if channels == 1 else "ImageNet's mean and std"
        notes.append(
            f"Nothing says how the input is normalized; {usual} on pixels from 0 to 1 are assumed. "
            "Describe the input if it is otherwise."
        )
    return spec


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        value = [part for part in value.strip("[]() ").replace(";", ",").split(",") if part.strip()]
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(float(part) for part in values)


def _order(value: Any) -> str:
    text = str(value).upper()
    return {"GRAY": "L", "GREY": "L", "GRAYSCALE": "L"}.get(text, text)


def _size(value: Any) -> tuple[int, int]:
    sides = [int(number) for number in _numbers(value)]
    height, width = (sides * 2)[-2:]
    if not (1 <= height <= MAX_SIZE and 1 <= width <= MAX_SIZE):
        raise ValueError("no image size")
    return height, width


# Names that files use for the fields of an InputSpec, and how to read them.
_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "size": ("size", _size),
    "input_size": ("size", _size),
    "mean": ("mean", _numbers),
    "std": ("std", _numbers),
    "scale": ("scale", float),
    "order": ("order", _order),
    "channel_order": ("order", _order),
    "resize": ("resize", str),
    "crop_fraction": ("crop_fraction", float),
    "crop_pct": ("crop_fraction", float),
    "interpolation": ("interpolation", str),
}


def read_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The InputSpec fields that a file's metadata states; what cannot be read is left out."""
    inner = metadata.get("input")
    merged = {**metadata, **inner} if isinstance(inner, Mapping) else metadata
    found: dict[str, Any] = {}
    for key, (name, read) in _FIELDS.items():
        if key in merged:
            try:
                found.setdefault(name, read(merged[key]))
            except (TypeError, ValueError):
                continue
    return found


def _labels(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names under `labels`, `classes` or `categories`: a list, a mapping from index, or lines."""
    for key in ("labels", "classes", "categories", "class_names", "names"):
        value = metadata.get(key)
        if isinstance(value, str):
            value = _parsed(value)
        if isinstance(value, Mapping):
            by_index = {str(index): label for index, label in value.items()}
            value = [by_index.get(str(index)) for index in range(len(by_index))]
        if isinstance(value, list | tuple) and len(value) >= 2 and None not in value:
            return tuple(str(label) for label in value)
    return None


def _parsed(text: str) -> Any:
    """A list or mapping written as JSON or as Python, else the lines or the comma-separated parts."""
    if text.lstrip().startswith(("[", "{")):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    parts = text.splitlines() if "\n" in text.strip() else text.split(",")
    return [part.strip() for part in parts if part.strip()]
