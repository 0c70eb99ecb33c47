"""Quantized files, against ONNX Runtime: read as their dequantized selves and explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx_files import array, build, classifier, explained, ints
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from torch import nn

from fusion import capture
from fusion.errors import UnsupportedOperator
from lrp import Explainer
from models.formats.onnx import OnnxSource, read
from models.formats.onnx.file import parse
from models.formats.onnx.folding import evaluate

Save = Callable[[onnx.ModelProto], Path]
MICROSOFT = "com.microsoft"
# One step of a tensor with 256 values between its least and its greatest: what one rounding may change.
STEP = 1 / 128


def agrees(path: Path, steps: float = 1.0) -> OnnxSource:
    """Equal to ONNX Runtime within so many steps of the output, captured with a free batch, without integers in it."""
    source = read(path)
    x = torch.randn(3, *source.example.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = source.original(x)
        got = source.module(x)
        assert float((got - want).abs().max()) <= steps * STEP * float(want.abs().max())
        single = torch.cat([source.module(x[i : i + 1]) for i in range(3)])
        # A sum in another order may fall on the other side of a half.
        assert float((single - got).abs().max()) <= STEP * float(want.abs().max())
        network = capture(source.module, (source.example,))
        torch.testing.assert_close(network(x), got, rtol=1e-5, atol=1e-6)
    computed = [n for n in network.graph.nodes if n.op == "call_function" and n.meta.get("dtype")]
    assert all(n.meta["dtype"].is_floating_point for n in computed)
    assert "quantized: explained as its dequantized self" in source.notes
    return source


def quantizing(name: str, scale: float, zero: int, kind: Any = np.uint8) -> dict[str, np.ndarray[Any, Any]]:
    return {f"{name}_s": np.float32(scale), f"{name}_z": np.array(zero, dtype=kind)}


def numbers(*names: str) -> list[str]:
    """For each tensor its scale and zero point behind it."""
    return [part for name in names for part in (name, f"{name}_s", f"{name}_z")]


def layers(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, Any], channels: int = 4, kind: Any = np.uint8
) -> onnx.ModelProto:
    """The layers on quantized tensors, from `q` [N, 4, 8, 8] to `r` [N, channels, ...]."""
    inside = [
        helper.make_node("QuantizeLinear", ["f", "q_s", "q_z"], ["q"]),
        *nodes,
        helper.make_node("DequantizeLinear", numbers("r"), ["g"]),
    ]
    own = {
        **quantizing("q", 0.02, 3 if kind == np.uint8 else -20, kind),
        **quantizing("r", 0.03, 7, kind),
        **weights,
    }
    return classifier(inside, own, 17, channels, [MICROSOFT])


def integers(*shape: int, kind: Any = np.int8, seed: int = 0) -> np.ndarray[Any, Any]:
    low, high = (-128, 128) if kind == np.int8 else (0, 256)
    return np.random.default_rng(seed).integers(low, high, shape).astype(kind)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_convolution(save: Save, kind: Any, per_channel: bool) -> None:
    """With a fused ReLU: the zero point at the least integer cuts off what is negative."""
    scale = np.float32([0.01, 0.02, 0.005, 0.03, 0.01]) if per_channel else np.float32(0.01)
    zeros = np.zeros(5, np.int8) if per_channel else np.array(0, np.int8)
    weights = {
        "w": integers(5, 4, 3, 3) // 4,
        "w_s": scale,
        "w_z": zeros,
        "b": np.arange(-200, 300, 100, dtype=np.int32),
        **quantizing("r", 0.03, np.iinfo(kind).min, kind),
    }
    node = helper.make_node("QLinearConv", [*numbers("q", "w"), "r_s", "r_z", "b"], ["r"], pads=[1, 1, 1, 1])
    explained(agrees(save(layers([node], weights, 5, kind))))


def test_product(save: Save) -> None:
    node = helper.make_node("QLinearMatMul", [*numbers("q", "w"), "r_s", "r_z"], ["r"])
    weights = {"w": integers(8, 6) // 2, **quantizing("w", 0.02, 0, np.int8)}
    explained(agrees(save(layers([node], weights))))


@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_residuals_and_gates(save: Save, op: str) -> None:
    nodes = [
        helper.make_node("QLinearConv", [*numbers("q", "w"), "m_s", "m_z"], ["m"], pads=[1, 1, 1, 1]),
        helper.make_node(op, [*numbers("q", "m"), "r_s", "r_z"], ["r"], domain=MICROSOFT),
    ]
    weights = {
        "w": integers(4, 4, 3, 3) // 4,
        **quantizing("w", 0.01, 0, np.int8),
        **quantizing("m", 0.04, 100),
    }
    explained(agrees(save(layers(nodes, weights))))


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("QLinearSigmoid", {}),
        ("QLinearLeakyRelu", {"alpha": 0.2}),
        ("QLinearSoftmax", {"axis": -1, "opset": 13}),
        ("QLinearAveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("QLinearAveragePool", {"kernel_shape": [2, 2], "count_include_pad": 1}),
        ("QLinearGlobalAveragePool", {}),
    ],
)
def test_operators_of_one_tensor(save: Save, op: str, attributes: dict[str, Any]) -> None:
    scale = 1 / 256 if op in ("QLinearSigmoid", "QLinearSoftmax") else 0.02
    node = helper.make_node(op, [*numbers("q"), "r_s", "r_z"], ["r"], domain=MICROSOFT, **attributes)
    explained(agrees(save(layers([node], quantizing("r", scale, 0)))))


def test_joining(save: Save) -> None:
    nodes = [
        helper.make_node("QLinearConv", [*numbers("q", "w"), "m_s", "m_z"], ["m"], pads=[1, 1, 1, 1]),
        helper.make_node(
            "QLinearConcat", ["r_s", "r_z", *numbers("q", "m")], ["r"], axis=1, domain=MICROSOFT
        ),
    ]
    weights = {
        "w": integers(4, 4, 3, 3) // 4,
        **quantizing("w", 0.01, 0, np.int8),
        **quantizing("m", 0.04, 100),
    }
    explained(agrees(save(layers(nodes, weights, channels=8))))


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("MaxPool", ["q"], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Transpose", ["q"], {"perm": [0, 1, 3, 2]}),
        ("Reshape", ["q", "shape"], {}),
        ("Concat", ["q", "q"], {"axis": 2}),
        ("Gather", ["q", "rows"], {"axis": 2}),
        ("Pad", ["q", "pads", "zero"], {}),
        ("Resize", ["q", "", "scales"], {"mode": "nearest"}),
        ("Resize", ["q", "", "scales"], {"mode": "linear"}),
    ],
)
def test_integers_that_are_handed_on(
    save: Save, op: str, inputs: list[str], attributes: dict[str, Any]
) -> None:
    nodes = [helper.make_node(op, inputs, ["r"], **attributes)]
    weights = {
        "shape": ints(0, 4, 64),
        "rows": ints(3, 1, 6),
        "pads": ints(0, 0, 1, 1, 0, 0, 2, 0),
        "zero": np.array(3, dtype=np.uint8),
        "scales": np.float32([1, 1, 2, 2]),
        **quantizing("r", 0.02, 3),
    }
    # ONNX Runtime cuts off what an interpolated integer has behind the point: half a step less on average.
    steps = 2 if attributes.get("mode") == "linear" else 1
    explained(agrees(save(layers(nodes, weights)), steps))


def test_dense_layer(save: Save) -> None:
    """A product with a bias that is quantized by both scales, and a float output."""
    nodes = [
        helper.make_node("QuantizeLinear", ["f", "q_s", "q_z"], ["q"]),
        helper.make_node("Flatten", ["q"], ["flat"]),
        helper.make_node(
            "QGemm", ["flat", "q_s", "q_z", *numbers("w"), "b"], ["d"], transB=1, domain=MICROSOFT
        ),
        helper.make_node("Unsqueeze", ["d", "axis"], ["g"]),
    ]
    weights = {
        **quantizing("q", 0.02, 3),
        "w": integers(6, 256),
        **quantizing("w", 0.003, 0, np.int8),
        "b": np.arange(-3000, 3000, 1000, dtype=np.int32),
        "axis": ints(2),
    }
    explained(agrees(save(classifier(nodes, weights, 17, 6, [MICROSOFT]))))


def test_products_with_scales_of_the_image_at_hand(save: Save) -> None:
    """ONNX Runtime's dynamic quantization: the float is taken as it is."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["f"], ["q", "s", "z"]),
        helper.make_node("ConvInteger", ["q", "w", "z", "w_z"], ["i"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["i"], ["c1"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "w_s"], ["scale"]),
        helper.make_node("Mul", ["c1", "scale"], ["m"]),
        helper.make_node("DynamicQuantizeLinear", ["m"], ["q2", "s2", "z2"]),
        helper.make_node("MatMulInteger", ["q2", "v", "z2", "v_z"], ["i2"]),
        helper.make_node("Cast", ["i2"], ["c2"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["s2", "v_s"], ["scale2"]),
        helper.make_node("Mul", ["c2", "scale2"], ["g"]),
    ]
    weights = {"w": integers(4, 4, 3, 3, kind=np.uint8), **quantizing("w", 0.01, 120)}
    weights |= {"v": integers(8, 6), **quantizing("v", 0.02, 0, np.int8)}
    source = agrees(save(classifier(nodes, weights, 17)), steps=4)
    assert "activations are not rounded" in source.notes
    explained(source)


def tokens(nodes: Sequence[onnx.NodeProto], weights: dict[str, Any], channels: int) -> onnx.ModelProto:
    """The nodes on tokens, from `t` [N, 64, 4] to `u` [N, 64, channels]."""
    around = [
        helper.make_node("Reshape", ["f", "rows"], ["l"]),
        helper.make_node("Transpose", ["l"], ["t"], perm=[0, 2, 1]),
        *nodes,
        helper.make_node("Transpose", ["u"], ["g"], perm=[0, 2, 1]),
    ]
    return classifier(around, {"rows": ints(0, 4, 64), **weights}, 17, channels, [MICROSOFT])


@pytest.mark.parametrize("bias", [False, True])
def test_products_that_the_optimizer_fuses_with_dynamic_quantization(save: Save, bias: bool) -> None:
    end = ["b"] if bias else []
    weights = {"w": integers(4, 6), **quantizing("w", 0.01, 0, np.int8), "b": array(6, seed=4)}
    whole = helper.make_node("DynamicQuantizeMatMul", ["t", "w", "w_s", "w_z", *end], ["u"], domain=MICROSOFT)
    explained(agrees(save(tokens([whole], weights, 6)), steps=2))
    parts = [
        helper.make_node("DynamicQuantizeLinear", ["t"], ["q", "s", "z"]),
        helper.make_node(
            "MatMulIntegerToFloat", ["q", "w", "s", "w_s", "z", "w_z", *end], ["u"], domain=MICROSOFT
        ),
    ]
    explained(agrees(save(tokens(parts, weights, 6)), steps=2))


def test_attention(save: Save) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["t", "q_s", "q_z"], ["q"]),
        helper.make_node(
            "QAttention",
            ["q", "w", "b", "q_s", "w_s", "", "q_z", "w_z"],
            ["u"],
            num_heads=2,
            domain=MICROSOFT,
        ),
    ]
    weights = {**quantizing("q", 0.02, 3), "w": integers(4, 24), **quantizing("w", 0.01, 0, np.int8)}
    explained(agrees(save(tokens(nodes, {**weights, "b": array(24, seed=4)}, 8))))


def test_choosing(save: Save) -> None:
    node = helper.make_node(
        "QLinearWhere", ["chosen", *numbers("q"), *numbers("other"), "r_s", "r_z"], ["r"], domain=MICROSOFT
    )
    chosen = np.random.default_rng(0).random((1, 4, 8, 8)) > 0.4
    weights = {
        "chosen": chosen,
        "other": integers(1, 4, 8, 8, kind=np.uint8),
        **quantizing("other", 0.03, 120),
    }
    agrees(save(layers([node], weights)))


def test_means_over_axes() -> None:
    """ONNX Runtime has no kernel for it on a CPU, so by its definition."""
    x = integers(2, 3, 4, 5, kind=np.uint8)
    node = helper.make_node(
        "QLinearReduceMean", [*numbers("x"), *numbers("y")[1:]], ["y"], axes=[1, 3], domain=MICROSOFT
    )
    model = build(
        [node],
        (2, 3, 4, 5),
        {**quantizing("x", 0.02, 3), **quantizing("y", 0.01, 7)},
        17,
        domains=[MICROSOFT],
    )
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    (got,) = evaluate(parse(model.SerializeToString(), "net.onnx"), {"x": torch.from_numpy(x)})
    mean = ((x.astype(np.float64) - 3) * 0.02).mean((1, 3), keepdims=True)
    assert np.abs(got.numpy().astype(float) - np.clip(np.round(mean / 0.01) + 7, 0, 255)).max() <= 1


def test_a_pool_with_channels_last() -> None:
    x = integers(2, 6, 5, 4)
    node = helper.make_node(
        "NhwcMaxPool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], domain=MICROSOFT
    )
    model = build([node], (2, 6, 5, 4), {}, 17, domains=[MICROSOFT])
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    (want,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    (got,) = evaluate(parse(model.SerializeToString(), "net.onnx"), {"x": torch.from_numpy(x)})
    np.testing.assert_array_equal(got.numpy(), want)


class Net(nn.Module):
    """A stem, a residual block, a depthwise convolution, a gate, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Hardsigmoid())
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 2)
        x = x + nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2.0)
        x = torch.relu(x + self.block(x))
        x = self.depth(x)
        x = x * self.gate(x)
        return self.head(x.mean((2, 3)))


class Images(CalibrationDataReader):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = iter([{"x": torch.randn(4, 3, 16, 16, generator=generator).numpy()} for _ in range(3)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.images, None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    torch.manual_seed(0)
    module, x = Net().eval(), torch.randn(1, 3, 16, 16)
    torch.onnx.export(
        module, (x,), path, opset_version=17, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N"}}
    )
    return path


STATIC: dict[str, dict[str, Any]] = {
    "pairs": {"quant_format": QuantFormat.QDQ},
    "pairs per channel, signed": {
        "quant_format": QuantFormat.QDQ, "per_channel": True, "activation_type": QuantType.QInt8,
    },
    "operators": {"quant_format": QuantFormat.QOperator},
    "operators per channel": {"quant_format": QuantFormat.QOperator, "per_channel": True},
    "16 bits": {
        "quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt16,
        "extra_options": {"UseQDQContribOps": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("how", STATIC)
@pytest.mark.parametrize("optimized", ["", "extended", "all"])
def test_a_network_quantized_by_onnx_runtime(
    exported: Path, tmp_path: Path, how: str, optimized: str
) -> None:
    path = tmp_path / "quantized.onnx"
    quantize_static(exported, path, Images(), **STATIC[how])
    source = agrees(optimize(path, tmp_path / "optimized.onnx", optimized) if optimized else path, steps=3)
    explained(source)


@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8])
def test_a_network_quantized_dynamically(exported: Path, tmp_path: Path, kind: QuantType) -> None:
    path = tmp_path / "quantized.onnx"
    # ONNX Runtime convolves with unsigned weights only.
    chosen = ["MatMul", "Gemm"] if kind == QuantType.QInt8 else None
    quantize_dynamic(exported, path, weight_type=kind, op_types_to_quantize=chosen)
    explained(agrees(path, steps=4))


def optimize(path: Path, target: Path, level: str) -> Path:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if level == "all" else levels.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return target


@pytest.mark.parametrize("level", ["extended", "all"])
def test_a_float_network_optimized_by_onnx_runtime(exported: Path, tmp_path: Path, level: str) -> None:
    from onnx_files import agrees as agrees_exactly

    path = optimize(exported, tmp_path / "optimized.onnx", level)
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert "com.microsoft.nchwc" in domains if level == "all" else MICROSOFT in domains
    explained(agrees_exactly(path))


@pytest.mark.parametrize("factor", [2, 4])
def test_nearest_pixels_in_the_optimizers_own_layout(save: Save, tmp_path: Path, factor: int) -> None:
    """It repeats every pixel, and no longer says which rounding of coordinates that is."""
    from onnx_files import agrees as agrees_exactly

    kernels = [array(16, c, 3, 3, seed=c) for c in (3, 16)]
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node(
            "Resize",
            ["a", "", "scales"],
            ["b"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        helper.make_node("Conv", ["b", "second"], ["y"], pads=[1, 1, 1, 1]),
    ]
    scales = np.array([1, 1, factor, factor], dtype=np.float32)
    model = build(
        nodes, ("N", 3, 6, 6), {"first": kernels[0], "second": kernels[1], "scales": scales}, opset=13
    )
    path = optimize(save(model), tmp_path / "optimized.onnx", "all")
    assert ("Upsample", "com.microsoft.nchwc") in {(n.op_type, n.domain) for n in onnx.load(path).graph.node}
    agrees_exactly(path)


@pytest.mark.parametrize("how", ["pairs", "operators"])
@pytest.mark.parametrize("composite", ["EpsilonPlus", "EpsilonPlusFlat", "EpsilonGammaBox", "auto"])
def test_relevance_is_that_of_the_network_before(
    exported: Path, tmp_path: Path, how: str, composite: str
) -> None:
    """Up to what the rounding does: in the same direction, with the same sum."""
    path = tmp_path / "quantized.onnx"
    quantize_static(exported, path, Images(), **STATIC[how])
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    found = []
    for file in (exported, path):
        source = read(file)
        network = capture(source.module, (source.example,))
        explainer = Explainer(network, composite=composite, device="cpu", dtype=torch.float64)
        found.append(explainer.explain(x, target=1))
    floats, rounded = (each.relevance.flatten(1) for each in found)
    assert float(torch.cosine_similarity(floats, rounded).min()) > 0.97


def test_the_score_before_a_softmax_that_is_rounded_is_explained(save: Save) -> None:
    nodes = [
        helper.make_node("Softmax", ["y"], ["s"], axis=1),
        helper.make_node("QuantizeLinear", ["s", "s_s", "s_z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s_s", "s_z"], ["out"]),
    ]
    model = classifier([helper.make_node("Relu", ["f"], ["g"])], quantizing("s", 1 / 256, 0), 17)
    model.graph.node.extend(nodes)
    model.graph.output[0].name = "out"
    source = read(save(model))
    explainer = Explainer(capture(source.module, (source.example,)), device="cpu")
    assert any("score before the final softmax" in note for note in explainer.notes)


def test_integers_without_their_floats_are_refused(save: Save) -> None:
    """Dequantized by another scale than they were quantized by."""
    nodes = [
        helper.make_node("QuantizeLinear", ["f", "q_s", "q_z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "r_s", "q_z"], ["g"]),
    ]
    model = classifier(nodes, {**quantizing("q", 0.02, 3), **quantizing("r", 0.03, 3)}, 17)
    with pytest.raises(UnsupportedOperator, match="not quantized by the same scale"):
        read(save(model))


def test_a_quantized_output_stays_an_integer_and_is_refused_by_capture(save: Save) -> None:
    """Nothing dequantizes it, so there is no float to explain."""
    nodes = [helper.make_node("QuantizeLinear", ["x", "q_s", "q_z"], ["y"])]
    source = read(save(build(nodes, ("N", 3, 4, 4), quantizing("q", 0.1, 3))))
    assert source.module(torch.from_numpy(array(2, 3, 4, 4))).dtype == torch.uint8
