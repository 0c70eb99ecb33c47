"""Files of other tools are told apart and answered with what to do."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import models
from fusion.errors import BadFile, ClearfoldError


def archive(*names: str) -> bytes:
    """A zip archive with entries of these names."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for name in names:
            file.writestr(name, b"\0" * 8)
    return target.getvalue()


def node(name: bytes, op: bytes) -> bytes:
    """A node of a frozen TensorFlow graph."""
    inner = bytes([0x0A, len(name)]) + name + bytes([0x12, len(op)]) + op
    return bytes([0x0A, len(inner)]) + inner


FILLING = bytes(range(64))
FILES: Sequence[tuple[str, bytes, str, str]] = [
    ("net.ort", b"\x20\0\0\0ORTM" + FILLING, "ONNX Runtime's own format", "ONNX file"),
    ("net.tflite", b"\x1c\0\0\0TFL3" + FILLING, "TensorFlow Lite", "tf2onnx.convert --tflite"),
    ("net.pte", b"\x1c\0\0\0ET12" + FILLING, "ExecuTorch", "torch.export program"),
    ("net.engine", b"ftrt" + FILLING, "TensorRT", "ONNX file"),
    ("net.plan", FILLING, "TensorRT", "ONNX file"),
    ("net.gguf", b"GGUF\x03" + FILLING, "GGUF", "load the weights"),
    (
        "saved_model.pb",
        b"\x08\x01\x12\x9c\xcb\x09\x0a" + FILLING,
        "SavedModel",
        "tf2onnx.convert --saved-model",
    ),
    (
        "frozen.pb",
        node(b"x", b"Placeholder") + node(b"w", b"Const"),
        "frozen TensorFlow",
        "tf2onnx.convert --graphdef",
    ),
    ("net.keras", archive("metadata.json", "config.json", "model.weights.h5"), "Keras", "model.export"),
    ("net.h5", b"\x89HDF\r\n" + FILLING, "Keras", "tf2onnx"),
    ("net.mar", archive("MAR-INF/MANIFEST.json", "net.pt"), "TorchServe", "network file inside"),
    ("net.zip", archive("Manifest.json", "Data/com.apple.CoreML/model.mlmodel"), "Core ML", "ONNX file"),
    ("net.mlmodel", b"\x08\x04\x12\x05\x01" + FILLING, "Core ML", "ONNX file"),
    ("net.npz", archive("a.npy", "b.npy"), "NumPy arrays", "load the weights"),
    ("net.npy", b"\x93NUMPY\x01" + FILLING, "NumPy array", "load the weights"),
    ("net.zip", archive("folder/net.onnx", "folder/readme.txt"), "network file inside", "Unpack it"),
    ("net.tar", FILLING * 4 + b"\0ustar\0" + FILLING, "tar archive", "Unpack it"),
    ("net.xml", b'<?xml version="1.0"?>\n<net name="resnet" version="11">', "OpenVINO", "ONNX file"),
    ("net.onnx", b"<!DOCTYPE html>\n<html lang=en>", "web page", "Download"),
    ("net.onnx", b'ir_version: 8\nproducer_name: "pytorch"\n', "written as text", "onnx.save"),
    ("net.pdmodel", FILLING, "PaddlePaddle", "paddle2onnx"),
    ("net.weights", FILLING, "weights without a network", "load the weights"),
]


@pytest.mark.parametrize(("name", "data", "what", "advice"), FILES, ids=[f"{n}-{w}" for n, _, w, _ in FILES])
def test_a_file_of_another_tool(tmp_path: Path, name: str, data: bytes, what: str, advice: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(BadFile) as error:
        models.open(path)
    assert f"'{name}'" in str(error.value)
    assert what in str(error.value)
    assert advice in str(error.value)


def test_a_folder_of_tensorflow(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01\x12\x9c\xcb\x09\x0a" + FILLING)
    with pytest.raises(BadFile, match="TensorFlow SavedModel"):
        models.open(tmp_path)


def test_what_is_torchs_stays_torchs(tmp_path: Path) -> None:
    """Whatever lies beside its weights: the strict reader decides."""
    path = tmp_path / "net.pt"
    path.write_bytes(archive("net/data.pkl", "net/extra/net.onnx", "net/code/net.py"))
    with pytest.raises(ClearfoldError) as error:
        models.open(path)
    assert "network file inside" not in str(error.value)
