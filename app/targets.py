"""What a request asks to be explained: a class by index or label, or an output, with JSON for all that it can say."""

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import lrp
from app.subject import Subject
from fusion.errors import BadTarget, NoClassScores
from lrp.targets import Target
from models.preprocess import decode, displayed, prepare

# What a class is compared with when no single one is named: the mean of all others.
OTHERS = "others"


class BoxRegion(BaseModel):
    """A rectangle: rows from top to bottom - 1, columns from left to right - 1."""

    model_config = ConfigDict(extra="forbid")

    box: tuple[int, int, int, int] = Field(description="Top, left, bottom, right")
    of: Literal["input", "output"] = Field(
        "input", description="In pixels of the network's input, or in the output's own rows and columns"
    )


class MaskRegion(BaseModel):
    """A weight for every place of the output, or for every pixel of the network's input."""

    model_config = ConfigDict(extra="forbid")

    mask: list[Any]


class OutputTarget(BaseModel):
    """A number made of one of the network's outputs; `output` alone stands for what is explained of it by default."""

    model_config = ConfigDict(extra="forbid")

    output: str | int | None = Field(
        None, description="Name or position; by default the class scores, or the first that holds no boxes"
    )
    index: int | list[int] | None = Field(None, description="One value, as [anchor, class]")
    channel: int | str | None = Field(None, description="One channel, by index or label")
    region: Literal["wins"] | BoxRegion | MaskRegion | None = Field(
        None, description="Which places count; `wins`: where the channel is the largest of all"
    )
    reduce: Literal["sum", "mean", "max", "norm", "cosine"] | None = Field(
        None, description="Of the values, to one number"
    )
    like: list[Any] | None = Field(None, description="Values of the output's shape to compare with")
    axis: int | None = Field(None, description="Of the channels, where it is not the usual one")


def read(
    text: str | None, subject: Subject, mask: bytes | None = None, reference: bytes | None = None
) -> Target:
    """The target that a text stands for. mask: an image of the size of the one that is explained, whose bright pixels
    count. reference: an image to compare with. Raises BadTarget, and BadInput for images that are none."""
    stated = (text or "").strip()
    if not stated.startswith("{") and mask is None and reference is None:
        return class_index(stated, subject)
    if stated and not stated.startswith("{"):
        raise BadTarget(
            "A mask and a reference belong to an output: write the target as JSON, or leave it out."
        )
    return _output(stated or "{}", subject, mask, reference)


def _output(text: str, subject: Subject, mask: bytes | None, reference: bytes | None) -> lrp.Output:
    try:
        wanted = OutputTarget.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the target"
        names = ", ".join(OutputTarget.model_fields)
        raise BadTarget(
            f"The target is not understood: {where}: {first['msg']}. It is JSON with {names}."
        ) from None
    region: Any = wanted.region
    if isinstance(region, BoxRegion):
        region = lrp.Box(*region.box, of=region.of)
    elif isinstance(region, MaskRegion):
        region = region.mask
    if mask is not None:
        if region is not None:
            raise BadTarget("The target has a region already: leave it out, or the mask.")
        region = torch.from_numpy(displayed(decode(mask), subject.input).max(axis=2) > 127)
    like: Any = wanted.like
    if reference is not None:
        if like is not None:
            raise BadTarget(
                "The target has values to compare with already: leave `like` out, or the reference."
            )
        like = prepare(decode(reference), subject.input)
    reduce = wanted.reduce or ("cosine" if reference is not None else None)
    channel = wanted.channel
    if isinstance(channel, str):
        channel = _labelled(channel, subject)
    return lrp.Output(wanted.output, wanted.index, channel, region, reduce, like, wanted.axis)


def class_index(target: str | None, subject: Subject) -> int | None:
    """The class that is named by its index or its label; None where none is named. Raises BadTarget."""
    if not target:
        return None
    if not target.lstrip("-").isdecimal():
        return _labelled(target, subject)
    index = int(target)
    last = None if subject.classes is None else subject.classes - 1
    if last is not None and not 0 <= index <= last:
        raise BadTarget(f"Class {index} is out of range: the network has the classes 0 to {last}.")
    return index


def compared(against: str | None, subject: Subject) -> int | None:
    """The class to compare with, None for all others. Raises BadTarget and NoClassScores."""
    if subject.classes is None:
        raise NoClassScores(
            "The network has no class scores, so there are no classes to compare: leave `against` out."
        )
    return None if against in (None, OTHERS) else class_index(against, subject)


def _labelled(label: str, subject: Subject) -> int:
    matches = [index for index, known in enumerate(subject.labels or ()) if known == label]
    if len(matches) == 1:
        return matches[0]
    found = f"{len(matches)} classes are" if matches else "No class is"
    last = "" if subject.classes is None else f", 0 to {subject.classes - 1}"
    raise BadTarget(f"{found} labelled {label[:80]!r}: name the target by its index{last}.")
