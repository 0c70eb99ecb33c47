"""A network together with what is needed to feed it an image and to name its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion.errors import BadFile, CaptureError
from fusion.outputs import MEANINGS, Kind, labelled, nothing_to_explain
from models import layouts
from models.embeddings import is_embedding
from models.metadata import read_labels, read_metadata
from models.preprocess import InputSpec, prepare

if TYPE_CHECKING:
    from fusion import Network


# The note of every reader on a network that computes in integers.
QUANTIZED = "quantized: explained as its dequantized self"


@dataclass(frozen=True)
class Opened:
    """A network of any format. `original` is the format's own runtime, on the CPU: float tensor [N, C, H, W] in, what
    the network answers out (a tuple where it is several). `labels` name the classes, or the channels of the output that
    is explained by default. `notes` says what was assumed."""

    network: Network
    original: Callable[[Tensor], Any]
    input: InputSpec
    labels: tuple[str, ...] | None
    format: str
    notes: tuple[str, ...]

    @property
    def quantized(self) -> bool:
        """Whether the format's own runtime computes in integers, so that outputs agree up to their rounding only."""
        return QUANTIZED in self.notes

    @property
    def classes(self) -> int | None:
        """How many classes there are scores for, None where there are none."""
        return classes_of(self.network)

    def prepare(self, image: Any) -> Tensor:
        """An image (a path, bytes, PIL image or uint8 array) as the network's input [1, C, H, W]."""
        return prepare(image, self.input)


@dataclass(frozen=True)
class Source:
    """What a format's reader hands over: a module to capture (or a network captured already), an example
    input of batch 2, the format's own runtime, and whatever the file says about itself. Where it is `channels_last`,
    module, network, example and runtime take images [N, H, W, C]. Where it takes `pixels`, these are whole numbers from
    0 to 255 that the network normalizes itself."""

    example: Tensor
    original: Callable[[Tensor], Any]
    module: nn.Module | None = None
    network: Network | None = None
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    input: InputSpec | None = None
    labels: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None  # the outputs', where the module does not return them by name
    kinds: Mapping[str, Kind] = field(default_factory=dict)  # of those whose shapes do not tell
    embeds: bool = False  # the tables that it answers are embeddings, no class scores
    channels_last: bool = False
    pixels: bool = False


def assemble(source: Source, format: str, input: InputSpec | None) -> Opened:
    """Captures a source and completes its description: the caller's word, else the file's, else the usual."""
    import fusion

    network = source.network
    if network is None:
        assert source.module is not None
        network = fusion.capture(source.module, (source.example,))
    if source.names and len(source.names) == len(network.outputs):
        network = network.copy()
        network.output_node.meta["names"] = source.names
        network.output_node.meta["kinds"] = tuple(map(source.kinds.get, source.names))
    if source.channels_last:
        network = layouts.channels_first(network)
        source = replace(
            source,
            example=source.example.permute(0, 3, 1, 2),
            original=layouts.asked_channels_first(source.original),
            notes=(*source.notes, "The file takes images channels last; they are given channels first here."),
        )
    if source.pixels:
        source = replace(source, original=layouts.asked_pixels(source.original))
    notes = list(source.notes)
    labels = source.labels or read_labels(source.metadata)
    network, positions = answering(network, source.embeds, labels, notes)
    spec = input or source.input or _described(source, notes)
    if source.pixels:
        layouts.check_pixels(spec)
    if spec.channels != source.example.shape[1]:
        raise BadFile(
            f"The network takes images of {source.example.shape[1]} channels, but the input description has "
            f"{spec.channels}. Describe the input that the network was trained on."
        )
    if spec.size != tuple(source.example.shape[2:]):
        _check_size(network, spec)
    if labels is not None and len(labels) != named_channels(network):
        channels = named_channels(network)
        what = f"has {channels} classes" if channels else "has no classes"
        notes.append(f"The {len(labels)} labels in the file are ignored: the network {what}.")
        labels = None
    original = _same_answers(source.original, positions, network)
    return Opened(network, original, spec, labels, format, tuple(notes))


def answering(
    network: Network, embeds: bool, labels: Sequence[str] | None, notes: list[str]
) -> tuple[Network, tuple[int, ...]]:
    """The network with the outputs that can be explained, class scores as [N, K], and their positions among the tensors
    that it returns. Raises NothingToExplain.

    A table counts as class scores unless it is known to be an embedding: by the source (`embeds`), or by the graph
    (`models.embeddings`), where no labels say otherwise.
    """
    tensors = [spec for spec in network.outputs if spec.shape is not None]
    positions = tuple(i for i, spec in enumerate(tensors) if spec.explainable)
    if not positions:
        raise nothing_to_explain([(spec.shape, spec.dtype) for spec in network.outputs])
    kinds: dict[str, Kind] = {}
    for spec, node in zip(network.outputs, network.output_values, strict=True):
        labelled = labels is not None and spec.kind == "scores" and len(labels) == spec.shape[1]
        if spec.kind == "scores" and not labelled and (embeds or is_embedding(network, node)):
            kinds[spec.name] = "vector"
    kept = network.returning([tensors[i].name for i in positions], kinds)
    dropped = [spec.name for i, spec in enumerate(tensors) if i not in positions]
    if dropped:
        notes.append(
            f"Left out of the outputs: {', '.join(dropped)} (no floating-point numbers for each image of a batch)."
        )
    described = ", ".join(f"'{spec.name}' ({MEANINGS[spec.kind]})" for spec in kept.outputs)
    if len(positions) > 1 or kept.outputs[0].kind != "scores":
        notes.append(f"What can be explained: {described}.")
    return _flat_scores(kept), positions


def classes_of(network: Network) -> int | None:
    """How many classes there are scores for: the columns of the first table of class scores, None without any."""
    return next((spec.shape[1] for spec in network.outputs if spec.kind == "scores"), None)


def named_channels(network: Network) -> int | None:
    """How many things labels can name: classes, or the channels of the output that is explained by default."""
    return labelled([(spec.kind, spec.shape) for spec in network.outputs])


def _flat_scores(network: Network) -> Network:
    """The network with class scores [N, K, 1, 1] as [N, K]."""
    from fusion.network import annotate

    values = []
    for spec, node in zip(network.outputs, network.output_values, strict=True):
        if spec.kind in ("scores", "vector") and len(spec.shape) > 2:
            with network.graph.inserting_before(network.output_node):
                flat = network.graph.call_function(torch.ops.aten.flatten.using_ints, (node, 1))
            flat.meta = {**node.meta}
            node = flat
        values.append(node)
    network.output_node.args = (values[0] if len(values) == 1 else tuple(values),)
    network.graph.lint()
    return annotate(type(network)(network.graph, network.constants))


def _same_answers(
    original: Callable[[Tensor], Any], positions: Sequence[int], network: Network
) -> Callable[[Tensor], Any]:
    """The original's answers that the network gives too, in the same order and shapes."""
    ranks = [len(spec.shape) for spec in network.outputs]

    def run(x: Tensor) -> Any:
        tensors = _tensors(original(x))
        chosen = (tensors[i] for i in positions)
        answers = tuple(t.flatten(1) if t.ndim > rank else t for t, rank in zip(chosen, ranks, strict=True))
        return answers[0] if len(answers) == 1 else answers

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
    if source.pixels:
        found |= {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}
        notes.append("The network takes pixels as they are, whole numbers from 0 to 255.")
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
