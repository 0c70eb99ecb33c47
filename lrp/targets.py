"""What is explained: from a target as a person gives it to the seeds of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusion.errors import BadTarget
from lrp.regions import Region


@dataclass(frozen=True)
class Contrast:
    """Why this class rather than that one: the difference of two scores, f_of - f_against.

    of: a class, or one per image; None is the arg-max. against: likewise; None is the mean of all other classes (the
    seed of contrastive LRP, Gu et al. 2018, arXiv:1812.04177: 1 at the class and -1/(K - 1) at every other one).
    """

    of: int | Sequence[int] | None = None
    against: int | Sequence[int] | None = None


@dataclass(frozen=True)
class Neurons:
    """What a layer inside the network answers: the sum of its values over the given channels, or over a mask that
    broadcasts against its output [N, ...] (weights count); None is all of them."""

    layer: str
    channels: int | Sequence[int] | Tensor | None = None


@dataclass(frozen=True)
class Output:
    """A number made of one of the network's outputs: of a segmenter's map, a detector's raw head, an embedding.

    name: the output's name or position; by default the class scores, or else the first output that is no table of
    boxes. index: one value of it, by its place behind the images' axis, as (anchor, class) of [N, anchors, classes].
    channel: this channel only, along `axis` (which the output tells by itself where it can). region: the places that
    count: a Box, a mask [*places] (or [H, W] in pixels of the input; weights count in sums and means), or "wins": where
    the channel is the largest of all, positive if it is the only one; without a channel, where the one is that wins at
    the most places. reduce: "sum" (the default), "mean", "max" (the largest value), "norm", or "cosine" (of the angle
    to `like`). like: values of the output's shape, or an image, whose output they are; a sum is weighed by them (a dot
    product). A name alone stands for what is explained of that output by default (`lrp.goals.default_output`).
    """

    name: str | int | None = None
    index: int | Sequence[int] | None = None
    channel: int | None = None
    region: Region | None = None
    reduce: str | None = None
    like: Any = None
    axis: int | None = None


Target: TypeAlias = (
    int
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Tensor
    | Callable[[Tensor], Tensor]
    | Contrast
    | Neurons
    | Output
    | Sequence[Output]
    | None
)


@dataclass(frozen=True)
class Explained:
    """What was explained of one image: a number made of one output.

    channel, index: the one channel or value of it, None for several. places: how many values count. text: all of it in
    words.
    """

    output: str
    kind: str
    reduce: str
    channel: int | None
    index: tuple[int, ...] | None
    places: int
    text: str


@dataclass(frozen=True)
class Seeds:
    """One backward pass per entry of `seeds`, each in the shape of the values that it belongs to: class scores [N, K],
    or an output. What is explained is sum(seed * values).

    classes: the class indices [N, T], None for anything but classes. several: whether a target axis was asked for.
    answers: which of the values that were asked for each seed belongs to; empty where there is one.
    """

    seeds: tuple[Tensor, ...]
    classes: Tensor | None
    several: bool
    answers: tuple[int, ...] = ()

    def of(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The values that each seed belongs to."""
        return [values[self.answers[i] if self.answers else 0] for i in range(len(self.seeds))]

    def totals(self, values: Sequence[Tensor]) -> Tensor:
        """What is explained: [N, T]."""
        pairs = zip(self.of(values), self.seeds, strict=True)
        return torch.stack([(value * seed).flatten(1).sum(1) for value, seed in pairs], 1)


def seeds_for(target: Target, scores: Tensor) -> Seeds:
    """Seeds for scores [N, K].

    target: None (the arg-max of every sample), one class index for all, a sequence of N indices (one per sample),
    a sequence of N sequences of T indices (several per image), a tensor of the like shapes, a Contrast, or a function
    from the scores [N, K] to one number per sample [N]. Raises BadTarget where an index or a shape does not fit.
    """
    if isinstance(target, Contrast):
        return _contrast(target, scores)
    assert not isinstance(target, Neurons | Output), "the scores are not what these explain"
    if callable(target) and not isinstance(target, Tensor):
        return Seeds((_gradient(target, scores),), None, False)
    classes = _indices(target, scores)
    several = classes.ndim == 2
    columns = classes if several else classes[:, None]
    one_hot = [
        torch.zeros_like(scores).scatter_(1, columns[:, i : i + 1], 1.0) for i in range(columns.shape[1])
    ]
    return Seeds(tuple(one_hot), classes, several)


def _contrast(target: Contrast, scores: Tensor) -> Seeds:
    of, others = _one_each(target.of, scores), scores.shape[1] - 1
    seed = torch.zeros_like(scores)
    if target.against is None:
        seed = seed - 1 / others
        seed = seed.scatter_(1, of[:, None], 1.0)
    else:
        against = _one_each(target.against, scores)
        if bool((of == against).any()):
            raise BadTarget(
                "A contrast needs two different classes: a class against itself explains nothing."
            )
        seed = seed.scatter_(1, of[:, None], 1.0).scatter_(1, against[:, None], -1.0)
    return Seeds((seed,), of, False)


def _one_each(target: int | Sequence[int] | None, scores: Tensor) -> Tensor:
    found = _indices(target, scores)
    if found.ndim != 1:
        raise BadTarget("A contrast takes one class, or one per image.")
    return found


def _indices(target: Any, scores: Tensor) -> Tensor:
    count, classes = scores.shape
    if target is None:
        return scores.argmax(1)
    try:
        indices = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadTarget(
            f"The target {target!r} is no class index, nor a table of them with rows of one length."
        ) from error
    if (
        indices.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
        or indices.ndim > 2
    ):
        raise BadTarget(
            f"A target is a class index (a whole number from 0 to {classes - 1}), one per image, or several per image."
        )
    if indices.ndim == 0:
        indices = indices.expand(count)
    if indices.shape[0] != count:
        hint = " For several targets of one image give [[...]]." if count == 1 else ""
        raise BadTarget(f"{indices.shape[0]} targets were given for {count} image{'s' * (count != 1)}.{hint}")
    outside = indices[(indices < 0) | (indices >= classes)]
    if outside.numel():
        raise BadTarget(
            f"Class {int(outside[0])} does not exist: the network has {classes} classes, 0 to {classes - 1}."
        )
    if indices.ndim == 2 and indices.shape[1] == 0:
        raise BadTarget("The list of targets is empty.")
    return indices.to(device=scores.device, dtype=torch.int64)


def _gradient(function: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        value = function(leaf)
        if not isinstance(value, Tensor) or value.shape != scores.shape[:1]:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BadTarget(
                f"A target function maps scores {['N', *scores.shape[1:]]} to one number per image [N]; this one "
                f"returned {shape}."
            )
        if not value.requires_grad:
            raise BadTarget("The target function does not depend on the scores differentiably.")
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return gradient.detach()
