"""Protobuf messages as trees of fields that can be changed and written again, lengths and all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from models.scan import varint as numbers

VARINT, BYTES = 0, 2
_FIXED = {1: 8, 5: 4}


@dataclass
class Field:
    """A field: `value` is a number, bytes, or the fields of a message; `kind` is "Message.field"."""

    number: int
    wire: int
    value: int | bytes | list[Field]
    kind: str


def parse(data: bytes, descriptor: Any) -> list[Field]:
    """The fields of a message of this type (a protobuf descriptor). Raises ValueError where a number has no end."""
    known = descriptor.fields_by_number
    fields, position = [], 0
    while position < len(data):
        key, position = _read(data, position)
        number, wire = key >> 3, key & 7
        field = known.get(number)
        kind = f"{descriptor.name}.{field.name if field else number}"
        if wire == VARINT:
            number_, position = _read(data, position)
            fields.append(Field(number, wire, number_, kind))
            continue
        length = _FIXED.get(wire)
        if length is None:
            length, position = _read(data, position)
        content = data[position : position + length]
        position += length
        inner = field.message_type if field is not None and wire == BYTES else None
        fields.append(Field(number, wire, parse(content, inner) if inner is not None else content, kind))
    return fields


def write(fields: list[Field]) -> bytes:
    """The fields as bytes."""
    parts = []
    for field in fields:
        parts.append(varint(field.number << 3 | field.wire))
        if isinstance(field.value, int):
            parts.append(varint(field.value))
            continue
        content = field.value if isinstance(field.value, bytes) else write(field.value)
        if field.wire == BYTES:
            parts.append(varint(len(content)))
        parts.append(content)
    return b"".join(parts)


def places(fields: list[Field]) -> Iterator[tuple[list[Field], int]]:
    """Where each field is, at every depth: the list that holds it, and its position there."""
    for i, field in enumerate(fields):
        yield fields, i
        if isinstance(field.value, list):
            yield from places(field.value)


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read(data: bytes, position: int) -> tuple[int, int]:
    found = numbers.read(data, position, len(data))
    if found is None:
        raise ValueError("the message ends within a number")
    return found
