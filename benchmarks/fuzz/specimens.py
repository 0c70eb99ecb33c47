"""The small valid files that fuzzing starts from: together they use most of what the readers read."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.fuzz.mutations import ARCHIVES_CHANGED, BYTES_CHANGED, MESSAGES_CHANGED, Mutation

SIDE = 8
_node = helper.make_node


@dataclass(frozen=True)
class Specimen:
    """A file's bytes, what it is read with, and what can be done to it."""

    name: str
    suffix: str
    data: bytes
    size: tuple[int, int] | None
    mutations: tuple[Mutation, ...]


def _array(*shape: int) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * 0.3).astype(np.float32)


def _ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


def _model(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, np.ndarray[Any, Any]],
    opset: int = 18,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> bytes:
    """A classifier of images [N, 3, 8, 8]; the nodes go from `x` to the features `f` [N, 4, ...]."""
    head = [
        _node("GlobalAveragePool", ["f"], ["p"]),
        _node("Flatten", ["p"], ["q"]),
        _node("Gemm", ["q", "head.weight", "head.bias"], ["y"], name="/head/Gemm", transB=1),
    ]
    graph = helper.make_graph(
        [*nodes, *head],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [
            numpy_helper.from_array(value, name)
            for name, value in {**weights, "head.weight": _array(3, 4), "head.bias": _array(3)}.items()
        ],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)
    model.metadata_props.add(key="labels", value="cat,dog,cow")
    onnx.checker.check_model(model)
    return model.SerializeToString()


def convolutional() -> bytes:
    """Convolutions, normalizations, pools, a residual sum, activations with and without parameters."""
    nodes = [
        _node("Conv", ["x", "c.weight", "c.bias"], ["a"], name="/c/Conv", pads=[1] * 4, kernel_shape=[3, 3]),
        _node("BatchNormalization", ["a", *"sbmv"], ["b_"], name="/bn/BatchNormalization", epsilon=1e-3),
        _node("Clip", ["b_", "zero", "six"], ["c"]),
        _node("MaxPool", ["c"], ["d"], kernel_shape=[2, 2], strides=[2, 2]),
        _node("ConvTranspose", ["d", "t.weight"], ["e"], strides=[2, 2]),
        _node("Add", ["e", "c"], ["g"]),
        _node("PRelu", ["g", "slope"], ["h"]),
        _node("Pad", ["h", "pads"], ["i"], mode="reflect"),
        _node("AveragePool", ["i"], ["j"], kernel_shape=[3, 3], strides=[1, 1]),
        _node("InstanceNormalization", ["j", "s", "b"], ["k"]),
        _node("Resize", ["k", "", "scales"], ["l"], mode="linear"),
        _node("HardSwish", ["l"], ["f"]),
    ]
    weights = {
        "c.weight": _array(4, 3, 3, 3),
        "c.bias": _array(4),
        **{key: np.abs(_array(4)) + 0.5 for key in "sbmv"},
        "zero": np.float32(0),
        "six": np.float32(6),
        "t.weight": _array(4, 4, 2, 2),
        "slope": np.abs(_array(4, 1, 1)),
        "pads": _ints(0, 0, 1, 1, 0, 0, 1, 1),
        "scales": np.array([1, 1, 2, 2], dtype=np.float32),
    }
    return _model(nodes, {key: np.asarray(value) for key, value in weights.items()})


def transformer() -> bytes:
    """Shape arithmetic, tokens, attention written out, a normalization over channels, GELU."""
    nodes = [
        _node("Shape", ["x"], ["s"]),
        _node("Gather", ["s", "first"], ["n"]),
        _node("Concat", ["n", "tail"], ["target"], axis=0),
        _node("Reshape", ["x", "target"], ["t"]),
        _node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
        _node("MatMul", ["u", "in.weight"], ["v"], name="/in/MatMul"),
        _node("LayerNormalization", ["v", "ln.weight", "ln.bias"], ["w"], axis=-1),
        _node("Split", ["w", "parts"], ["q_", "k_"], axis=2),
        _node("Transpose", ["k_"], ["kt"], perm=[0, 2, 1]),
        _node("MatMul", ["q_", "kt"], ["l"]),
        _node("Mul", ["l", "scale"], ["m"]),
        _node("Softmax", ["m"], ["o"], axis=-1),
        _node("MatMul", ["o", "w"], ["r"]),
        _node("Slice", ["r", "starts", "ends", "axes"], ["z"]),
        _node("Gelu", ["z"], ["g"]),
        _node("ReduceMean", ["g", "one"], ["h"], keepdims=1),
        _node("Transpose", ["h"], ["i"], perm=[0, 2, 1]),
        _node("Unsqueeze", ["i", "last"], ["f"]),
    ]
    weights = {
        "first": _ints(0),
        "tail": _ints(3, -1),
        "in.weight": _array(3, 4),
        "ln.weight": _array(4),
        "ln.bias": _array(4),
        "parts": _ints(2, 2),
        "scale": np.array(0.7, dtype=np.float32),
        "starts": _ints(0),
        "ends": _ints(32),
        "axes": _ints(1),
        "one": _ints(1),
        "last": _ints(3),
    }
    return _model(nodes, weights, opset=20)


def controlled() -> bytes:
    """A branch, a loop, a scan, functions, constants as attributes, a scattered update."""
    value = helper.make_tensor_value_info
    untyped = {name: value(name, TensorProto.FLOAT, None) for name in ("r", "e", "v_out", "acc")}
    then = helper.make_graph([_node("Relu", ["a"], ["r"])], "then", [], [untyped["r"]])
    other = helper.make_graph([_node("Neg", ["a"], ["e"])], "else", [], [untyped["e"]])
    body = helper.make_graph(
        [_node("Mul", ["v_in", "half"], ["v_out"]), _node("Identity", ["c_in"], ["c_out"])],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("c_in", TensorProto.BOOL, []),
            value("v_in", TensorProto.FLOAT, None),
        ],
        [value("c_out", TensorProto.BOOL, []), untyped["v_out"]],
    )
    imports = [helper.make_opsetid("", 18)]
    inner = helper.make_function(
        "own", "Inner", ["p"], ["q"], [_node("Elu", ["p"], ["q"])], imports, attributes=["alpha"]
    )
    outer = helper.make_function(
        "own",
        "Outer",
        ["p"],
        ["q"],
        [_node("Inner", ["p"], ["s"], domain="own", alpha=0.5), _node("Add", ["s", "p"], ["q"])],
        [*imports, helper.make_opsetid("own", 1)],
    )
    inner.node[0].attribute.append(
        onnx.AttributeProto(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    )
    nodes = [
        _node("Constant", [], ["half"], value=numpy_helper.from_array(np.array(0.5, dtype=np.float32))),
        _node("Constant", [], ["three"], value_int=3),
        _node("Conv", ["x", "c.weight"], ["a"], pads=[1] * 4),
        _node("If", ["yes"], ["b"], then_branch=then, else_branch=other),
        _node("Loop", ["three", "yes", "b"], ["d"], body=body),
        _node("Outer", ["d"], ["g"], domain="own"),
        _node("ConstantOfShape", ["shape"], ["ones"], value=helper.make_tensor("v", 1, [1], [1.0])),
        _node("Where", ["mask", "g", "ones"], ["h"]),
        _node("Expand", ["h", "shape"], ["i"]),
        _node("Tile", ["i", "repeats"], ["j"]),
        _node("Cast", ["j"], ["k"], to=1),
        _node("DepthToSpace", ["k"], ["m"], blocksize=2),
        _node("SpaceToDepth", ["m"], ["f"], blocksize=2),
    ]
    weights = {
        "c.weight": _array(4, 3, 3, 3),
        "yes": np.array(True),
        "shape": _ints(1, 4, 8, 8),
        "mask": np.array([True, False, True, True]).reshape(1, 4, 1, 1),
        "repeats": _ints(1, 1, 1, 1),
    }
    return _model(nodes, weights, functions=[inner, outer], domains=["own"])


def quantized() -> bytes:
    """Weights and activations as integers, in both spellings."""
    nodes = [
        _node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        _node("QLinearConv", ["xq", "xs", "xz", "w", "ws", "wz", "as", "az"], ["aq"], pads=[1] * 4),
        _node("DequantizeLinear", ["aq", "as", "az"], ["a"]),
        _node("Relu", ["a"], ["b"]),
        _node("QuantizeLinear", ["b", "as", "az"], ["bq"]),
        _node("DequantizeLinear", ["bq", "as", "az"], ["c"]),
        _node("DequantizeLinear", ["w2", "ws2", "wz2"], ["wd"], axis=0),
        _node("Conv", ["c", "wd"], ["f"]),
    ]
    random = np.random.default_rng(0)
    weights = {
        "xs": np.float32(0.02),
        "xz": np.uint8(128),
        "w": random.integers(-90, 90, (4, 3, 3, 3), dtype=np.int8),
        "ws": np.float32(0.004),
        "wz": np.int8(0),
        "as": np.float32(0.03),
        "az": np.uint8(120),
        "w2": random.integers(-90, 90, (4, 4, 1, 1), dtype=np.int8),
        "ws2": np.full(4, 0.005, dtype=np.float32),
        "wz2": np.zeros(4, dtype=np.int8),
    }
    return _model(nodes, {key: np.asarray(value) for key, value in weights.items()})


def recurrent() -> bytes:
    """An LSTM over rows, reductions, sums by letters, a normalization written out, a choice of the largest."""
    nodes = [
        _node("ReduceMean", ["x", "two"], ["a"], keepdims=0),
        _node("Transpose", ["a"], ["b"], perm=[2, 0, 1]),
        _node("LSTM", ["b", "W", "R", "B"], ["Y", "h", ""], hidden_size=4),
        _node("Squeeze", ["Y", "one"], ["c"]),
        _node("Einsum", ["c", "e"], ["d"], equation="tnc,cd->ntd"),
        _node("ReduceMean", ["d", "last"], ["m"]),
        _node("Sub", ["d", "m"], ["g"]),
        _node("Pow", ["g", "power"], ["p2"]),
        _node("ReduceMean", ["p2", "last"], ["i"]),
        _node("Add", ["i", "eps"], ["j"]),
        _node("Sqrt", ["j"], ["k"]),
        _node("Div", ["g", "k"], ["l"]),
        _node("TopK", ["l", "few"], ["n", "o"], axis=1),
        _node("Transpose", ["n"], ["r"], perm=[0, 2, 1]),
        _node("Unsqueeze", ["r", "three"], ["s"]),
        _node("GroupNormalization", ["s", "gs", "gb"], ["t"], num_groups=2),
        _node("Concat", ["t", "t"], ["u"], axis=2),
        _node("Flatten", ["u"], ["v"]),
        _node("Reshape", ["v", "back"], ["f"]),
    ]
    weights = {
        "two": _ints(2),
        "W": _array(1, 16, 3),
        "R": _array(1, 16, 4),
        "B": _array(1, 32),
        "one": _ints(1),
        "e": _array(4, 4),
        "last": _ints(-1),
        "power": np.array(2, dtype=np.float32),
        "eps": np.array(1e-5, dtype=np.float32),
        "few": _ints(3),
        "three": _ints(3),
        "gs": _array(4),
        "gb": _array(4),
        "back": _ints(0, 4, -1, 1),
    }
    return _model(nodes, weights, opset=21)


class _Net(nn.Module):
    """A convolutional network with a branch and a loop when it is scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.scales = [0.5, 1.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        if y.shape[2] > 4:
            y = torch.nn.functional.max_pool2d(y, 2)
        for scale in self.scales:
            y = y + torch.nn.functional.silu(y * scale)
        tokens = y.flatten(2).transpose(1, 2)
        tokens = tokens + torch.softmax(tokens @ tokens.transpose(1, 2) / 2.0, dim=-1) @ self.norm(tokens)
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


def _saved(script: Any) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(script, buffer, _extra_files={"labels.json": '{"labels": ["cat", "dog", "cow"]}'})
    return buffer.getvalue()


def traced() -> bytes:
    """TorchScript by example."""
    torch.manual_seed(0)
    return _saved(torch.jit.trace(_Net().eval(), torch.zeros(1, 3, SIDE, SIDE)))  # type: ignore[no-untyped-call]


def scripted() -> bytes:
    """TorchScript by its source."""
    torch.manual_seed(0)
    return _saved(torch.jit.script(_Net().eval()))


def frozen() -> bytes:
    """TorchScript whose weights are constants."""
    torch.manual_seed(0)
    return _saved(torch.jit.freeze(torch.jit.script(_Net().eval())))  # type: ignore[no-untyped-call]


_ONNX: tuple[Callable[[], bytes], ...] = (convolutional, transformer, controlled, quantized, recurrent)
_TORCHSCRIPT: tuple[Callable[[], bytes], ...] = (traced, scripted, frozen)


def specimens() -> tuple[Specimen, ...]:
    """All of them; two of the ONNX files for one of TorchScript, as users send them."""
    messages = BYTES_CHANGED + 2 * MESSAGES_CHANGED
    archives = BYTES_CHANGED + 2 * ARCHIVES_CHANGED
    onnx_files = [Specimen(make.__name__, ".onnx", make(), None, messages) for make in _ONNX]
    scripts = [Specimen(make.__name__, ".pt", make(), (SIDE, SIDE), archives) for make in _TORCHSCRIPT]
    return (*onnx_files, *scripts)
