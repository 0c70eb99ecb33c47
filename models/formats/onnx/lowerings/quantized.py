"""Operators on quantized tensors: dequantize, compute in floats, quantize again.

So quantized networks are read as what they stand for; `models.formats.onnx.quantized` then joins the quantizing and
dequantizing that meet. After a tensor come its scale and its zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.formats.onnx.lowering import MICROSOFT, Writer, channels_first, channels_last, lowering

_WINDOW = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
_LAST = "channels_last"


def _in(write: Writer, x: str, scale: str, zero: str = "", axis: int | None = None) -> str:
    return write("DequantizeLinear", x, scale, zero, axis=axis)


def _out(write: Writer, y: str, scale: str, zero: str = "") -> str:
    return write("QuantizeLinear", y, scale, zero)


def _first(write: Writer, x: str) -> str:
    """Channels from the last place to the second, where the node has them last."""
    return channels_first(write, x) if write.get(_LAST, 0) else x


def _last(write: Writer, y: str) -> str:
    return channels_last(write, y) if write.get(_LAST, 0) else y


@lowering("QLinearConv", attributes=_WINDOW)
@lowering("QLinearConv", domain=MICROSOFT, attributes=(*_WINDOW, _LAST))
def conv(
    write: Writer, x: str, xs: str, xz: str, w: str, ws: str, wz: str, ys: str, yz: str, bias: str = ""
) -> str:
    """The bias is quantized by the product of both scales."""
    if bias:
        bias = write("DequantizeLinear", bias, write("Mul", xs, ws), axis=0)
    weight = _in(write, w, ws, wz, axis=0)
    y = write("Conv", _first(write, _in(write, x, xs, xz)), weight, bias, **write.given(*_WINDOW))
    return _out(write, _last(write, y), ys, yz)


@lowering("QLinearMatMul")
@lowering("QLinearMatMul", domain=MICROSOFT)
def matmul(write: Writer, a: str, sa: str, za: str, b: str, sb: str, zb: str, ys: str, yz: str) -> str:
    """A scale of several entries is one per row of a, per column of b."""
    return _out(write, write("MatMul", _in(write, a, sa, za, -2), _in(write, b, sb, zb, -1)), ys, yz)


@lowering("QGemm", domain=MICROSOFT, attributes=("alpha", "transA", "transB"))
def gemm(
    write: Writer, a: str, sa: str, za: str, b: str, sb: str, zb: str, c: str = "", ys: str = "", yz: str = ""
) -> str:
    """The bias is quantized by alpha and the product of both scales; without a scale the output is a float."""
    alpha = write.get("alpha", 1.0)
    if c:
        c = write("DequantizeLinear", c, write("Mul", write("Mul", sa, write.constant(alpha)), sb), axis=-1)
    weight = _in(write, b, sb, zb, axis=0 if write.get("transB", 0) else 1)
    y = write("Gemm", _in(write, a, sa, za), weight, c, **write.given("alpha", "transA", "transB"))
    return _out(write, y, ys, yz) if ys else y


@lowering("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def binary(write: Writer, a: str, sa: str, za: str, b: str, sb: str, zb: str, ys: str, yz: str = "") -> str:
    op = write.node.op.removeprefix("QLinear")
    return _out(write, write(op, _in(write, a, sa, za), _in(write, b, sb, zb)), ys, yz)


@lowering("QLinearAveragePool", domain=MICROSOFT, attributes=(*_POOL, _LAST))
def average_pool(write: Writer, x: str, xs: str, xz: str, ys: str, yz: str = "") -> str:
    y = write("AveragePool", _first(write, _in(write, x, xs, xz)), **write.given(*_POOL))
    return _out(write, _last(write, y), ys, yz)


@lowering("QLinearGlobalAveragePool", domain=MICROSOFT, attributes=(_LAST,))
def global_average_pool(write: Writer, x: str, xs: str, xz: str, ys: str, yz: str = "") -> str:
    return _out(write, _last(write, write("GlobalAveragePool", _first(write, _in(write, x, xs, xz)))), ys, yz)


@lowering("QLinearSigmoid", domain=MICROSOFT)
def sigmoid(write: Writer, x: str, xs: str, xz: str, ys: str, yz: str = "") -> str:
    return _out(write, write("Sigmoid", _in(write, x, xs, xz)), ys, yz)


@lowering("QLinearLeakyRelu", domain=MICROSOFT, attributes=("alpha",))
def leaky_relu(write: Writer, x: str, xs: str, xz: str, ys: str, yz: str = "") -> str:
    return _out(write, write("LeakyRelu", _in(write, x, xs, xz), **write.given("alpha")), ys, yz)


@lowering("QLinearSoftmax", domain=MICROSOFT, attributes=("axis", "opset"))
def softmax(write: Writer, x: str, xs: str, xz: str, ys: str, yz: str = "") -> str:
    y = write("Softmax", _in(write, x, xs, xz), opset=write.get("opset", 13), axis=write.get("axis", -1))
    return _out(write, y, ys, yz)


@lowering("QLinearConcat", domain=MICROSOFT, attributes=("axis",))
def concat(write: Writer, ys: str, yz: str, *tensors: str) -> str:
    triples = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
    parts = [_in(write, x, scale, zero) for x, scale, zero in triples]
    return _out(write, write("Concat", *parts, axis=write.get("axis")), ys, yz)


@lowering("QLinearReduceMean", domain=MICROSOFT, attributes=("axes", "keepdims"))
def reduce_mean(write: Writer, x: str, xs: str, xz: str, ys: str, yz: str = "") -> str:
    y = write("ReduceMean", _in(write, x, xs, xz), opset=13, **write.given("axes", "keepdims"))
    return _out(write, y, ys, yz)


@lowering("QLinearWhere", domain=MICROSOFT)
def where(
    write: Writer, c: str, a: str, sa: str, za: str, b: str, sb: str, zb: str, ys: str, yz: str = ""
) -> str:
    return _out(write, write("Where", c, _in(write, a, sa, za), _in(write, b, sb, zb)), ys, yz)


@lowering(
    "NhwcMaxPool",
    domain=MICROSOFT,
    attributes=("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides"),
)
def max_pool(write: Writer, x: str) -> str:
    settings = write.given("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    y = write("MaxPool", channels_first(write, x), **settings)
    return channels_last(write, y)


@lowering("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_to_float(
    write: Writer, a: str, b: str, sa: str, sb: str, za: str = "", zb: str = "", bias: str = ""
) -> str:
    y = write("MatMul", _in(write, a, sa, za, -2), _in(write, b, sb, zb, -1))
    return write("Add", y, bias) if bias else y


@lowering("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_matmul(write: Writer, a: str, b: str, sb: str, zb: str = "", bias: str = "") -> str:
    """What is quantized by its own range is taken as it is."""
    y = write("MatMul", a, _in(write, b, sb, zb, -1))
    return write("Add", y, bias) if bias else y


@lowering("MatMulNBits", domain=MICROSOFT, attributes=("K", "N", "accuracy_level", "bits", "block_size"))
def matmul_of_few_bits(
    write: Writer, x: str, w: str, scales: str, zeros: str = "", groups: str = "", bias: str = ""
) -> str:
    """A product with weights [N, K] in blocks along K, several to a byte, the first in its lowest bits. Without zero
    points the middle of the range is zero."""
    rows, columns, bits, size = (write.get(name) for name in ("N", "K", "bits", "block_size"))
    if bits not in (2, 4, 8) or groups:
        raise write.refused(f"with {bits} bits" if not groups else "with an order of its columns")
    blocks = -(-columns // size)
    steps = _unpacked(write.weight(w), bits).reshape(rows, blocks, -1)[:, :, :size]
    middle = torch.full((rows, blocks), 2.0 ** (bits - 1))
    if zeros:
        given = write.weight(zeros)
        apart = (
            given.reshape(rows, -1) if given.is_floating_point() else _unpacked(given.reshape(rows, -1), bits)
        )
        middle = apart[:, :blocks]
    weight = (steps - middle.unsqueeze(2)) * write.weight(scales).reshape(rows, blocks, 1)
    weight = weight.reshape(rows, -1)[:, :columns].t().contiguous()
    y = write("MatMul", x, write.constant(weight, name=write.known[w].name))
    return write("Add", y, bias) if bias else y


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The numbers in bytes, along the last axis, as floats."""
    shifts = torch.arange(0, 8, bits)
    parts: Tensor = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return parts.flatten(-2).to(torch.float32)


@lowering("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT, attributes=("axis",))
def same(write: Writer, x: str, scale: str, zero: str = "") -> str:
    """The standard's own, which came to the types later."""
    return write(write.node.op, x, scale, zero, axis=write.get("axis"))
