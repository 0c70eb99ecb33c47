"""What people send in place of a network file, and what to tell them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from fusion.errors import BadFile

ACCEPTED = "Accepted are ONNX files, TorchScript files (torch.jit.save) and torch.export programs (.pt2)."
AGAIN = "Export or copy it again."
RETRACE = "Load it where it was made and save torch.jit.trace(model.eval(), example) or an ONNX file."

# (is it that, by its first bytes?, what it is, what to do).
_STRANGERS: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (lambda head: not head, "is empty", AGAIN),
    (lambda head: head.startswith(b"PK"), "is truncated: the end of the archive is missing", AGAIN),
    (
        lambda head: head.startswith(b"version https://git-lfs"),
        "is a Git LFS pointer, not the file itself",
        "Run git lfs pull and send the real file.",
    ),
    (
        lambda head: head.startswith(b"\x80"),
        "is a Python pickle (an old state_dict or module); loading a pickle would run code from it",
        RETRACE,
    ),
    (
        lambda head: head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27,
        "is a safetensors file: weights without a network",
        "Build the network, load the weights and export it as ONNX or TorchScript.",
    ),
    (
        lambda head: head.startswith(b"\x89HDF"),
        "is an HDF5 file (Keras)",
        "Export the network as ONNX, for example with tf2onnx.",
    ),
    (
        lambda head: head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf")),
        "is a compressed file",
        "Unpack it first.",
    ),
    (
        lambda head: head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM")),
        "is an image, not a network",
        ACCEPTED,
    ),
    (lambda head: b"\0" not in head, "is a text file, not a network", ACCEPTED),
)


def is_whole_zip(path: Path) -> bool:
    """Whether the file is a zip archive from its first byte on. The end of a cut archive of archives (.pt2)
    may look like a smaller one."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return min((entry.header_offset for entry in archive.infolist()), default=0) == 0


def refuse(path: Path) -> BadFile:
    """The error for a file of no known format, which says what it seems to be."""
    with path.open("rb") as file:
        head = file.read(4096)
    for matches, what, advice in _STRANGERS:
        if matches(head):
            return BadFile(f"'{path.name}' {what}. {advice}")
    return BadFile(f"'{path.name}' is not a network file of a known format. {ACCEPTED}")
