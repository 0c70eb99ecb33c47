"""Protobuf messages walked on the wire, before a parser builds anything of what they claim.

Two bytes can stand for a whole message, of which a parser makes 80 bytes and more: so what there is to build is counted
first, in one pass that keeps nothing but where it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fusion.errors import BadFile
from models.scan import varint

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True)
class Bounds:
    """What a message may hold: `depth` messages within each other, `fields` values and messages in all, `text` bytes in
    a string. `texts` has the bounds of some ("Message.field") that differ; those of None are not looked at."""

    depth: int
    fields: int
    text: int
    texts: Mapping[str, int | None] = field(default_factory=dict)


def survey(data: bytes, descriptor: Any, bounds: Bounds, name: str) -> int:
    """The number of values and messages, at any depth, in a message of the type that protobuf's `descriptor` describes.

    `name` is the file's, for messages. Raises BadFile where the bytes are no such message or go beyond the bounds.
    """
    fields, end = _fields(descriptor), len(data)
    around: list[tuple[Mapping[int, _Field], int]] = []
    position = count = 0
    while True:
        if position == end:
            if not around:
                return count
            fields, end = around.pop()
            continue
        count += 1
        if count > bounds.fields:
            raise BadFile(
                f"{name} holds more than {bounds.fields:,} values and messages, which no network needs. "
                "The file is damaged or hostile."
            )
        key, position = _varint(data, position, end, name)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            _, position = _varint(data, position, end, name)
            continue
        if wire == _BYTES:
            length, position = _varint(data, position, end, name)
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise damaged(name)
        if not number or length > end - position:
            raise damaged(name)
        found = fields.get(number) if wire == _BYTES else None
        if found is not None and found.message is not None:
            around.append((fields, end))
            if len(around) >= bounds.depth:
                raise BadFile(
                    f"{name} nests its parts more than {bounds.depth} deep (graphs within graphs). "
                    "Export the network without branches within branches."
                )
            fields, end = _fields(found.message), position + length
            continue
        if found is not None:
            _check_text(data, position, length, found.name, bounds, name)
        # A number, packed numbers, bytes, text, or what a parser does not know and passes over.
        position += length


def damaged(name: str) -> BadFile:
    """The error for bytes that are no ONNX file."""
    return BadFile(
        f"{name} is not a readable ONNX file: it is damaged, truncated or of another format. Export it again."
    )


@dataclass(frozen=True)
class _Field:
    """A field that holds a message, or text (`message` is None)."""

    name: str
    message: Any


@cache
def _fields(descriptor: Any) -> Mapping[int, _Field]:
    return {
        field.number: _Field(f"{descriptor.name}.{field.name}", field.message_type)
        for field in descriptor.fields
        if field.message_type is not None or field.type == field.TYPE_STRING
    }


def _varint(data: bytes, position: int, end: int, name: str) -> tuple[int, int]:
    found = varint.read(data, position, end)
    if found is None:
        raise damaged(name)
    return found


def _check_text(data: bytes, start: int, length: int, field: str, bounds: Bounds, name: str) -> None:
    longest = bounds.texts.get(field, bounds.text)
    if longest is None:
        return
    if length > longest:
        raise BadFile(
            f"{name} holds a text ({field}) of {length:,} bytes; up to {longest:,} are read. "
            "The file is damaged or hostile."
        )
    try:
        data[start : start + length].decode()
    except UnicodeDecodeError as error:
        raise BadFile(
            f"{name} is not a readable ONNX file: a text in it ({field}) is no UTF-8. Export it again."
        ) from error
