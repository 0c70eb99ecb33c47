"""Tiny ONNX files made on the spot, and the one question that most tests ask of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from fusion import capture
from lrp import Explainer
from models.formats.onnx import OnnxSource, read


def build(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str | None],
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    opset: int = 17,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model from image `x` to the output `y`."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(
        graph, opset_imports=imports, ir_version=8 if opset < 20 else 10, functions=functions
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))


def agrees(
    path: Path, tolerance: float = 1e-5, size: tuple[int, int] | None = None, batched: bool = True
) -> OnnxSource:
    """Read a file; check it against ONNX Runtime, sample by sample, and through capture."""
    source = read(path, size=size)
    x = torch.randn(3, *source.example.shape[1:], generator=torch.Generator().manual_seed(0))
    want = source.original(x)
    with torch.no_grad():
        got = source.module(x)
        assert relative(got.float(), want) <= tolerance
        if batched:
            single = torch.cat([source.module(x[i : i + 1]) for i in range(3)])
            assert relative(single.float(), want) <= tolerance
            network = capture(source.module, (source.example,))
            assert relative(network(x).float(), got.float()) <= 1e-6
    return source


def array(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.4).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


def classifier(
    layers: Sequence[onnx.NodeProto],
    weights: Mapping[str, np.ndarray[Any, Any]],
    opset: int,
    channels: int = 4,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Of images [N, 3, 8, 8]: a convolution and a ReLU, the layers from `f` [N, 4, 8, 8] to `g` [N, channels, ...], the
    mean over space, three classes."""
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["f"]),
        *layers,
        helper.make_node("GlobalAveragePool", ["g"], ["p"]),
        helper.make_node("Flatten", ["p"], ["pooled"]),
        helper.make_node("Gemm", ["pooled", "head"], ["y"]),
    ]
    own = {"stem": array(4, 3, 3, 3, seed=1), "head": array(channels, 3, seed=2)}
    return build(nodes, ("N", 3, 8, 8), {**own, **weights}, opset, domains=domains)


def explained(source: OnnxSource, tolerance: float = 1e-9) -> None:
    """Every unit of relevance is at the input or accounted for (the explainer raises where it is not)."""
    network = capture(source.module, (source.example,))
    x = torch.randn(2, *source.example.shape[1:], generator=torch.Generator().manual_seed(1))
    found = Explainer(network, composite="EpsilonPlus", device="cpu", dtype=torch.float64).explain(x)
    assert found.ledger is not None
    assert float(found.ledger.error.max()) <= tolerance
    assert float(found.relevance.abs().max()) > 0
