"""Multipart forms (RFC 7578) as they come in: each part's head, then its content in pieces; nothing is gathered."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.problems import Problem

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


@dataclass(frozen=True)
class Head:
    """What a part is: the form's field, and the file's name where it is a file."""

    field: str
    filename: str | None


async def parts(
    content_type: str, body: AsyncIterator[bytes]
) -> AsyncIterator[tuple[Head, AsyncIterator[bytes]]]:
    """The parts of a form in their order; what of a part's content is not read is passed over with the next part.

    Raises the problem bad-request for what is no form, or is cut off."""
    events = _events(content_type, body)
    async for event in events:
        if isinstance(event, Head):
            yield event, _content(events)


async def _content(events: AsyncIterator[Head | bytes | None]) -> AsyncIterator[bytes]:
    async for event in events:
        if not isinstance(event, bytes):
            return
        yield event


async def _events(content_type: str, body: AsyncIterator[bytes]) -> AsyncIterator[Head | bytes | None]:
    """A part's head, the pieces of its content, and None where it ends."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise _unreadable("its Content-Type names no boundary")
    listener = _Listener()
    try:
        parser = MultipartParser(boundary, listener.callbacks())
        async for piece in body:
            parser.write(piece)
            for event in listener.heard:
                yield event
            listener.heard.clear()
    except FormParserError as error:
        raise _unreadable(str(error).rstrip(".")) from error
    if not listener.ended:
        raise _unreadable("it ends in the middle")


class _Listener:
    """What a parser says, in its order. The parser bounds the heads."""

    def __init__(self) -> None:
        self.heard: list[Head | bytes | None] = []
        self.ended = False
        self._field = self._value = self._disposition = b""

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._hear_field,
            "on_header_value": self._hear_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_head,
            "on_part_data": lambda data, start, end: self.heard.append(data[start:end]),
            "on_part_end": lambda: self.heard.append(None),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition = b""

    def _hear_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _hear_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _end_head(self) -> None:
        found = parse_options_header(self._disposition)[1]
        filename = found.get(b"filename")
        named = None if filename is None else filename.decode(errors="replace")
        self.heard.append(Head(found.get(b"name", b"").decode(errors="replace"), named))

    def _end(self) -> None:
        self.ended = True


def _unreadable(why: str) -> Problem:
    return Problem("bad-request", f"The form cannot be read: {why}. Send it again as multipart/form-data.")
