"""Images channels last, and pixels that the network normalizes itself: every format, one heatmap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import fusion
import lrp
import models
from fusion.errors import BadInput
from models import InputSpec
from models.convert import certification_inputs

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 55.0, 57.0)


class Classifier(nn.Module):
    """Three classes of images [N, 3, 8, 8], or maps of them."""

    def __init__(self, maps: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).relu())
        return y if self.maps else y.mean((2, 3))


class Last(nn.Module):
    """The same of pixels [N, 8, 8, 3]; maps come channels last, too."""

    def __init__(self, inner: Classifier) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.tensor(MEAN))
        self.register_buffer("std", torch.tensor(STD))

    def forward(self, x: Tensor) -> Tensor:
        normal = (x.float() - self.mean) / self.std
        y: Tensor = self.inner(normal.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1) if self.inner.maps else y


def network(maps: bool = False) -> Classifier:
    torch.manual_seed(0)
    return Classifier(maps).eval()


def images(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float()


def as_onnx(path: Path, kind: int, last: bool, maps: bool = False) -> Path:
    """The same network behind its own normalization, as tools join one to a file."""
    net = network(maps)
    weights: dict[str, Any] = {name: value.detach().numpy() for name, value in net.named_parameters()}
    weights |= {"mean": np.float32(MEAN), "std": np.float32(STD)}
    if not last:
        weights |= {name: weights[name].reshape(3, 1, 1) for name in ("mean", "std")}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        *([helper.make_node("Transpose", ["normal"], ["x"], perm=[0, 3, 1, 2])] if last else []),
        helper.make_node(
            "Conv", ["x" if last else "normal", "conv.weight", "conv.bias"], ["c"], pads=[1, 1, 1, 1]
        ),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "head.weight", "head.bias"], ["h"]),
        helper.make_node("ReduceMean", ["h"], ["y"], axes=[2, 3], keepdims=0)
        if not maps
        else helper.make_node("Transpose", ["h"], ["y"], perm=[0, 2, 3, 1])
        if last
        else helper.make_node("Identity", ["h"], ["y"]),
    ]
    shape = ["N", 8, 8, 3] if last else ["N", 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def exported(path: Path, dtype: torch.dtype) -> Path:
    batch = torch.export.Dim("batch")
    example = torch.zeros(2, 8, 8, 3, dtype=dtype)
    torch.export.save(
        torch.export.export(Last(network()).eval(), (example,), dynamic_shapes=({0: batch},)), path
    )
    return path


def traced(path: Path) -> Path:
    torch.jit.trace(Last(network()).eval(), torch.zeros(1, 8, 8, 3)).save(path)  # type: ignore[no-untyped-call]
    return path


def agrees(opened: models.Opened, maps: bool = False) -> None:
    """Its answers, its relevance and its own runtime's answers are those of the plain network."""
    plain = network(maps)
    x = images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        want = plain((x - mean) / std)
    torch.testing.assert_close(opened.network(x), want)
    assert opened.network.inputs[0].shape == (None, 3, 8, 8)
    assert fusion.certify(opened.original, opened.network, [x]).max_relative <= 1e-5
    found = lrp.Explainer(opened.network, composite="EpsilonPlus", device="cpu").explain(x)
    assert found.relevance.shape == x.shape
    assert found.ledger is not None
    assert float(found.ledger.error.max()) <= 1e-5


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT, TensorProto.INT32])
def test_an_onnx_file(tmp_path: Path, kind: int, last: bool, maps: bool) -> None:
    opened = models.open(as_onnx(tmp_path / "net.onnx", kind, last, maps))
    agrees(opened, maps)
    assert [spec.kind for spec in opened.network.outputs] == ["map" if maps else "scores"]
    assert any("channels last" in note for note in opened.notes) is last


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_exported_program(tmp_path: Path, dtype: torch.dtype) -> None:
    agrees(models.open(exported(tmp_path / "net.pt2", dtype)))


def test_a_script_and_a_module(tmp_path: Path) -> None:
    agrees(models.open(traced(tmp_path / "net.pt"), size=(8, 8)))
    agrees(models.open(Last(network()), size=(8, 8)))


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_pixels_are_given_as_they_are(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net.{suffix}"
    path = as_onnx(path, TensorProto.UINT8, True) if suffix == "onnx" else exported(path, torch.uint8)
    opened = models.open(path)
    assert (opened.input.mean, opened.input.std, opened.input.scale) == ((0,) * 3, (1,) * 3, 1)
    assert any("pixels as they are" in note for note in opened.notes)
    assert torch.equal(opened.prepare(np.full((8, 8, 3), 200, np.uint8)), torch.full((1, 3, 8, 8), 200.0))
    agreed = fusion.certify(opened.original, opened.network, certification_inputs(opened.input))
    assert agreed.max_relative <= 1e-5
    with pytest.raises(BadInput, match="whole numbers from 0 to 255"):
        models.open(path, input=InputSpec(size=(8, 8)))
    with pytest.raises(BadInput, match="scale 1, mean 0 and std 1"):
        opened.original(images() / 255)


def test_the_permutation_at_the_border_goes_where_the_file_takes_it_back(tmp_path: Path) -> None:
    """TensorFlow's networks compute channels first in ONNX: none of the two turns is left to be explained."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["x", "w"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["y"], axes=[2, 3], keepdims=0),
    ]
    weight = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "tf2onnx",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["unk__1", 9, 9, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    opened = models.open(path)
    assert "permute" not in [layer.op for layer in opened.network.layers()]
    assert opened.network.inputs[0].shape == (None, 3, 9, 9)
