"""ONNX Runtime's blocked layout (domain com.microsoft.nchwc), which its optimizer writes by default, as plain images.

Channels are rounded up to whole blocks and stay so until the layout is left; what is added to them reaches nothing.
Weights are stored block by block and put back into order here. How large a block is depends on the machine that wrote
the file and that can run it; it is asked of the ONNX Runtime at hand.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fusion.errors import UnsupportedOperator
from models.formats.onnx.lowering import Writer, channels_first, channels_last, lowering
from models.formats.onnx.lowerings.fused import fused_conv

BLOCKED = "com.microsoft.nchwc"
_WINDOW = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOL = (
    "auto_pad",
    "ceil_mode",
    "count_include_pad",
    "dilations",
    "kernel_shape",
    "pads",
    "storage_order",
    "strides",
)


@functools.cache
def block_size() -> int | None:
    """The channels of a block on this machine, None where its ONNX Runtime has no blocked layout: what a convolution to
    one channel is rounded up to."""
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, 4, 4)) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            optimized = onnx.load(path)
        except Exception:  # of many kinds, such as no right to write
            return None
    if not any(node.domain == BLOCKED for node in optimized.graph.node):
        return None
    return max(int(tensor.dims[0]) for tensor in optimized.graph.initializer if len(tensor.dims) == 4)


def unblocked(weight: Tensor, block: int, inputs_too: bool) -> Tensor:
    """Weights [out, in, h, w] from storage by blocks of outputs, and of inputs where these are blocked as well."""
    out, into, h, w = weight.shape
    if inputs_too:
        stored = weight.reshape(out // block, into // block, h, w, block, block)
        return stored.permute(0, 5, 1, 4, 2, 3).reshape(out, into, h, w).contiguous()
    return (
        weight.reshape(out // block, into, h, w, block)
        .permute(0, 4, 1, 2, 3)
        .reshape(out, into, h, w)
        .contiguous()
    )


def _elsewhere(write: Writer) -> UnsupportedOperator:
    return write.refused(
        "in a layout of another machine", "Optimize the file at the level 'extended', not 'all'."
    )


@lowering("Conv", domain=BLOCKED, attributes=(*_WINDOW, "activation", "activation_params"))
def conv(write: Writer, x: str, w: str, b: str = "", z: str = "") -> str:
    """A plain image's few channels, and each channel's own kernel, are no blocks of inputs."""
    block = block_size()
    stored = write.weight(w)
    if block is None or stored.shape[0] % block:
        raise _elsewhere(write)
    weight = unblocked(stored, block, inputs_too=stored.shape[1] >= block)
    return fused_conv(write, x, write.constant(weight, name=write.known[w].name), b, z)


@lowering("MaxPool", "AveragePool", domain=BLOCKED, attributes=_POOL)
def pool(write: Writer, x: str) -> str:
    return write(write.node.op, x, **write.given(*_POOL))


@lowering("GlobalMaxPool", "GlobalAveragePool", domain=BLOCKED)
def global_pool(write: Writer, x: str) -> str:
    return write(write.node.op, x)


@lowering("ReorderInput", domain=BLOCKED, attributes=("channels_last",))
def reorder_input(write: Writer, x: str) -> str | None:
    """Into the layout: channels up to a whole number of blocks."""
    value, block = write.look(x), block_size()
    if value is None:
        return None
    if block is None:
        raise _elsewhere(write)
    last = write.get("channels_last", 0)
    channels = int(value.shape[3 if last else 1])
    y = channels_first(write, x) if last else x
    missing = -channels % block
    if not missing:
        return y if last else write("Identity", y)
    return write("Pad", y, write.constant([0, 0, 0, 0, 0, missing, 0, 0], torch.int64))


@lowering("ReorderOutput", domain=BLOCKED, attributes=("channels", "channels_last"))
def reorder_output(write: Writer, x: str) -> str:
    """Out of the layout: the channels that there are."""
    bounds = [write.constant([n], torch.int64) for n in (0, write.get("channels"), 1)]
    y = write("Slice", x, *bounds)
    return channels_last(write, y) if write.get("channels_last", 0) else y


@lowering(
    "Upsample",
    domain=BLOCKED,
    attributes=("scales", "mode", "coordinate_transformation_mode", "nearest_mode"),
)
def upsample(write: Writer, x: str) -> str:
    """By whole factors. Nearest repeats every pixel: how coordinates are rounded is no longer in the file."""
    scales = write.constant([float(s) for s in write.get("scales")])
    if write.get("mode", "nearest") == "nearest":
        return write(
            "Resize",
            x,
            "",
            scales,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    return write("Resize", x, "", scales, **write.given("mode", "coordinate_transformation_mode"))
