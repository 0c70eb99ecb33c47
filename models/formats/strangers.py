"""What people send in place of a network file, and what to tell them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusion.errors import BadFile

ACCEPTED = "Accepted are ONNX files, TorchScript files (torch.jit.save) and torch.export programs (.pt2)."
AGAIN = "Export or copy it again."
RETRACE = "Load it where it was made and save torch.jit.trace(model.eval(), example) or an ONNX file."
_SOURCE = "Send the ONNX file or torch.export program that it was made from."
_UNPACK = "Unpack it first."
_KERAS = 'Export the network as ONNX: model.export("net.onnx", format="onnx") in Keras 3, or tf2onnx.'
_TENSORFLOW = "Convert it to ONNX: python -m tf2onnx.convert --{} PATH --output net.onnx."
_WEIGHTS = "Build the network, load the weights and export it as ONNX or TorchScript."

# A TensorFlow SavedModel starts like an ONNX file of version 1, which was before opsets were counted.
SAVED_MODEL = b"\x08\x01\x12"


@dataclass(frozen=True)
class Sample:
    """What is looked at: the first bytes, the names inside a zip archive (none for other files), and how the file's own
    name ends."""

    head: bytes
    names: tuple[str, ...]
    suffix: str

    @classmethod
    def of(cls, path: Path) -> Sample:
        with path.open("rb") as file:
            head = file.read(4096)
        names: tuple[str, ...] = ()
        if is_whole_zip(path):
            with zipfile.ZipFile(path) as archive:
                names = tuple(archive.namelist())
        return cls(head, names, path.suffix.lower())

    def starts(self, *signatures: bytes) -> bool:
        return self.head.startswith(signatures)

    def at_four(self, signature: bytes) -> bool:
        """Whether it is FlatBuffers of that kind."""
        return self.head[4 : 4 + len(signature)] == signature

    def says(self, *texts: bytes) -> bool:
        """Whether it begins with one of these, spaces and case aside."""
        return self.head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(texts)

    def has(self, *endings: str) -> bool:
        """Whether something inside the archive ends like that."""
        return any(name.endswith(endings) for name in self.names)

    def has_only(self, *endings: str) -> bool:
        return bool(self.names) and all(name.endswith((*endings, "/")) for name in self.names)


# (is it that?, what it is, what to do).
_Stranger = tuple[Callable[[Sample], bool], str, str]

# Zip archives that are none of torch's.
_ARCHIVES: tuple[_Stranger, ...] = (
    (lambda it: it.has("model.weights.h5"), "is a Keras file", _KERAS),
    (
        lambda it: it.has("MAR-INF/MANIFEST.json"),
        "is an archive of TorchServe",
        "Send the network file inside.",
    ),
    (
        lambda it: it.has("com.apple.CoreML/model.mlmodel"),
        "is a Core ML package",
        _SOURCE,
    ),
    (lambda it: it.has_only(".npy"), "holds NumPy arrays: weights without a network", _WEIGHTS),
    (
        lambda it: it.has("saved_model.pb"),
        "is a packed TensorFlow SavedModel",
        "Unpack it. " + _TENSORFLOW.format("saved-model"),
    ),
    (
        lambda it: it.has(".onnx", ".pt", ".pth", ".pt2", ".torchscript", ".tflite"),
        "is a zip archive with a network file inside",
        "Unpack it and send that file.",
    ),
)

_STRANGERS: tuple[_Stranger, ...] = (
    (lambda it: not it.head, "is empty", AGAIN),
    *_ARCHIVES,
    (lambda it: it.starts(b"PK") and not it.names, "is truncated: the end of the archive is missing", AGAIN),
    (
        lambda it: it.starts(b"version https://git-lfs"),
        "is a Git LFS pointer, not the file itself",
        "Run git lfs pull and send the real file.",
    ),
    (
        lambda it: it.starts(b"\x80"),
        "is a Python pickle (an old state_dict or module); loading a pickle would run code from it",
        RETRACE,
    ),
    (
        lambda it: it.head[8:9] == b"{" and int.from_bytes(it.head[:8], "little") < 1 << 27,
        "is a safetensors file: weights without a network",
        _WEIGHTS,
    ),
    (lambda it: it.starts(b"GGUF"), "is a GGUF file: weights without a network", _WEIGHTS),
    (lambda it: it.starts(b"\x93NUMPY"), "holds a NumPy array: weights without a network", _WEIGHTS),
    (lambda it: it.starts(b"\x89HDF"), "is an HDF5 file (Keras)", _KERAS),
    (lambda it: it.at_four(b"ORTM"), "is in ONNX Runtime's own format (.ort)", _SOURCE),
    (lambda it: it.at_four(b"TFL3"), "is a TensorFlow Lite file", _TENSORFLOW.format("tflite")),
    (lambda it: it.at_four(b"ET"), "is an ExecuTorch program", _SOURCE),
    (lambda it: it.starts(b"ftrt"), "is a TensorRT engine, compiled for one GPU", _SOURCE),
    (lambda it: it.starts(SAVED_MODEL), "is a TensorFlow SavedModel", _TENSORFLOW.format("saved-model")),
    (
        lambda it: it.starts(b"\n") and b"\x12\x0bPlaceholder" in it.head,
        "is a frozen TensorFlow graph",
        _TENSORFLOW.format("graphdef"),
    ),
    (lambda it: it.head[257:262] == b"ustar", "is a tar archive", _UNPACK),
    (
        lambda it: it.starts(b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"),
        "is a compressed file",
        _UNPACK,
    ),
    (
        lambda it: it.starts(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM"),
        "is an image, not a network",
        ACCEPTED,
    ),
    (
        lambda it: it.says(b"<!doctype html", b"<html"),
        "is a web page, not the file behind its link",
        "Download the file itself, for example by its raw link.",
    ),
    (lambda it: it.says(b"<?xml", b"<net") and b"<net " in it.head, "is an OpenVINO network", _SOURCE),
    (
        lambda it: it.says(b"ir_version:", b'{\n  "irversion"', b'{"irversion"'),
        "is an ONNX network written as text",
        'Read it with the onnx package and save it with onnx.save(model, "net.onnx").',
    ),
    (lambda it: b"\0" not in it.head, "is a text file, not a network", ACCEPTED),
    # Formats without a signature: only the name tells.
    (
        lambda it: it.suffix in (".data", ".onnx_data"),
        "seems to hold the weights of an ONNX network",
        "Open or send the .onnx file that names it, together with this one.",
    ),
    (lambda it: it.suffix in (".mlmodel", ".mlpackage"), "is a Core ML file", _SOURCE),
    (
        lambda it: it.suffix in (".engine", ".plan", ".trt"),
        "is a TensorRT engine, compiled for one GPU",
        _SOURCE,
    ),
    (
        lambda it: it.suffix in (".pdmodel", ".pdiparams"),
        "is a PaddlePaddle file",
        "Convert the network to ONNX with paddle2onnx.",
    ),
    (
        lambda it: it.suffix in (".caffemodel", ".weights", ".params", ".msgpack", ".ckpt"),
        "seems to hold weights without a network",
        _WEIGHTS,
    ),
)


def is_whole_zip(path: Path) -> bool:
    """Whether the file is a zip archive from its first byte on. The end of a cut archive of archives (.pt2)
    may look like a smaller one."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return min((entry.header_offset for entry in archive.infolist()), default=0) == 0


def is_strange_archive(path: Path) -> bool:
    """Whether a zip archive is known to be none of torch's."""
    sample = Sample.of(path)
    if sample.has("/data.pkl", "models/model.json", "serialized_exported_program.json"):
        return False
    return any(matches(sample) for matches, *_ in _ARCHIVES)


def refuse(path: Path) -> BadFile:
    """The error for a file of no known format, which says what it seems to be."""
    sample = Sample.of(path)
    for matches, what, advice in _STRANGERS:
        if matches(sample):
            return BadFile(f"'{path.name}' {what}. {advice}")
    return BadFile(f"'{path.name}' is not a network file of a known format. {ACCEPTED}")
