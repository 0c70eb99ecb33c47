"""Every operator that needs care, in one-node files, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import agrees, build

Save = Callable[[onnx.ModelProto], Path]
IMAGE = ("N", 6, 9, 8)


def array(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


def one(
    op: str, opset: int, attributes: dict[str, Any] | None = None, **weights: np.ndarray[Any, Any]
) -> onnx.ModelProto:
    node = helper.make_node(op, ["x", *weights], ["y"], **(attributes or {}))
    return build([node], IMAGE, weights, opset)


@pytest.mark.parametrize("opset", [7, 11, 22])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [1, 1, 1, 1]},
        {"pads": [0, 1, 2, 1], "strides": [2, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {"auto_pad": "VALID", "dilations": [2, 2]},
        {"group": 3, "pads": [1, 1, 1, 1]},
    ],
)
def test_conv(save: Save, opset: int, attributes: dict[str, Any]) -> None:
    weight = array(6, 6 // attributes.get("group", 1), 3, 3)
    source = agrees(save(one("Conv", opset, attributes, w=weight, b=array(6))))
    assert source.module is not None


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        {"strides": [2, 2], "pads": [0, 1, 1, 1]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "output_shape": [17, 16]},
        {"group": 2, "dilations": [2, 2]},
    ],
)
def test_conv_transpose(save: Save, attributes: dict[str, Any]) -> None:
    agrees(
        save(
            one("ConvTranspose", 17, attributes, w=array(6, 4, 3, 3), b=array(4 * attributes.get("group", 1)))
        )
    )


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("opset", [10, 12, 19])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]},
    ],
)
def test_pools(save: Save, op: str, opset: int, attributes: dict[str, Any]) -> None:
    agrees(save(one(op, opset, attributes)))


@pytest.mark.parametrize("pads", [[1, 1, 1, 1], [0, 1, 1, 0]])
def test_average_pool_counting_its_padding(save: Save, pads: list[int]) -> None:
    agrees(save(one("AveragePool", 17, {"kernel_shape": [3, 3], "pads": pads, "count_include_pad": 1})))


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pools(save: Save, op: str) -> None:
    agrees(save(one(op, 17)))


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_normalization(save: Save, opset: int) -> None:
    model = one(
        "BatchNormalization",
        opset,
        {"epsilon": 1e-3},
        s=array(6),
        b=array(6),
        m=array(6),
        v=array(6) ** 2 + 0.1,
    )
    agrees(save(model))


@pytest.mark.parametrize(
    ("op", "opset", "attributes", "weights"),
    [
        ("InstanceNormalization", 17, {}, {"s": array(6), "b": array(6)}),
        ("LayerNormalization", 17, {"axis": -1}, {"s": array(8), "b": array(8)}),
        ("LayerNormalization", 17, {"axis": 1}, {"s": array(6, 9, 8), "b": array(6, 9, 8)}),
        ("GroupNormalization", 21, {"num_groups": 3}, {"s": array(6), "b": array(6)}),
        ("LRN", 13, {"size": 5, "alpha": 0.1}, {}),
        ("LpNormalization", 7, {"axis": 1}, {}),
    ],
)
def test_normalizations(
    save: Save, op: str, opset: int, attributes: dict[str, Any], weights: dict[str, Any]
) -> None:
    agrees(save(one(op, opset, attributes, **weights)))


@pytest.mark.parametrize(
    ("op", "opset", "attributes"),
    [
        *(
            (op, 17, {})
            for op in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Selu", "Celu", "HardSigmoid")
        ),
        *(
            (op, 17, {})
            for op in ("HardSwish", "Softplus", "Softsign", "Erf", "ThresholdedRelu", "Identity", "Dropout")
        ),
        ("HardSigmoid", 17, {"alpha": 1 / 6, "beta": 0.5}),
        ("Gelu", 20, {}),
        ("Gelu", 20, {"approximate": "tanh"}),
        ("Mish", 18, {}),
        ("Clip", 7, {"min": 0.0, "max": 6.0}),
        ("Clip", 7, {"min": -0.5}),
        ("Dropout", 7, {"ratio": 0.5}),
        *(
            (op, opset, {"axis": axis})
            for op in ("Softmax", "LogSoftmax")
            for opset in (7, 13)
            for axis in (1, 2, 3)
        ),
        *((op, 17, {}) for op in ("Abs", "Exp", "Neg", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos")),
    ],
)
def test_activations(save: Save, op: str, opset: int, attributes: dict[str, Any]) -> None:
    agrees(save(one(op, opset, attributes)))


def test_clip_with_bounds_as_inputs_is_a_relu6(save: Save) -> None:
    agrees(save(one("Clip", 13, low=np.float32(0), high=np.float32(6))))


@pytest.mark.parametrize("slope", [array(1), array(6, 1, 1), array(6, 9, 8), array(1, 6, 1, 1)])
def test_prelu(save: Save, slope: np.ndarray[Any, Any]) -> None:
    agrees(save(one("PRelu", 16, slope=slope)))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("other", [np.float32(0.7), array(6, 1, 1), array(1, 6, 9, 8)])
def test_arithmetic(save: Save, op: str, other: np.ndarray[Any, Any]) -> None:
    agrees(save(one(op, 7, c=other)))


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
def test_variadic(save: Save, op: str) -> None:
    agrees(save(one(op, 13, a=array(6, 1, 1), b=array(1, 8))))


@pytest.mark.parametrize(
    "op", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceLogSumExp"]
)
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions(save: Save, op: str, keep: int) -> None:
    if op != "ReduceSum":
        agrees(save(one(op, 11, {"axes": [2, 3], "keepdims": keep})))
    agrees(save(one(op, 18, {"keepdims": keep}, axes=ints(-1, -2))))


@pytest.mark.parametrize(
    ("op", "opset", "attributes", "weights"),
    [
        ("Flatten", 9, {}, {}),
        ("Flatten", 13, {"axis": -3}, {}),
        ("Transpose", 13, {"perm": [0, 2, 3, 1]}, {}),
        ("Reshape", 13, {}, {"shape": ints(0, 3, 2, -1)}),
        ("Reshape", 13, {}, {"shape": ints(-1, 432)}),
        ("Unsqueeze", 11, {"axes": [1]}, {}),
        ("Unsqueeze", 13, {}, {"axes": ints(-1)}),
        ("Slice", 7, {"axes": [2], "starts": [1], "ends": [-2]}, {}),
        ("Slice", 13, {}, {"s": ints(0), "e": ints(2**62), "a": ints(3), "t": ints(2)}),
        ("Slice", 13, {}, {"s": ints(-1), "e": ints(-(2**62)), "a": ints(1), "t": ints(-1)}),
        ("Pad", 7, {"pads": [0, 1, 0, 2, 0, 0, 1, 0], "value": 0.5}, {}),
        ("Pad", 13, {}, {"pads": ints(0, 0, 1, 2, 0, 0, 0, 1)}),
        ("Pad", 13, {"mode": "reflect"}, {"pads": ints(0, 0, 1, 2, 0, 0, 0, 1)}),
        ("Pad", 18, {"mode": "edge"}, {"pads": ints(1, 1), "value": np.float32(0), "axes": ints(3)}),
        ("Gather", 13, {"axis": 1}, {"i": np.array(2, dtype=np.int64)}),
        ("Gather", 13, {"axis": 1}, {"i": ints(4, 0, -1)}),
        ("Gather", 13, {"axis": 3}, {"i": ints(2, 3, 4)}),
        ("Tile", 13, {}, {"r": ints(1, 2, 1, 1)}),
        ("DepthToSpace", 13, {"blocksize": 1}, {}),
        ("CumSum", 14, {"reverse": 1}, {"axis": np.array(3, dtype=np.int64)}),
        ("Upsample", 9, {"mode": "nearest"}, {"s": np.array([1, 1, 2, 2], dtype=np.float32)}),
        ("Resize", 13, {"mode": "nearest"}, {"r": array(0), "s": np.array([1, 1, 2, 2], dtype=np.float32)}),
        ("Resize", 13, {"mode": "linear"}, {"r": array(0), "s": np.array([1, 1, 2, 2], dtype=np.float32)}),
        ("Trilu", 14, {"upper": 0}, {}),
    ],
)
def test_shapes(save: Save, op: str, opset: int, attributes: dict[str, Any], weights: dict[str, Any]) -> None:
    agrees(save(one(op, opset, attributes, **weights)))


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0, "transB": 1}])
@pytest.mark.parametrize("bias", [array(5), array(1, 5), np.float32([0.3])])
def test_gemm_becomes_one_linear_layer(
    save: Save, attributes: dict[str, Any], bias: np.ndarray[Any, Any]
) -> None:
    weight = array(5, 432) if attributes.get("transB") else array(432, 5)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"], **attributes),
    ]
    source = agrees(save(build(nodes, IMAGE, {"w": weight, "b": bias}, 13)))
    assert ops(source) == ["flatten", "linear"]


@pytest.mark.parametrize("order", [("m", "b"), ("b", "m")])
def test_matmul_and_add_become_one_linear_layer(save: Save, order: tuple[str, str]) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", order, ["y"])]
    assert ops(agrees(save(build(nodes, IMAGE, {"w": array(8, 5), "b": array(5)}, 13)))) == ["linear"]


@pytest.mark.parametrize("half", ["first", "middle", "last"])
@pytest.mark.parametrize("inner", ["Div", "Mul"])
def test_gelu_written_out_becomes_one_node(save: Save, half: str, inner: str) -> None:
    root = np.float32(2**0.5 if inner == "Div" else 0.5**0.5)
    nodes = [
        helper.make_node(inner, ["x", "root"], ["s"]),
        helper.make_node("Erf", ["s"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["p"]),
    ]
    rest = {
        "first": [("x", "half", "h"), ("h", "p", "y")],
        "middle": [("p", "half", "h"), ("x", "h", "y")],
        "last": [("x", "p", "h"), ("h", "half", "y")],
    }[half]
    nodes += [helper.make_node("Mul", [a, b], [c]) for a, b, c in rest]
    weights = {"root": root, "one": np.float32(1), "half": np.float32(0.5)}
    assert ops(agrees(save(build(nodes, IMAGE, weights, 13)))) == ["gelu"]


def test_silu_written_out_becomes_one_node(save: Save) -> None:
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    assert ops(agrees(save(build(nodes, IMAGE, {}, 13)))) == ["silu"]


def test_symmetric_padding_stays_inside_the_convolution(save: Save) -> None:
    even = one("Conv", 13, {"pads": [1, 1, 1, 1]}, w=array(6, 6, 3, 3))
    uneven = one("Conv", 13, {"pads": [0, 1, 1, 1]}, w=array(6, 6, 3, 3))
    assert ops(agrees(save(even))) == ["conv2d"]
    assert ops(agrees(save(uneven))) == ["constant_pad_nd", "conv2d"]


def test_what_a_pool_pads_with_is_no_weight(save: Save) -> None:
    nodes = [
        helper.make_node("Pad", ["x", "pads", "least"], ["p"]),
        helper.make_node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3], strides=[2, 2]),
    ]
    weights = {"pads": ints(0, 0, 1, 1, 0, 0, 1, 1), "least": np.array(-np.inf, dtype=np.float32)}
    agrees(save(build(nodes, IMAGE, weights)))


def test_weights_standardized_in_the_file(save: Save) -> None:
    """torch's exporter writes weight standardization as a batch normalization in training mode, of the weights."""
    own = {"scale": array(5, seed=1), "zeros": np.zeros(5, np.float32), "ones": np.ones(5, np.float32)}
    standardized = helper.make_node(
        "BatchNormalization",
        ["w", "scale", "zeros", "zeros", "ones"],
        ["s", "mean", "var"],
        training_mode=1,
        epsilon=1e-4,
    )
    nodes = [
        helper.make_node("Reshape", ["kernel", "flat"], ["w"]),
        standardized,
        helper.make_node("Reshape", ["s", "back"], ["k"]),
        helper.make_node("Conv", ["x", "k", "mean"], ["y"]),
    ]
    weights = {"kernel": array(5, 6, 3, 3) + 1, "flat": ints(1, 5, -1), "back": ints(5, 6, 3, 3), **own}
    assert ops(agrees(save(build(nodes, IMAGE, weights)))) == ["conv2d"]


def ops(source: Any) -> list[str]:
    from fusion import capture

    return [layer.op for layer in capture(source.module, (source.example,)).layers()]
