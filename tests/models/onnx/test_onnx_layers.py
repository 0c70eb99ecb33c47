"""Layers of detectors, segmenters and sequence heads inside a small classifier: as ONNX Runtime runs them, with a free
batch, and explained with every unit of relevance accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx_files import agrees, array, build, classifier, explained, ints, relative

from fusion import capture
from models.formats.onnx import OnnxSource, read
from models.formats.onnx.file import parse
from models.formats.onnx.folding import evaluate

Save = Callable[[onnx.ModelProto], Path]


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample(save: Save, mode: str, padding: str) -> None:
    node = helper.make_node("GridSample", ["f", "grid"], ["g"], mode=mode, padding_mode=padding)
    grid = np.random.default_rng(0).uniform(-1.2, 1.2, (1, 5, 6, 2)).astype(np.float32)
    explained(agrees_as_one(save(classifier([node], {"grid": grid}, 20))))


def agrees_as_one(path: Path) -> OnnxSource:
    """For files that ONNX Runtime runs with a batch of one only."""
    source = read(path)
    x = torch.randn(3, *source.example.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = torch.cat([source.original(x[i : i + 1]) for i in range(3)])
        assert relative(source.module(x), want) <= 1e-5
        assert relative(capture(source.module, (source.example,))(x), want) <= 1e-5
    return source


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["half_pixel", "output_half_pixel"])
def test_regions_of_interest(ratio: int, mode: str) -> None:
    """Constant boxes, some of which reach beyond the image."""
    node = helper.make_node(
        "RoiAlign", ["x", "boxes", "samples"], ["y"], output_height=2, output_width=3, sampling_ratio=ratio,
        spatial_scale=0.5, coordinate_transformation_mode=mode,
    )  # fmt: skip
    boxes = np.array([[0.5, 1, 9, 7.5], [2, 3, 12, 15], [-2, 0, 5, 18], [3, 3, 3.5, 3.2]], dtype=np.float32)
    weights = {"boxes": boxes, "samples": ints(0, 1, 1, 0)}
    model = build([node], (2, 3, 8, 8), weights, 16)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    (got,) = evaluate(parse(model.SerializeToString(), "net.onnx"), {"x": torch.from_numpy(x)})
    torch.testing.assert_close(got, torch.from_numpy(want), rtol=1e-4, atol=1e-5)


def test_max_unpooling(save: Save) -> None:
    """As SegNet has it: values go back to where their pool found them."""
    nodes = [
        helper.make_node("MaxPool", ["f"], ["m", "places"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["m", "w"], ["inner"], pads=[1, 1, 1, 1]),
        helper.make_node("MaxUnpool", ["inner", "places"], ["u"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["u", "w2"], ["g"], pads=[1, 1, 1, 1]),
    ]
    weights = {"w": array(4, 4, 3, 3, seed=3), "w2": array(4, 4, 3, 3, seed=4)}
    explained(agrees(save(classifier(nodes, weights, 17))))


@pytest.mark.parametrize(
    ("image", "attributes"),
    [
        ((9, 9), {}),
        ((15, 16), {"strides": [2, 2], "pads": [1, 1, 0, 0]}),
        ((10, 9), {"dilations": [2, 1]}),
        ((7, 7), {"pads": [1, 1, 1, 1]}),
    ],
)
def test_blocks_to_image(save: Save, image: tuple[int, int], attributes: dict[str, Any]) -> None:
    """Each pixel's channels as blocks that overlap."""
    nodes = [
        helper.make_node("Reshape", ["f", "columns"], ["l"]),
        helper.make_node("Col2Im", ["l", "image", "block"], ["i"], **attributes),
        helper.make_node("Conv", ["i", "w"], ["g"]),
    ]
    weights = {"columns": ints(0, 4, 64), "image": ints(*image), "block": ints(2, 2), "w": array(4, 1, 3, 3)}
    explained(agrees(save(classifier(nodes, weights, 18))))


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_layers_over_rows(save: Save, op: str, direction: str) -> None:
    recurrent_over_rows(save, op, direction, {})


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("GRU", {"linear_before_reset": 1}),
        (
            "GRU",
            {
                "clip": 0.3,
                "activations": ["HardSigmoid", "ScaledTanh"],
                "activation_alpha": [0.3, 0.9],
                "activation_beta": [0.4, 0.8],
            },
        ),
        ("RNN", {"activations": ["LeakyRelu"], "activation_alpha": [0.2]}),
        ("RNN", {"activations": ["Relu"]}),
        ("LSTM", {"activations": ["HardSigmoid", "Softsign", "Tanh"]}),
        ("LSTM", {"clip": 0.2}),
        ("LSTM", {"input_forget": 1}),
    ],
)
def test_recurrent_layers_of_other_kinds(save: Save, op: str, attributes: dict[str, Any]) -> None:
    recurrent_over_rows(save, op, "forward", attributes)


def recurrent_over_rows(save: Save, op: str, direction: str, attributes: dict[str, Any]) -> None:
    gates, hidden = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 5
    both = 2 if direction == "bidirectional" else 1
    nodes = [
        helper.make_node("Transpose", ["f"], ["t"], perm=[2, 0, 1, 3]),
        helper.make_node("Reshape", ["t", "rows"], ["s"]),
        helper.make_node(
            op, ["s", "w", "r", "b"], ["all", "last"], hidden_size=hidden, direction=direction, **attributes
        ),
        helper.make_node("Transpose", ["all"], ["steps"], perm=[2, 1, 3, 0]),
        helper.make_node("Transpose", ["last"], ["ends"], perm=[1, 0, 2]),
        helper.make_node("Reshape", ["steps", "flat"], ["g1"]),
        helper.make_node("Reshape", ["ends", "flat1"], ["g2"]),
        helper.make_node("Add", ["g1", "g2"], ["g"]),
    ]
    weights = {
        "rows": ints(0, 0, 32),
        "w": array(both, gates * hidden, 32, seed=3),
        "r": array(both, gates * hidden, hidden, seed=4),
        "b": array(both, 2 * gates * hidden, seed=5),
        "flat": ints(0, both * hidden, 8),
        "flat1": ints(0, both * hidden, 1),
    }
    explained(agrees(save(classifier(nodes, weights, 17, channels=both * hidden))))


@pytest.mark.parametrize(
    "attributes",
    [{}, {"is_causal": 1}, {"scale": 0.3}, {"kv_num_heads": 2, "q_num_heads": 4}, {"softcap": 0.5}],
)
def test_attention(save: Save, attributes: dict[str, Any]) -> None:
    heads = {"q_num_heads": 2, "kv_num_heads": 2, **attributes}
    shared = 8 * heads["kv_num_heads"] // heads["q_num_heads"]
    nodes = [
        helper.make_node("Reshape", ["f", "tokens"], ["l"]),
        helper.make_node("Transpose", ["l"], ["t"], perm=[0, 2, 1]),
        *(helper.make_node("MatMul", ["t", f"w{k}"], [k]) for k in "qkv"),
        helper.make_node("Attention", ["q", "k", "v"], ["a"], **heads),
        helper.make_node("Transpose", ["a"], ["back"], perm=[0, 2, 1]),
        helper.make_node("Identity", ["back"], ["g"]),
    ]
    weights = {"tokens": ints(0, 4, 64), "wq": array(4, 8, seed=3)}
    weights |= {"wk": array(4, shared, seed=4), "wv": array(4, shared, seed=5)}
    explained(agrees(save(classifier(nodes, weights, 23, channels=8))))


def test_deformable_convolution(save: Save) -> None:
    """Offsets and masks computed from the image, as DCNv2 has them."""
    nodes = [
        helper.make_node("Conv", ["f", "wo"], ["offset"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["f", "wm"], ["m"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["m"], ["mask"]),
        helper.make_node(
            "DeformConv", ["f", "w", "offset", "b", "mask"], ["g"], pads=[1, 1, 1, 1], offset_group=2
        ),
    ]
    weights = {
        "wo": array(36, 4, 3, 3, seed=3),
        "wm": array(18, 4, 3, 3, seed=4),
        "w": array(4, 4, 3, 3, seed=5),
        "b": array(4, seed=6),
    }
    explained(agrees(save(classifier(nodes, weights, 19))))


def test_the_largest_of_each_channel(save: Save) -> None:
    nodes = [
        helper.make_node("Reshape", ["f", "flat"], ["l"]),
        helper.make_node("TopK", ["l", "three"], ["g", "places"], axis=2),
    ]
    explained(agrees(save(classifier(nodes, {"flat": ints(0, 4, 64), "three": ints(3)}, 17))))


@pytest.mark.parametrize("scales", [(1, 1, 1.3, 0.7), (1, 1, 0.6, 0.6)])
def test_interpolation_without_a_kernel_of_torch(save: Save, scales: tuple[float, ...]) -> None:
    node = helper.make_node("Resize", ["f", "", "s"], ["g"], mode="cubic", antialias=1)
    explained(agrees(save(classifier([node], {"s": np.array(scales, dtype=np.float32)}, 19))))
