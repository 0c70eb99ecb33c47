"""A network's files as the body of an upload: the file alone, or a form with the data files that hold its weights."""

import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[int, int], None]

BINARY = "application/octet-stream"
_BLOCK = 2**18


@dataclass(frozen=True)
class Upload:
    """A body to stream: bytes and files, one after the other. `progress(sent, total)` is told of the files' bytes."""

    content_type: str
    pieces: tuple[bytes | Path, ...]
    progress: Progress | None = None

    def headers(self) -> dict[str, str]:
        sizes = (len(p) if isinstance(p, bytes) else p.stat().st_size for p in self.pieces)
        return {"Content-Type": self.content_type, "Content-Length": str(sum(sizes))}

    def blocks(self) -> Iterator[bytes]:
        """The body, in pieces that are never empty."""
        total = sum(piece.stat().st_size for piece in self.pieces if isinstance(piece, Path))
        sent = 0
        for piece in self.pieces:
            if isinstance(piece, bytes):
                yield piece
                continue
            with piece.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
                    sent += len(block)
                    if self.progress is not None:
                        self.progress(sent, total)


def of_network(network: Path, data: Iterable[Path], progress: Progress | None = None) -> Upload:
    """The upload of a network's file with its data files, each under its path from the network's folder if it is
    there or below, and else under its name."""
    files = {_name(path, network.parent): path for path in data}
    if not files:
        return Upload(BINARY, (network,), progress)
    boundary = secrets.token_hex(16)
    pieces: list[bytes | Path] = []
    for field, name, path in [("file", network.name, network), *(("data", *item) for item in files.items())]:
        disposition = f'Content-Disposition: form-data; name="{field}"; filename="{_quoted(name)}"'
        pieces += [f"--{boundary}\r\n{disposition}\r\nContent-Type: {BINARY}\r\n\r\n".encode(), path, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    return Upload(f"multipart/form-data; boundary={boundary}", tuple(pieces), progress)


def data_beside(network: Path) -> tuple[Path, ...]:
    """The data files of a network that exporters call by its own name, where they are there and it mentions them.

    Neither the file nor a server has a say in which names these are, and links are not followed: whatever else lies
    beside a network from somewhere stays where it is."""
    usual = dict.fromkeys(
        (f"{network.name}.data", f"{network.name}_data", f"{network.stem}.data", f"{network.stem}_data")
    )
    there = [network.with_name(name) for name in usual if _is_plain(network.with_name(name))]
    return tuple(path for path in there if _mentions(network, path.name))


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _mentions(network: Path, name: str) -> bool:
    """Whether a name stands in a file at all: an older export's data may still lie beside a network of one file."""
    with network.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(name.encode()) >= 0


def _name(path: Path, folder: Path) -> str:
    whole, home = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return whole.relative_to(home).as_posix() if whole.is_relative_to(home) else path.name


def _quoted(name: str) -> str:
    """As browsers write names in forms."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
