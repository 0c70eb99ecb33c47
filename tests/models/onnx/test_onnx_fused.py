"""What ONNX Runtime's optimizer leaves in a file (domain com.microsoft), against ONNX Runtime on random images."""

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
from onnx_files import agrees, array, classifier, explained, ints, relative
from torch.nn import functional as F

from fusion import capture
from fusion.errors import UnsupportedOperator
from models.formats.onnx import OnnxSource, read
from models.formats.onnx.file import parse
from models.formats.onnx.folding import evaluate

Save = Callable[[onnx.ModelProto], Path]
MICROSOFT = "com.microsoft"


def fused(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), domain=MICROSOFT, **attributes)


def small(layers: Sequence[onnx.NodeProto], weights: dict[str, Any], channels: int = 4) -> onnx.ModelProto:
    return classifier(layers, weights, 17, channels, [MICROSOFT])


def tokens(layers: Sequence[onnx.NodeProto], weights: dict[str, Any], channels: int = 8) -> onnx.ModelProto:
    """With the layers on tokens, from `t` [N, 64, 4] to `u` [N, 64, channels]."""
    nodes = [
        helper.make_node("Reshape", ["f", "rows"], ["l"]),
        helper.make_node("Transpose", ["l"], ["t"], perm=[0, 2, 1]),
        *layers,
        helper.make_node("Transpose", ["u"], ["g"], perm=[0, 2, 1]),
    ]
    return small(nodes, {"rows": ints(0, 4, 64), **weights}, channels)


def ops(source: OnnxSource) -> list[str]:
    return [layer.op for layer in capture(source.module, (source.example,)).layers()]


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [
        ("Relu", []),
        ("Sigmoid", []),
        ("Tanh", []),
        ("LeakyRelu", [0.2]),
        ("Clip", [-0.3, 0.5]),
        ("HardSigmoid", [0.2, 0.5]),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_convolution(save: Save, activation: str, parameters: list[float], residual: bool) -> None:
    inputs = ["f", "w", "b", "f"] if residual else ["f", "w", "b"]
    settings = {"activation_params": parameters} if parameters else {}
    node = fused("FusedConv", inputs, ["g"], pads=[1, 1, 1, 1], activation=activation, **settings)
    explained(agrees(save(small([node], {"w": array(4, 4, 3, 3), "b": array(4, seed=3)}))))


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.3}, {"alpha": 0.3, "transB": 1}])
def test_product_with_a_weight_is_one_linear_layer(save: Save, attributes: dict[str, Any]) -> None:
    node = fused("FusedMatMul", ["t", "w"], ["m"], **attributes)
    bias = helper.make_node("Add", ["m", "b"], ["u"])
    weight = array(8, 4) if attributes.get("transB") else array(4, 8)
    source = agrees(save(tokens([node, bias], {"w": weight, "b": array(8, seed=3)})))
    assert ops(source).count("linear") == 2
    assert "matmul" not in ops(source)
    explained(source)


@pytest.mark.parametrize("attributes", [{"transB": 1}, {"transA": 1, "alpha": 0.2}])
def test_product_of_two_signals(save: Save, attributes: dict[str, Any]) -> None:
    nodes = [
        fused("FusedMatMul", ["t", "t"], ["m"], **attributes),
        helper.make_node("Softmax", ["m"], ["s"], axis=-1),
        helper.make_node("MatMul", *([["s", "t"]] if "transB" in attributes else [["t", "s"]]), ["u"]),
    ]
    explained(agrees(save(tokens(nodes, {}, channels=4))))


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu"])
def test_dense_layer(save: Save, activation: str) -> None:
    nodes = [
        helper.make_node("Flatten", ["f"], ["flat"]),
        fused(
            "FusedGemm",
            ["flat", "w", "b"],
            ["d"],
            transB=1,
            alpha=0.5,
            activation=activation,
            activation_alpha=0.1,
        ),
        helper.make_node("Unsqueeze", ["d", "axis"], ["g"]),
    ]
    weights = {"w": array(6, 256), "b": array(6, seed=3), "axis": ints(2)}
    explained(agrees(save(small(nodes, weights, channels=6))))


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "layer"),
    [
        ("BiasGelu", ["t", "b"], {}, "gelu"),
        ("FastGelu", ["t", "b"], {}, "gelu"),
        ("FastGelu", ["t"], {}, "gelu"),
        ("Gelu", ["t"], {}, "gelu"),
        ("QuickGelu", ["t"], {"alpha": 1.0}, "silu"),
        ("QuickGelu", ["t"], {}, "sigmoid"),
    ],
)
def test_activations(save: Save, op: str, inputs: list[str], attributes: dict[str, Any], layer: str) -> None:
    source = agrees(save(tokens([fused(op, inputs, ["u"], **attributes)], {"b": array(4)}, channels=4)))
    assert layer in ops(source)
    explained(source)


@pytest.mark.parametrize("axis", [2, 3])
def test_softmax_with_a_bias(axis: int) -> None:
    """ONNX Runtime has it on a GPU only, so by its definition: over all axes from one on."""
    x, bias = torch.from_numpy(array(2, 3, 4, 5)), torch.from_numpy(array(2, 1, 1, 5, seed=1))
    got = by_itself(
        fused("BiasSoftmax", ["x", "b"], ["y"], axis=axis, is_inner_broadcast=0), {"x": x, "b": bias}
    )
    torch.testing.assert_close(got, torch.softmax((x + bias).flatten(axis), -1).reshape(x.shape))


@pytest.mark.parametrize(
    ("op", "weights"),
    [
        ("SkipLayerNormalization", ["gamma"]),
        ("SkipLayerNormalization", ["gamma", "beta"]),
        ("SkipLayerNormalization", ["gamma", "beta", "bias"]),
        ("SkipSimplifiedLayerNormalization", ["gamma"]),
        ("SkipSimplifiedLayerNormalization", ["gamma", "bias"]),
    ],
)
def test_norms_of_residual_sums(save: Save, op: str, weights: list[str]) -> None:
    """The norm, and the sum itself for the next residual."""
    nodes = [
        helper.make_node("MatMul", ["t", "w"], ["m"]),
        fused(op, ["m", "t", *weights], ["n", "", "", "total"], epsilon=1e-5),
        helper.make_node("Add", ["n", "total"], ["u"]),
    ]
    values = {name: array(4, seed=i) for i, name in enumerate(weights, start=5)}
    source = agrees(save(tokens(nodes, {"w": array(4, 4, seed=3), **values}, channels=4)))
    assert ("rms_norm" if "Simplified" in op else "layer_norm") in ops(source)
    explained(source)


@pytest.mark.parametrize("op", ["LayerNormalization", "SimplifiedLayerNormalization"])
def test_norms_in_files_older_than_they_are(save: Save, op: str) -> None:
    """The optimizer writes them into any version of the standard, in the standard's name."""
    nodes = [
        helper.make_node("Reshape", ["f", "rows"], ["t"]),
        helper.make_node(op, ["t", "gamma"], ["u"], axis=-1, epsilon=1e-5),
        helper.make_node("Reshape", ["u", "back"], ["g"]),
    ]
    weights = {"rows": ints(0, 64, 4), "back": ints(0, 4, 64), "gamma": array(4, seed=3)}
    explained(agrees(save(classifier(nodes, weights, 12))))


HEADS = {"num_heads": 2}


@pytest.mark.parametrize(
    "attributes", [{}, {"scale": 0.3}, {"unidirectional": 1}, {"qkv_hidden_sizes": [8, 8, 6]}]
)
def test_attention(save: Save, attributes: dict[str, Any]) -> None:
    channels = attributes.get("qkv_hidden_sizes", [8, 8, 8])
    node = fused("Attention", ["t", "w", "b"], ["u"], **HEADS, **attributes)
    weights = {"w": array(4, sum(channels)), "b": array(sum(channels), seed=3)}
    source = agrees(save(tokens([node], weights, channels=channels[-1])))
    assert "scaled_dot_product_attention" in ops(source)
    explained(source)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_attention_with_projections_of_its_own(save: Save, bias: bool, positions: bool) -> None:
    inputs = ["q", "k", "v", "b" if bias else "", "", "place" if positions else ""]
    while not inputs[-1]:
        inputs.pop()
    nodes = [
        *(helper.make_node("MatMul", ["t", f"w{k}"], [k]) for k in "qkv"),
        fused("MultiHeadAttention", inputs, ["u"], **HEADS),
    ]
    weights: dict[str, Any] = {f"w{k}": array(4, 8, seed=i) for i, k in enumerate("qkv", start=3)}
    weights |= {"b": array(24, seed=7)} if bias else {}
    weights |= {"place": array(1, 2, 64, 64, seed=8)} if positions else {}
    explained(agrees(save(tokens(nodes, weights))))


def test_attention_with_everything_in_one_tensor() -> None:
    """[N, L, heads, 3, E]: ONNX Runtime has it on a GPU only, so by its definition."""
    x = torch.from_numpy(array(2, 5, 2, 3, 4))
    node = fused("MultiHeadAttention", ["x"], ["y"], **HEADS)
    got = by_itself(node, {"x": x})
    query, key, value = x.permute(3, 0, 2, 1, 4)
    want = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, want)


def test_attention_with_keys_and_values_in_one_tensor() -> None:
    query, packed = torch.from_numpy(array(2, 5, 8)), torch.from_numpy(array(2, 7, 2, 2, 4, seed=1))
    got = by_itself(fused("MultiHeadAttention", ["q", "kv"], ["y"], **HEADS), {"q": query, "kv": packed})
    key, value = packed.permute(3, 0, 2, 1, 4)
    want = F.scaled_dot_product_attention(query.reshape(2, 5, 2, 4).transpose(1, 2), key, value)
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2))


def some_keys(*shape: int) -> np.ndarray[Any, Any]:
    """A mask with zeros, and at least one key to be seen."""
    mask = np.random.default_rng(0).integers(0, 2, shape).astype(np.int32)
    mask[..., 0] = 1
    return mask


MASKS = {
    "which keys": some_keys(1, 64),
    "which keys of each query": some_keys(1, 64, 64),
    "how many keys": np.array([50], np.int32),
}


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", [*MASKS, "from where to where"])
def test_attention_with_a_mask(save: Save, mask: str, causal: int) -> None:
    masks = {**MASKS, "from where to where": np.array([50, 3 - 3 * causal], np.int32)}
    node = fused("Attention", ["t", "w", "b", "mask"], ["u"], unidirectional=causal, **HEADS)
    weights = {"w": array(4, 24), "b": array(24, seed=3), "mask": masks[mask]}
    path = save(tokens([node], weights))
    explained(read(path))
    assert_one_by_one(path)


@pytest.mark.parametrize("bias", [False, True])
def test_attention_of_its_own_projections_with_a_mask(save: Save, bias: bool) -> None:
    inputs = ["q", "k", "v", "", "mask", *(["place"] if bias else [])]
    nodes = [
        *(helper.make_node("MatMul", ["t", f"w{k}"], [k]) for k in "qkv"),
        fused("MultiHeadAttention", inputs, ["u"], mask_filter_value=-1000.0, **HEADS),
    ]
    weights: dict[str, Any] = {f"w{k}": array(4, 8, seed=i) for i, k in enumerate("qkv", start=3)}
    weights |= {"mask": some_keys(1, 64), "place": array(1, 2, 64, 64, seed=8)}
    assert_one_by_one(save(tokens(nodes, weights)))


def assert_one_by_one(path: Path) -> None:
    """Against ONNX Runtime image by image: it takes a mask for one image with one image only."""
    source = read(path)
    x = torch.randn(3, *source.example.shape[1:], generator=torch.Generator().manual_seed(0))
    want = torch.cat([source.original(image[None]) for image in x])
    assert relative(source.module(x), want) < 1e-5


@pytest.mark.parametrize(
    ("inputs", "attributes", "words"),
    [
        (["t", "w", "b", "", "past"], {}, "with a past"),
        (["t", "w", "b"], {"do_rotary": 1}, "rotary positions"),
        (["t", "w", "b", "wide"], {}, "with a mask of 4 dimensions"),
        (["t", "w", "b", "three"], {}, "with a mask of 3 numbers"),
    ],
)
def test_what_language_models_do_with_attention_is_refused(
    save: Save, inputs: list[str], attributes: dict[str, Any], words: str
) -> None:
    node = fused("Attention", inputs, ["u"], **HEADS, **attributes)
    weights = {"w": array(4, 24), "b": array(24), "past": array(2, 1, 2, 3, 4)}
    weights |= {"wide": np.ones((1, 1, 64, 64), np.int32), "three": np.ones(3, np.int32)}
    with pytest.raises(UnsupportedOperator, match=rf"com\.microsoft::Attention .* {words}"):
        read(save(tokens([node], weights)))


def test_an_attribute_that_is_not_known_is_refused(save: Save) -> None:
    node = fused("QuickGelu", ["t"], ["u"], beta=1.0)
    with pytest.raises(UnsupportedOperator, match=r"com\.microsoft::QuickGelu .* with the attribute 'beta'"):
        read(save(tokens([node], {}, channels=4)))


def test_an_operator_that_is_not_known_is_refused(save: Save) -> None:
    node = fused("QMoE", ["t"], ["u"])
    with pytest.raises(UnsupportedOperator, match=r"com\.microsoft::QMoE"):
        read(save(tokens([node], {}, channels=4)))


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_grid_sample(mode: str) -> None:
    node = fused("GridSample", ["x", "grid"], ["y"], mode=mode, padding_mode="border", align_corners=1)
    values = {"x": array(2, 3, 5, 6), "grid": np.random.default_rng(0).uniform(-1.2, 1.2, (2, 4, 3, 2))}
    given = {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}
    torch.testing.assert_close(by_itself(node, given), by_runtime(node, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("last", [0, 1])
def test_group_norms(activation: int, last: int) -> None:
    """ONNX Runtime has them on a GPU only, so by their definition: the sum, the norm, SiLU."""
    x, skip, gamma, beta, bias = (
        torch.from_numpy(array(*shape, seed=i)) for i, shape in enumerate([(2, 6, 4, 5)] * 2 + [(6,)] * 3)
    )
    settings = {"groups": 3, "activation": activation, "channels_last": last, "epsilon": 1e-3}

    def turned(t: torch.Tensor) -> torch.Tensor:
        return t.permute(0, 2, 3, 1) if last else t

    def want(t: torch.Tensor) -> torch.Tensor:
        y = F.group_norm(t, 3, gamma, beta, 1e-3)
        return turned(F.silu(y) if activation else y)

    given = {"x": turned(x), "gamma": gamma, "beta": beta}
    node = fused("GroupNorm", ["x", "gamma", "beta"], ["y"], **settings)
    torch.testing.assert_close(by_itself(node, given), want(x))
    if last:
        node = fused("SkipGroupNorm", ["x", "gamma", "beta", "skip", "bias"], ["y", "s"], **settings)
        total = x + skip + bias[:, None, None]
        given |= {"skip": turned(skip), "bias": bias}
        torch.testing.assert_close(by_itself(node, given), want(total))


def test_sums_and_gates_of_diffusion_models() -> None:
    """ONNX Runtime has them on a GPU only, so by their definition."""
    x, bias, skip = (torch.from_numpy(array(*s, seed=i)) for i, s in enumerate([(2, 5, 8), (8,), (2, 5, 8)]))
    torch.testing.assert_close(
        by_itself(fused("BiasAdd", ["x", "b", "s"], ["y"]), {"x": x, "b": bias, "s": skip}), x + bias + skip
    )
    signal, gate = (x + bias).chunk(2, -1)
    got = by_itself(fused("BiasSplitGelu", ["x", "b"], ["y"]), {"x": x, "b": bias})
    torch.testing.assert_close(got, signal * F.gelu(gate))


@pytest.mark.parametrize("activation", ["", "Relu"])
def test_convolution_with_channels_last(activation: str) -> None:
    """ONNX Runtime has it for half floats on ARM only, so by its definition."""
    settings = {"activation": activation} if activation else {}
    node = fused("NhwcFusedConv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1], strides=[2, 1], **settings)
    x, w, b = (torch.from_numpy(array(*s, seed=i)) for i, s in enumerate([(2, 6, 5, 4), (8, 4, 3, 2), (8,)]))
    want = F.conv2d(x.permute(0, 3, 1, 2), w, b, stride=(2, 1), padding=1).permute(0, 2, 3, 1)
    want = F.relu(want) if activation else want
    torch.testing.assert_close(by_itself(node, {"x": x, "w": w, "b": b}), want)


def model_of(node: onnx.NodeProto, given: dict[str, torch.Tensor]) -> bytes:
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, kind, value.shape) for name, value in given.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in node.output],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()


def by_itself(node: onnx.NodeProto, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The node's first output of values that are all given."""
    return evaluate(parse(model_of(node, given), "net.onnx"), given)[0]


def by_runtime(node: onnx.NodeProto, given: dict[str, torch.Tensor]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model_of(node, given))
    values = {name: value.contiguous().numpy() for name, value in given.items()}
    return torch.from_numpy(session.run(None, values)[0])
