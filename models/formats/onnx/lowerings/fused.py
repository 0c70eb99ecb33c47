"""Operators that ONNX Runtime's optimizer fuses (domain com.microsoft), as those that they are fused from.

Facts: ONNX Runtime's schemas of its contributed operators.
"""

from __future__ import annotations

from models.formats.onnx.lowering import MICROSOFT, Writer, channels_first, channels_last, lowering

_WINDOW = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_ACTIVATION = ("activation", "activation_params")


def activated(write: Writer, y: str, name: str, parameters: list[float]) -> str:
    """y behind the activation that a node names, with its parameters in order."""
    if name in ("", "Relu", "Sigmoid", "Tanh", "HardSwish", "Gelu"):
        return write(name, y) if name else y
    if name == "LeakyRelu":
        return write(name, y, alpha=parameters[0])
    if name == "Clip":
        return write(name, y, *(write.constant(bound) for bound in parameters[:2]))
    if name == "HardSigmoid":
        return write(name, y, alpha=parameters[0], beta=parameters[1])
    raise write.refused(f"with the activation {name}")


def fused_conv(write: Writer, x: str, w: str, b: str, z: str) -> str:
    """A convolution, plus a residual, behind an activation."""
    y = write("Conv", x, w, b, **write.given(*_WINDOW))
    y = write("Add", y, z) if z else y
    return activated(write, y, write.get("activation", ""), list(write.get("activation_params") or ()))


@lowering("FusedConv", domain=MICROSOFT, attributes=(*_WINDOW, *_ACTIVATION))
def conv(write: Writer, x: str, w: str, b: str = "", z: str = "") -> str:
    return fused_conv(write, x, w, b, z)


@lowering("NhwcFusedConv", domain=MICROSOFT, attributes=(*_WINDOW, *_ACTIVATION))
def conv_channels_last(write: Writer, x: str, w: str, b: str = "", z: str = "") -> str:
    """Images have their channels last, weights do not."""
    first = [channels_first(write, t) if t else "" for t in (x, z)]
    return channels_last(write, fused_conv(write, first[0], w, b, first[1]))


@lowering(
    "FusedGemm",
    domain=MICROSOFT,
    attributes=(
        "alpha", "beta", "transA", "transB", "activation", "activation_alpha", "activation_beta", "activation_gamma",
    ),
)  # fmt: skip
def gemm(write: Writer, a: str, b: str, c: str = "") -> str:
    y = write("Gemm", a, b, c, **write.given("alpha", "beta", "transA", "transB"))
    parameters = [write.get(name) for name in ("activation_alpha", "activation_beta")]
    return activated(write, y, write.get("activation", ""), [p for p in parameters if p is not None])


@lowering(
    "FusedMatMul", domain=MICROSOFT, attributes=("alpha", "transA", "transB", "transBatchA", "transBatchB")
)
@lowering("TransposeMatMul", domain=MICROSOFT, attributes=("alpha", "transA", "transB"))
def matmul(write: Writer, a: str, b: str) -> str | None:
    if write.get("transBatchA", 0) or write.get("transBatchB", 0):
        raise write.refused("with transposed batches")
    factors = []
    for name, flag in ((a, "transA"), (b, "transB")):
        rank = write.rank(name)
        if write.get(flag, 0) and rank is None:
            return None
        if write.get(flag, 0) and rank is not None and rank > 1:
            order = (*range(rank - 2), rank - 1, rank - 2)
            name = write("Transpose", name, perm=order)
        factors.append(name)
    alpha = write.get("alpha", 1.0)
    if alpha != 1 and b in write.known:  # into the weight, which then is a layer's
        factors[1], alpha = write("Mul", factors[1], write.constant(alpha)), 1.0
    y = write("MatMul", *factors)
    return y if alpha == 1 else write("Mul", y, write.constant(alpha))


@lowering("BiasGelu", domain=MICROSOFT)
def bias_gelu(write: Writer, x: str, bias: str) -> str:
    return write("Gelu", write("Add", x, bias))


@lowering("Gelu", domain=MICROSOFT)
def gelu(write: Writer, x: str) -> str:
    return write("Gelu", x)


@lowering("FastGelu", domain=MICROSOFT)
def fast_gelu(write: Writer, x: str, bias: str = "") -> str:
    return write("Gelu", write("Add", x, bias) if bias else x, approximate="tanh")


@lowering("QuickGelu", domain=MICROSOFT, attributes=("alpha",))
def quick_gelu(write: Writer, x: str) -> str:
    return write("Swish", x, alpha=write.get("alpha", 1.702))


@lowering("BiasSplitGelu", domain=MICROSOFT)
def bias_split_gelu(write: Writer, x: str, bias: str) -> str:
    signal, gate = write.several("Split", write("Add", x, bias), count=2, axis=-1, num_outputs=2)
    return write("Mul", signal, write("Gelu", gate))


@lowering("BiasAdd", domain=MICROSOFT)
def bias_add(write: Writer, x: str, bias: str, skip: str) -> str:
    return write("Add", write("Add", x, bias), skip)


@lowering("BiasSoftmax", domain=MICROSOFT, attributes=("axis", "is_inner_broadcast"))
def bias_softmax(write: Writer, x: str, bias: str) -> str:
    """Softmax as before version 13, over all axes from `axis` on."""
    return write("Softmax", write("Add", x, bias), opset=11, axis=write.get("axis", 1))


def _residual(write: Writer, x: str, skip: str, bias: str) -> str:
    total = write("Add", x, skip)
    return write("Add", total, bias) if bias else total


@lowering("SkipLayerNormalization", domain=MICROSOFT, attributes=("epsilon",))
def skip_layer_norm(
    write: Writer, x: str, skip: str, gamma: str, beta: str = "", bias: str = ""
) -> tuple[str, ...]:
    """The norm of a residual sum; the sum is the fourth output."""
    total = _residual(write, x, skip, bias)
    names = write.several(
        "LayerNormalization", total, gamma, beta, count=3, axis=-1, epsilon=write.get("epsilon", 1e-12)
    )
    return (*names, total)


@lowering("SkipSimplifiedLayerNormalization", domain=MICROSOFT, attributes=("epsilon",))
def skip_rms_norm(write: Writer, x: str, skip: str, gamma: str, bias: str = "") -> tuple[str, ...]:
    total = _residual(write, x, skip, bias)
    y = write("RMSNormalization", total, gamma, axis=-1, epsilon=write.get("epsilon", 1e-12))
    return (y, "", "", total)


_GROUP_NORM = ("activation", "channels_last", "epsilon", "groups")


@lowering("GroupNorm", domain=MICROSOFT, attributes=_GROUP_NORM)
def group_norm(write: Writer, x: str, gamma: str, beta: str) -> str:
    """Channels are last unless told otherwise; the activation is SiLU."""
    last = write.get("channels_last", 1)
    y = channels_first(write, x) if last else x
    y = write(
        "GroupNormalization",
        y,
        gamma,
        beta,
        num_groups=write.get("groups"),
        epsilon=write.get("epsilon", 1e-5),
    )
    y = write("Swish", y) if write.get("activation", 0) else y
    return channels_last(write, y) if last else y


@lowering("SkipGroupNorm", domain=MICROSOFT, attributes=_GROUP_NORM)
def skip_group_norm(
    write: Writer, x: str, gamma: str, beta: str, skip: str, bias: str = ""
) -> tuple[str, str]:
    total = _residual(write, x, skip, bias)
    return group_norm(write, total, gamma, beta), total  # type: ignore[return-value]


@lowering("GridSample", domain=MICROSOFT, attributes=("align_corners", "mode", "padding_mode"))
def grid_sample(write: Writer, x: str, grid: str) -> str:
    return write("GridSample", x, grid, opset=16, **write.given("align_corners", "mode", "padding_mode"))
