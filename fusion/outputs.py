"""What a network answers: the names of its outputs, and what each holds (class scores, a map, an embedding, rows)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, get_args

import torch.utils._pytree as pytree
from torch import Tensor

from fusion.errors import NothingToExplain

Kind: TypeAlias = Literal["scores", "value", "vector", "map", "rows", "boxes", "tensor"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# What each kind is, for people.
MEANINGS: Mapping[Kind, str] = {
    "scores": "class scores [N, classes]",
    "value": "one number per image",
    "vector": "a vector per image, such as an embedding [N, values]",
    "map": "maps [N, channels, height, width]",
    "rows": "rows of values, such as the scores of a detector's anchors [N, rows, values]",
    "boxes": "rows of four numbers, such as boxes [N, rows, 4]",
    "tensor": "a tensor of another shape",
}


def kind_of(shape: Sequence[int | None]) -> Kind:
    """What an output of this shape [N, ...] is taken for where nothing else is known of it.

    A table [N, K] (or [N, K, 1, 1]) of two or more columns counts as class scores: an embedding has the same shape.
    """
    rest = list(shape[1:])
    if None in rest:
        return "tensor"
    if all(size == 1 for size in rest):
        return "value"
    if all(size == 1 for size in rest[1:]):
        return "scores"
    if len(rest) == 2:
        return "boxes" if rest[1] == 4 else "rows"
    return "map" if len(rest) == 3 else "tensor"


class Output(Protocol):
    """What is known of an output."""

    @property
    def kind(self) -> Kind: ...


T = TypeVar("T", bound=Output)


def default_of(outputs: Sequence[T]) -> T:
    """The output that is explained where none is named: the first with class scores, else the first that is no table of
    boxes (a detector decides by what stands beside them), else the first."""
    return outputs[_default([output.kind for output in outputs])]


def _default(kinds: Sequence[Kind]) -> int:
    if "scores" in kinds:
        return kinds.index("scores")
    return next((i for i, kind in enumerate(kinds) if kind != "boxes"), 0)


def labelled(outputs: Sequence[tuple[Kind, Sequence[int | None]]]) -> int | None:
    """How many things labels can name in outputs of these kinds and shapes: classes, or else the channels of the output
    that is explained by default; None where it has none."""
    kind, shape = outputs[_default([kind for kind, _ in outputs])]
    axis = {"scores": 1, "map": 1, "rows": 2}.get(kind)
    return None if axis is None else shape[axis]


def nothing_to_explain(shapes: Sequence[tuple[Sequence[int | None] | None, Any]]) -> NothingToExplain:
    """The error for a network with outputs of these shapes and types only."""
    text = ", ".join(f"{list(shape or ())} of {str(dtype).removeprefix('torch.')}" for shape, dtype in shapes)
    return NothingToExplain(
        f"The network's output ({text or 'nothing'}) holds no floating-point numbers for each image of a batch. "
        "Export the network up to the scores from which it decides, before arg-max or thresholds."
    )


def names_of(spec: pytree.TreeSpec | None, count: int) -> tuple[str, ...]:
    """The names of `count` outputs by the structure that a module returned them in: keys of dicts, fields, positions,
    joined by dots; "output" for a bare tensor. Positions where the structure does not tell."""
    if spec is None or spec.num_leaves != count:
        return positions(count)
    numbered = pytree.tree_unflatten(list(range(count)), spec)
    paths, _ = pytree.tree_flatten_with_path(numbered)
    names = tuple(".".join(_part(key) for key in path) or "output" for path, _ in paths)
    return names if len(set(names)) == count else positions(count)


def follows(answers: Any, count: int) -> bool:
    """Whether something that a network answered has a row for each of so many images."""
    leaves = pytree.tree_leaves(answers)
    return any(isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == count for leaf in leaves)


def tensors_in(answer: Any) -> list[Tensor]:
    """The tensors of what a graph answers: one, or several in a tuple or list; none for a number."""
    items = answer if isinstance(answer, tuple | list) else [answer]
    return [item for item in items if isinstance(item, Tensor)]


def positions(count: int) -> tuple[str, ...]:
    """The names of outputs that nobody named."""
    return ("output",) if count == 1 else tuple(str(i) for i in range(count))


def _part(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
