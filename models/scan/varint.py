"""Numbers as protobuf writes them: seven bits a byte, the lowest first."""

from mmap import mmap

_LONGEST = 64  # bits


def read(data: bytes | mmap, position: int, end: int) -> tuple[int, int] | None:
    """The number at a position and the position behind it; None where it does not end before `end`, or is longer than
    numbers are."""
    value = shift = 0
    while position < end and shift < _LONGEST:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return None
