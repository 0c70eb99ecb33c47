"""Changes to a file, each a small function of its bytes (or what they stand for) and a source of randomness.

Changed bytes mostly break a file's framing, which is noticed at once. So messages and archives are also changed inside
and framed again, and what is wrong with them shows only where it is used.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import onnx
import torch

from benchmarks.fuzz.messages import BYTES, VARINT, Field, parse, places, write

Mutation = Callable[[bytes, Random], bytes]

# Numbers at the edges of what counts, sizes and types can be; negative ones are written as 64 bits.
_NUMBERS = (0, 1, 2, 3, 5, 127, 255, 65_535, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)
_EDGES = (*_NUMBERS, *(2**64 - n for n in (1, 2, 3, 2**31, 2**63)))


def flip_bits(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def replace_run(data: bytes, random: Random) -> bytes:
    start, end = _run(data, random)
    fill = random.choice((b"\0", b"\xff", None))
    return data[:start] + (fill * (end - start) if fill else random.randbytes(end - start)) + data[end:]


def remove_chunk(data: bytes, random: Random) -> bytes:
    start, end = _run(data, random)
    return data[:start] + data[end:]


def repeat_chunk(data: bytes, random: Random) -> bytes:
    start, end = _run(data, random)
    return data[:end] + data[start:end] * random.choice((1, 1, 2, 100)) + data[end:]


def swap_chunks(data: bytes, random: Random) -> bytes:
    (a, b), (c, d) = sorted((_run(data, random), _run(data, random)))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:] if b <= c else data[::-1]


def huge_number(data: bytes, random: Random) -> bytes:
    """A number of 64 bits, as protobuf writes it, over what is there or in between."""
    at = random.randrange(len(data))
    return (
        data[:at] + b"\xff" * 9 + random.choice((b"\x01", b"\x7f")) + data[at + random.choice((0, 1, 10)) :]
    )


def swap_names(data: bytes, random: Random) -> bytes:
    """One of the file's own words in the place of another of the same length."""
    words = [match.span() for match in re.finditer(rb"[A-Za-z_./][A-Za-z0-9_./]*", data)]
    lengths: dict[int, list[tuple[int, int]]] = {}
    for start, end in words:
        lengths.setdefault(end - start, []).append((start, end))
    several = [spans for spans in lengths.values() if len({data[a:b] for a, b in spans}) > 1]
    if not several:
        return flip_bits(data, random)
    (start, end), (a, b) = random.sample(random.choice(several), 2)
    return data[:start] + data[a:b] + data[end:]


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def _run(data: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data))
    return start, min(len(data), start + random.choice((1, 2, 4, 16, 64, 512)))


BYTES_CHANGED: tuple[Mutation, ...] = (
    flip_bits,
    replace_run,
    remove_chunk,
    repeat_chunk,
    swap_chunks,
    huge_number,
    swap_names,
    truncate,
)


def _on_message(change: Callable[[list[Field], Random], None]) -> Mutation:
    def mutate(data: bytes, random: Random) -> bytes:
        fields = parse(data, _MODEL)
        change(fields, random)
        return write(fields)

    mutate.__name__ = change.__name__
    return mutate


_MODEL: Any = onnx.ModelProto.DESCRIPTOR


@_on_message
def drop_field(fields: list[Field], random: Random) -> None:
    holder, i = _any(fields, random)
    del holder[i]


@_on_message
def double_field(fields: list[Field], random: Random) -> None:
    holder, i = _any(fields, random)
    holder[i:i] = [holder[i]] * random.choice((1, 1, 1, 50))


@_on_message
def move_field(fields: list[Field], random: Random) -> None:
    """Within its message: nodes, inputs and dimensions in another order."""
    holder, i = _any(fields, random)
    field = holder.pop(i)
    holder.insert(random.randrange(len(holder) + 1), field)


@_on_message
def lend_value(fields: list[Field], random: Random) -> None:
    """One field has the value of another of its kind, else of its wire type."""
    holder, i = _any(fields, random)
    field = holder[i]
    others = [h[j] for h, j in places(fields) if h[j].wire == field.wire]
    same = [other for other in others if other.kind == field.kind and other.value != field.value]
    chosen = random.choice(same if same and random.random() < 0.8 else others)
    if isinstance(chosen.value, list) and any(h is holder for h, _ in places(chosen.value)):
        return  # a message within itself has no end
    holder[i] = Field(field.number, field.wire, chosen.value, field.kind)


@_on_message
def change_number(fields: list[Field], random: Random) -> None:
    numbers = [(h, i) for h, i in places(fields) if h[i].wire == VARINT]
    holder, i = random.choice(numbers)
    value = holder[i].value
    assert isinstance(value, int)
    near = (max(0, value - 1), value + 1, value * 2)
    holder[i].value = random.choice(near if random.random() < 0.3 else _EDGES)


@_on_message
def change_text(fields: list[Field], random: Random) -> None:
    """Another text of the file, an empty one, one that is no text, or an operator's name."""
    texts = [h[i] for h, i in places(fields) if isinstance(h[i].value, bytes) and h[i].wire == BYTES]
    chosen = random.choice(texts)
    other = random.choice(texts).value
    assert isinstance(other, bytes)
    operator = random.choice(_OPERATORS) if "op_type" in chosen.kind else other
    chosen.value = random.choice((operator, operator, operator, b"", b"\xff\xfe", b"x" * 300))


@_on_message
def change_bytes(fields: list[Field], random: Random) -> None:
    """Of a value alone, so that its frame stays whole."""
    values = [h[i] for h, i in places(fields) if isinstance(h[i].value, bytes) and h[i].value]
    chosen = random.choice(values)
    assert isinstance(chosen.value, bytes)
    changed = random.choice(BYTES_CHANGED)(chosen.value, random)
    fixed = {1: 8, 5: 4}.get(chosen.wire)
    chosen.value = changed if fixed is None else (changed + bytes(fixed))[:fixed]


_OPERATORS = sorted({schema.name.encode() for schema in onnx.defs.get_all_schemas() if not schema.domain})


def _any(fields: list[Field], random: Random) -> tuple[list[Field], int]:
    return random.choice(list(places(fields)))


MESSAGES_CHANGED: tuple[Mutation, ...] = (
    drop_field,
    double_field,
    move_field,
    lend_value,
    change_number,
    change_text,
    change_bytes,
)


def _on_entry(accepts: Callable[[str], bool], change: Callable[[bytes, Random], bytes]) -> Mutation:
    """Change one entry of a torch archive and write the archive anew, with checksums that are right."""

    def mutate(data: bytes, random: Random) -> bytes:
        entries = _entries(data)
        names = [name for name in entries if accepts(name) and entries[name]]
        if not names:
            return flip_bits(data, random)
        name = random.choice(names)
        entries[name] = change(entries[name], random)
        return _archive(entries)

    return mutate


def _entries(data: bytes) -> dict[str, bytes]:
    """By their names below the top folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError, EOFError):
        return {}  # an earlier change has broken it


_WRITTEN = ("version", "byteorder", ".data/")  # by torch itself


def _archive(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    writer: Any = torch._C.PyTorchFileWriter(buffer)
    for name, content in entries.items():
        if not name.startswith(_WRITTEN):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return buffer.getvalue()


def _changed_bytes(data: bytes, random: Random) -> bytes:
    return random.choice(BYTES_CHANGED)(data, random)


def _changed_code(data: bytes, random: Random) -> bytes:
    """Lines or words moved, dropped, doubled, or replaced by others of the same code."""
    lines = data.split(b"\n")
    i, j = random.randrange(len(lines)), random.randrange(len(lines))
    kind = random.choice(("drop", "double", "swap", "word", "word", "word", "number"))
    if kind == "drop":
        del lines[i]
    elif kind == "double":
        lines.insert(j, lines[i])
    elif kind == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    else:
        pattern = rb"[0-9][0-9.e-]*" if kind == "number" else rb"[A-Za-z_][A-Za-z0-9_]*"
        words = list(re.finditer(pattern, data))
        if not words:
            return flip_bits(data, random)
        old = random.choice(words)
        new = random.choice(words).group()
        if kind == "number" and random.random() < 0.5:
            new = random.choice((b"0", b"-1", b"9223372036854775807", b"99999999999999999999", b"1e400"))
        return data[: old.start()] + new + data[old.end() :]
    return b"\n".join(lines)


def change_code(data: bytes, random: Random) -> bytes:
    return _on_entry(lambda name: name.endswith(".py"), _changed_code)(data, random)


def change_pickle(data: bytes, random: Random) -> bytes:
    return _on_entry(lambda name: name.endswith("pkl"), _changed_bytes)(data, random)


def change_entry(data: bytes, random: Random) -> bytes:
    return _on_entry(lambda name: True, _changed_bytes)(data, random)


def drop_entry(data: bytes, random: Random) -> bytes:
    entries = _entries(data)
    if not entries:
        return flip_bits(data, random)
    del entries[random.choice(list(entries))]
    return _archive(entries)


ARCHIVES_CHANGED: tuple[Mutation, ...] = (change_code, change_code, change_pickle, change_entry, drop_entry)
