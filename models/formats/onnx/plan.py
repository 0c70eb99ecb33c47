"""What to run, worked out once: constants folded, shapes known, the batch free.

The nodes run on fake tensors whose batch is a symbol (`walk`). Whatever comes out without that symbol is a constant;
sizes that contain it stay arithmetic; the rest are the steps that a batch of images goes through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fusion.errors import BadFile
from models.formats.onnx.cut import Cut, find_cut, picked_from
from models.formats.onnx.file import OnnxFile
from models.formats.onnx.folding import first_weight, fold
from models.formats.onnx.images import Image
from models.formats.onnx.names import with_path
from models.formats.onnx.patterns import Known, live, simplify
from models.formats.onnx.quantized import dequantized
from models.formats.onnx.registry import Node
from models.formats.onnx.steps import Step, Variable
from models.formats.onnx.walk import Failure, OneSizeOnly, Walk

# Walks that are begun anew, each without one more node that runs with a batch of one size only.
_MOST_WALKS = 8


@dataclass(frozen=True)
class Plan:
    """The steps from the image to the outputs, all given by their names. `bare` are the outputs that lack the batch
    axis in the file; `cut` says where these are not the file's own outputs but values on the way to them."""

    steps: tuple[Step, ...]
    input: str
    outputs: tuple[str, ...]
    bare: frozenset[str]
    cut: Cut | None = None


def make(file: OnnxFile, image: Image) -> Plan:
    """Plan a file for such images: the way to those of its outputs that can be computed and do not only depend on
    constants; where none of them can be explained, the way to what they are chosen from (`cut`).

    Raises what the first node does that cannot be read where there is neither.
    """
    known = {name: Known(tensor, name) for name, tensor in file.weights.items()}
    nodes = live(file.nodes, file.outputs)
    # What is picked from keeps its name, which it would lose to an operator that it is merged with.
    walk = _walk(_prepared(nodes, known, [*file.outputs, *picked_from(nodes)]), known, image)
    computed = tuple(name for name in file.outputs if isinstance(walk.values.get(name), Tensor))  # no sizes
    cut = None
    if not walk.carrying.intersection(computed):
        cut = find_cut(walk, file.outputs, image.name, file.own)
    outputs = computed if cut is None else cut.outputs
    if not outputs and walk.failures:
        raise walk.failures[0].error
    if not outputs:
        raise BadFile("The network's output does not depend on its input. Export it again.")
    bare = frozenset(walk.singles.bare.intersection(outputs))
    return Plan(_with_release(walk.steps, outputs), image.name, outputs, bare, cut)


def _walk(nodes: Sequence[Node], known: dict[str, Known], image: Image) -> Walk:
    left_out: list[Failure] = []
    while True:
        try:
            return Walk.of(nodes, known, image.name, image.sample, image.batch, left_out)
        except OneSizeOnly as error:
            if len(left_out) == _MOST_WALKS:
                raise
            left_out.append(Failure(error.node, error))


def _prepared(nodes: Iterable[Node], known: dict[str, Known], outputs: Sequence[str]) -> list[Node]:
    """The nodes that are left when constants are folded, quantized values are floats and patterns are one operator."""
    rest = dequantized(fold(live(nodes, outputs), known), known, outputs)
    rest = fold(rest, known)
    return [with_path(node, first_weight(node, known)) for node in simplify(rest, known, outputs)]


def _with_release(steps: list[Step], outputs: Sequence[str]) -> tuple[Step, ...]:
    """Drop the steps that nothing reads, and note after which step each value is no longer needed."""
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if not wanted.intersection(step.node.outputs):
            continue
        reads = {a.name for a in step.arguments if isinstance(a, Variable)}
        kept.append(replace(step, release=tuple(sorted(reads - wanted))))
        wanted |= reads
    return tuple(reversed(kept))
