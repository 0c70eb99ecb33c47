"""Options that several commands share, and how their texts are read."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from app.settings import Settings


def parse_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH, or one number for both."""
    height, _, width = text.partition("x")
    if not height.isdecimal() or not (width or height).isdecimal():
        raise typer.BadParameter("a size is HEIGHTxWIDTH, as 224x224")
    return int(height), int(width or height)


def parse_numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter("these are numbers with commas between them, as .485,.456,.406") from None


def parse_channels(texts: Iterable[str]) -> dict[str, list[int]]:
    """LAYER:CHANNEL,CHANNEL,... as a mapping; a layer that is named twice has the channels of both."""
    found: dict[str, list[int]] = {}
    for text in texts:
        layer, _, channels = text.rpartition(":")
        numbers = [part.strip() for part in channels.split(",")]
        if not layer or not all(number.isdecimal() for number in numbers):
            raise typer.BadParameter(f"{text!r} is not LAYER:CHANNELS, as conv3:3,5", param_hint="--through")
        found.setdefault(layer, []).extend(map(int, numbers))
    return found


def parse_settings(texts: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE, NAME=VALUE, ... as a mapping."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name.strip() or not equals:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE, as n_steps=32", param_hint="--set")
        found[name.strip()] = value.strip()
    return found


Data = Annotated[Path | None, typer.Option("--data", help="Folder of the model store.", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a text for people.")]
Size = Annotated[str | None, typer.Option("--size", metavar="HxW", help="Size of the network's input.")]
Url = Annotated[str | None, typer.Option("--url", help="A running server, instead of the local store.")]


def read_settings(**given: Any) -> "Settings":
    """The settings of the environment, with what is given and not None in their place."""
    from pydantic import ValidationError

    from app.settings import Settings

    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise typer.BadParameter(
            f"{first['msg']} (also as CLEARFOLD_{name.upper()})", param_hint=name
        ) from None


def store_folder(data: Path | None) -> Path:
    return data if data is not None else read_settings().data
