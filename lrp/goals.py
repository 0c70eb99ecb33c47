"""From a target that names an output to weights over its values: what is explained, image by image, and in words."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fusion.errors import BadTarget
from fusion.outputs import default_of
from lrp.heads import Head
from lrp.reductions import REDUCTIONS, Reduction
from lrp.regions import WINS, Box, in_box, in_mask, tally, winners
from lrp.targets import Contrast, Explained, Neurons, Output, Seeds, Target


@dataclass(frozen=True)
class Goal:
    """A reduction of an output's values [N, ...], with the weights [N, ...] of every image, and both in words. answer:
    which of the outputs that were asked for."""

    answer: int
    reduction: Reduction
    weights: Tensor
    explained: tuple[Explained, ...]

    def seed(self, values: Tensor) -> Tensor:
        """[N, ...]: what times the values adds up to the number that is explained."""
        found = self.reduction.seed(values.flatten(1), self.weights.flatten(1))
        return found.reshape(values.shape)

    def value(self, values: Tensor, weights: Tensor) -> Tensor:
        """The number that is explained [N], of these values and weights."""
        return self.reduction.value(values.flatten(1), weights.flatten(1))


@dataclass(frozen=True)
class Question:
    """A target as numbers made of outputs, one per image and entry. several: whether a target axis was asked for.
    lenient: nobody asked, so what does not fit gives way."""

    outputs: tuple[Output, ...]
    several: bool = False
    lenient: bool = False


def question(target: Target, heads: Sequence[Head]) -> Question | None:
    """The target in terms of outputs, None where it is one of classes (`lrp.targets.seeds_for`) or of neurons. Raises
    BadTarget."""
    if isinstance(target, Output):
        return Question((target,))
    if isinstance(target, list | tuple) and target and all(isinstance(t, Output) for t in target):
        return Question(tuple(target), several=True)
    head = default_of(heads)
    if head.kind == "scores" or isinstance(target, Neurons):
        return None
    if target is None:
        return Question((default_output(head),), lenient=True)
    if isinstance(target, int) and not isinstance(target, bool):
        return Question((of_class(head, target),))
    if isinstance(target, Contrast) or not (callable(target) or head.kind in ("vector", "value")):
        raise BadTarget(
            f"The network has no class scores, but {', '.join(map(str, heads))}: give lrp.Output(...), or a list of "
            "them."
        )
    return None


def named(heads: Sequence[Head], name: str | int | None) -> Head:
    """The output of this name or position, the default one for None. Raises BadTarget."""
    if name is None:
        return default_of(heads)
    if isinstance(name, int) and not isinstance(name, bool):
        if 0 <= name < len(heads):
            return heads[name]
    else:
        found = [head for head in heads if head.name == name]
        if found:
            return found[0]
    raise BadTarget(f"There is no output {name!r}: the network has {', '.join(map(str, heads))}.")


def default_output(head: Head) -> Output:
    """What is explained of an output without class scores where nothing is said.

    Of a map the sum over the places where the class wins that wins at most of them (a single channel: where it is
    positive); of rows the largest value; a number itself; of anything else the norm.
    """
    ways = {
        "map": {"region": WINS},
        "rows": {"reduce": "max"},
        "value": {"index": 0},
        "scores": {"reduce": "max"},
    }
    return Output(head.name, **ways.get(head.kind, {"reduce": "norm"}))  # type: ignore[arg-type]


def of_class(head: Head, index: int) -> Output:
    """A class of an output without a table of scores, by its index alone. Raises BadTarget."""
    if head.kind == "map":
        return Output(head.name, channel=index, region=WINS)
    if head.kind in ("vector", "value"):
        return Output(head.name, index=index)
    raise BadTarget(
        f"The output {head} has no classes to choose by a number alone: give lrp.Output(index=...), or a channel with "
        "a reduction, as lrp.Output(channel=1, reduce='max')."
    )


def goals(
    asked: Question, heads: Sequence[Head], values: Sequence[Tensor], image: tuple[int, ...]
) -> list[Goal]:
    """What a question asks for, given the values [N, ...] of these outputs. Raises BadTarget."""
    found = []
    for output in asked.outputs:
        answer = heads.index(named(heads, output.name))
        head, lenient = heads[answer], asked.lenient
        if _is_bare(output):
            output, lenient = default_output(head), True
        goal = _goal(output, head, values[answer], image, lenient)
        found.append(replace(goal, answer=answer))
    return found


def _is_bare(output: Output) -> bool:
    """Whether a target names an output and nothing else."""
    return all(getattr(output, field.name) is None for field in fields(output) if field.name != "name")


def seeds_of(found: Sequence[Goal], values: Sequence[Tensor], several: bool) -> Seeds:
    """The seeds of the goals."""
    return Seeds(
        tuple(goal.seed(values[goal.answer]) for goal in found),
        None,
        several,
        tuple(goal.answer for goal in found),
    )


def _goal(target: Output, head: Head, values: Tensor, image: tuple[int, ...], lenient: bool) -> Goal:
    """The goal for an output's values [N, ...]; image: the input's rows and columns.

    lenient: where a channel wins nowhere, take all places (of a target that nobody asked for). Raises BadTarget where
    the target does not fit the output.
    """
    target = replace(target, reduce=target.reduce or "sum")
    reduction = REDUCTIONS.get(str(target.reduce))
    if reduction is None:
        raise BadTarget(f"There is no reduction {target.reduce!r}, but {', '.join(REDUCTIONS)}.")
    if target.reduce == "cosine" and target.like is None:
        raise BadTarget(
            "A cosine needs something to compare with: give `like`, an image or the values themselves."
        )
    if target.like is not None and target.reduce not in ("sum", "cosine"):
        raise BadTarget(
            f"`like` weighs a sum or a cosine, and no {target.reduce}: leave it out, or take another one."
        )
    if target.index is not None:
        return _one_value(target, head, values, reduction)
    weights, channels, nowhere = _weights(target, head, values, image, lenient)
    if target.like is not None:
        weights = weights * _like(target.like, head, values)
    chosen = (weights != 0).flatten(1).sum(1).tolist()
    if target.reduce == "mean" and bool((weights.flatten(1).sum(1) == 0).any()):
        raise BadTarget("The weights of the mask add up to 0, so there is no mean: take the sum.")
    if not all(chosen):
        raise BadTarget(f"The region holds no place of the output {head}: choose a larger one.")
    explained = []
    for i, count in enumerate(chosen):
        index = None
        if target.reduce == "max":
            place = (
                REDUCTIONS["max"].seed(values[i : i + 1].flatten(1), weights[i : i + 1].flatten(1)).argmax()
            )
            index = _unravel(int(place), values.shape[1:])
        text = _in_words(target, head, channels[i], count, values[0].numel(), index)
        if nowhere[i]:
            text = f"{text.partition(', over')[0]}, over all places: it is positive at none"
        explained.append(Explained(head.name, head.kind, str(target.reduce), channels[i], index, count, text))
    return Goal(0, reduction, weights, tuple(explained))


def classes_explained(target: Target, head: Head, classes: Tensor) -> tuple[tuple[Explained, ...], ...]:
    """What a target of classes [N] or [N, T] explains, by image and target."""
    against = ""
    if isinstance(target, Contrast):
        against = " against the mean of all others"
        if target.against is not None:
            against = f" against class {target.against}"
    table = classes if classes.ndim == 2 else classes[:, None]
    return tuple(
        tuple(
            Explained(
                head.name,
                head.kind,
                "sum",
                None,
                (k,),
                1,
                f"class {k} of '{head.name}'{_before(head)}{against}",
            )
            for k in row
        )
        for row in table.tolist()
    )


def _one_value(target: Output, head: Head, values: Tensor, reduction: Reduction) -> Goal:
    if any(other is not None for other in (target.channel, target.region, target.like)):
        raise BadTarget("An index is one value of an output: leave channel, region and like out.")
    if target.reduce == "norm":
        raise BadTarget(
            "An index is one value of an output, and the norm of one is its size: leave reduce out."
        )
    given: Any = target.index
    index: tuple[int, ...]
    try:
        index = (given,) if isinstance(given, int) else tuple(operator.index(i) for i in given)
    except (TypeError, ValueError):
        raise BadTarget(f"The index {target.index!r} is none: give whole numbers.") from None
    shape = tuple(values.shape[1:])
    if len(index) != len(shape) or not all(0 <= i < size for i, size in zip(index, shape, strict=True)):
        last = ", ".join(f"0 to {size - 1}" for size in shape)
        raise BadTarget(
            f"The index {list(index)} is outside of the output {head}: it takes {len(shape)} whole number"
            f"{'s' * (len(shape) != 1)}, {last}."
        )
    weights = torch.zeros_like(values)
    weights.movedim(0, -1)[index] = 1
    place = f"value [{', '.join(map(str, index))}] of "
    place = {"scores": f"class {index[0]} of ", "value": ""}.get(head.kind, place)
    text = f"{place}'{head.name}'{_before(head)}"
    one = Explained(head.name, head.kind, str(target.reduce), None, index, 1, text)
    return Goal(0, reduction, weights, (one,) * len(values))


def _weights(
    target: Output, head: Head, values: Tensor, image: tuple[int, ...], lenient: bool
) -> tuple[Tensor, list[int | None], list[bool]]:
    """The weights [N, ...] by channel and region, the channel of every image (None: all), and whether it wins nowhere,
    so that all its places count."""
    samples, axis = len(values), head.axis if target.axis is None else _axis(target.axis, values, head)
    if target.channel is None and target.region is None:
        return torch.ones_like(values), [None] * samples, [False] * samples
    if axis is None or (values.ndim < 3 and target.region is not None):
        raise BadTarget(
            f"The output {head} has no channels and places to choose from: give an index, or a reduction of all values."
        )
    by_channel = values.movedim(axis, 1)
    count, places = by_channel.shape[1], tuple(by_channel.shape[2:])
    channel = target.channel
    if channel is not None and not (isinstance(channel, int) and 0 <= channel < count):
        raise BadTarget(
            f"Channel {channel!r} does not exist: the output {head} has {count} of them, 0 to {count - 1}."
        )
    channels: list[int | None] = [channel] * samples
    nowhere = [False] * samples
    if isinstance(target.region, str):
        if target.region != WINS:
            raise BadTarget(f"The region {target.region[:80]!r} is none: give a Box, a mask, or 'wins'.")
        winning, most = winners(by_channel)
        channels = most.tolist() if channel is None else channels
        weights = torch.stack(
            [(row == chosen).to(values) for row, chosen in zip(winning, channels, strict=True)]
        )
        empty = (weights == 0).flatten(1).all(1)
        if bool(empty.any()) and not lenient:
            first = int(empty.nonzero()[0])
            raise BadTarget(
                f"Channel {channels[first]} of '{head.name}' wins nowhere in image {first}; there win: "
                f"{tally(winning[first])}. Choose one of these, or another region."
            )
        weights[empty], nowhere = 1, empty.tolist()
    elif target.region is None:
        weights = values.new_ones((samples, *places))
    elif isinstance(target.region, Box):
        weights = in_box(target.region, places, image).to(values).expand(samples, *places)  # type: ignore[arg-type]
    else:
        weights = in_mask(target.region, samples, places, image).to(values).expand(samples, *places)  # type: ignore[arg-type]
    full = torch.zeros_like(by_channel)
    for i, chosen in enumerate(channels):
        full[i, slice(None) if chosen is None else chosen] = weights[i]
    return full.movedim(1, axis), channels, nowhere


def _axis(axis: Any, values: Tensor, head: Head) -> int:
    if not isinstance(axis, int) or not 1 <= axis < values.ndim:
        raise BadTarget(
            f"The output {head} has no axis {axis!r} for channels: its axes are 1 to {values.ndim - 1}."
        )
    return axis


def _like(like: Any, head: Head, values: Tensor) -> Tensor:
    try:
        found = torch.as_tensor(like, dtype=values.dtype, device=values.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadTarget(f"`like` holds no numbers, as the output {head} does: {error}.") from error
    if tuple(found.shape) not in (tuple(values.shape[1:]), tuple(values.shape), (1, *values.shape[1:])):
        raise BadTarget(
            f"`like` has shape {list(found.shape)}, the output {head} has {list(values.shape[1:])} for an image."
        )
    if not bool(found.isfinite().all()):
        raise BadTarget("`like` contains NaN or infinity. Give finite values.")
    return found


def _in_words(
    target: Output, head: Head, channel: int | None, count: int, total: int, index: tuple[int, ...] | None
) -> str:
    reduce = str(target.reduce)
    what = {"max": "the largest value"}.get(reduce, f"the {reduce}")
    if target.like is not None:
        what = "the cosine" if reduce == "cosine" else "the dot product"
    of = f" of channel {channel} of '{head.name}'" if channel is not None else f" of '{head.name}'"
    where = ""
    if isinstance(target.region, Box):
        where = f", in {target.region}"
    elif isinstance(target.region, str):
        where = f", over the {count} places where it wins"
    elif target.region is not None:
        where = f", over {count} of {total} values"
    at = f", at [{', '.join(map(str, index))}]" if index is not None else ""
    compared = " with what it is compared with" if target.like is not None else ""
    return f"{what}{of}{_before(head)}{where}{at}{compared}"


def _before(head: Head) -> str:
    return f" (before the final {head.before})" if head.before else ""


def _unravel(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    found = []
    for size in reversed(shape):
        found.append(place % size)
        place //= size
    return tuple(reversed(found))
