"""Weights of eight-bit floats and of few bits are read as the numbers that they stand for, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import agrees, array, build, explained, ints

from fusion.errors import UnsupportedOperator
from models.formats.onnx import read
from models.formats.onnx.file import parse
from models.formats.onnx.folding import evaluate

Save = Callable[[onnx.ModelProto], Path]
node = helper.make_node


def dense(
    middle: Sequence[onnx.NodeProto], tensors: Sequence[TensorProto], domains: Sequence[str] = ()
) -> onnx.ModelProto:
    """From `p` [N, 48] to `y`: what images [N, 3, 4, 4] are in rows."""
    nodes = [node("Flatten", ["x"], ["p"]), *middle]
    model = build(nodes, ("N", 3, 4, 4), {}, 21, domains=domains)
    model.graph.initializer.extend(tensors)
    return model


def narrow(values: np.ndarray[Any, Any], kind: str, name: str) -> TensorProto:
    """A tensor of this kind of numbers."""
    data = ir.DataType[kind]
    return ir.to_proto(ir.tensor(values.astype(data.numpy()), dtype=data, name=name))


def full(values: np.ndarray[Any, Any], name: str) -> TensorProto:
    return numpy_helper.from_array(values, name)


@pytest.mark.parametrize("kind", ["FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"])
def test_floats_of_eight_bits(save: Save, kind: str) -> None:
    middle = [node("DequantizeLinear", ["w", "s"], ["v"]), node("MatMul", ["p", "v"], ["y"])]
    tensors = [narrow(array(48, 5), kind, "w"), full(np.float32(0.5), "s")]
    source = agrees(save(dense(middle, tensors)))
    assert f"{kind.lower()} weights: computed in float32" in source.notes
    explained(source)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
def test_integers_of_four_bits(save: Save, kind: str, block: int, zeros: bool) -> None:
    random = np.random.default_rng(0)
    low = -8 if kind == "INT4" else 0
    shape = (3, 5) if block else (5,)
    inputs = ["w", "s", "z"] if zeros else ["w", "s"]
    settings = {"axis": 0, "block_size": block} if block else {"axis": 1}
    middle = [node("DequantizeLinear", inputs, ["v"], **settings), node("MatMul", ["p", "v"], ["y"])]
    tensors = [
        narrow(random.integers(low, low + 16, (48, 5)), kind, "w"),
        full(random.uniform(0.1, 0.3, shape).astype(np.float32), "s"),
    ]
    tensors += [narrow(random.integers(low, low + 16, shape), kind, "z")] if zeros else []
    agrees(save(dense(middle, tensors)))


@pytest.mark.parametrize(
    ("bits", "columns", "size", "zeros"),
    [
        *((4, 48, 16, zeros) for zeros in ("none", "packed", "floats")),
        *((4, 40, 32, zeros) for zeros in ("none", "packed", "floats")),
        (8, 48, 16, "none"),
        (8, 48, 16, "packed"),
        (2, 48, 32, "none"),
        (2, 48, 32, "packed"),
    ],
)
def test_products_with_weights_of_few_bits(
    save: Save, bits: int, columns: int, size: int, zeros: str
) -> None:
    random = np.random.default_rng(0)
    blocks = -(-columns // size)
    inputs = ["q", "w", "s", *(["z"] if zeros != "none" else [])]
    middle = [
        node("Slice", ["p", "start", "end", "axis"], ["q"]),
        node(
            "MatMulNBits", inputs, ["m"], domain="com.microsoft", K=columns, N=6, bits=bits, block_size=size
        ),
        node("Add", ["m", "b"], ["y"]),
    ]
    packed = -(-blocks * bits // 8)
    tensors = [
        full(random.integers(0, 256, (6, blocks, size * bits // 8)).astype(np.uint8), "w"),
        full(random.uniform(0.1, 0.3, (6 * blocks,)).astype(np.float32), "s"),
        *(full(ints(number), name) for name, number in (("start", 0), ("end", columns), ("axis", 1))),
        full(array(6), "b"),
    ]
    if zeros == "packed":
        tensors.append(full(random.integers(0, 256, (6 * packed,)).astype(np.uint8), "z"))
    elif zeros == "floats":
        tensors.append(full(random.uniform(4, 9, (6 * blocks,)).astype(np.float32), "z"))
    source = agrees(save(dense(middle, tensors, ["com.microsoft"])))
    explained(source)


def test_activations_of_four_bits_are_refused(save: Save) -> None:
    middle = [
        node("QuantizeLinear", ["p", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    tensors = [full(np.float32(0.1), "s"), narrow(np.array(0), "INT4", "z")]
    with pytest.raises(UnsupportedOperator, match=r"to int4.*leave its activations as they are"):
        read(save(dense(middle, tensors)))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_largest_of_regions(save: Save, scale: float) -> None:
    rois = np.array(
        [[0, 0, 0, 5, 3], [0, 2.4, 1.6, 7.5, 6.5], [0, 6, 6, 6, 6], [1, 3, 2, 12, 15]], np.float32
    )
    last = node("MaxRoiPool", ["x", "rois"], ["y"], pooled_shape=[2, 3], spatial_scale=scale)
    data = build([last], (2, 3, 8, 8), {"rois": rois}, 21).SerializeToString()
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(data).run(None, {"x": x})
    (got,) = evaluate(parse(data, "net.onnx"), {"x": torch.from_numpy(x)})
    torch.testing.assert_close(got, torch.from_numpy(want))
