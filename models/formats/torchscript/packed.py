"""The packed weights of quantized layers, as floats and as a module that holds them under their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.errors import UnsupportedOperator

_quantized: Any = torch.ops.quantized


class Packed(nn.Module):
    """The weights of a quantized layer as floats, and how a convolution is laid out: stride, padding, dilation, groups,
    and for a transposed one its output's padding."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int] = (),
        padding: Sequence[int] = (),
        dilation: Sequence[int] = (),
        groups: int = 1,
        output_padding: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.layout = (list(stride), list(padding), list(dilation), groups)
        self.output_padding = None if output_padding is None else list(output_padding)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("weight"), self._buffers["bias"])

    def convolution(self, x: Tensor) -> Tensor:
        weight, bias = self.get_buffer("weight"), self._buffers["bias"]
        stride, padding, dilation, groups = self.layout
        rank = weight.dim() - 2
        if self.output_padding is not None:
            up: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
            return up(x, weight, bias, stride, padding, self.output_padding, groups, dilation)  # type: ignore[no-any-return]
        along: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        return along(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


def unpack(packed: Any) -> Packed:
    """The packed weights of a loaded script. Raises UnsupportedOperator for those of other kinds of layers."""
    kind = str(packed._type()).rpartition(".")[2]
    reader = _UNPACK.get(kind)
    if reader is None:
        raise UnsupportedOperator(f"{kind} (packed weights)", "")
    return reader(packed)


def _unpack_linear(packed: Any) -> Packed:
    try:
        weight, bias = _quantized.linear_unpack(packed)
    except RuntimeError:  # packed in half precision
        weight, bias = _quantized.linear_unpack_fp16(packed)
    return Packed(weight.dequantize() if weight.is_quantized else weight.float(), bias)


def _unpack_convolution(rank: int) -> Callable[[Any], Packed]:
    def unpacked(packed: Any) -> Packed:
        def ask(what: str) -> Any:
            return getattr(_quantized, f"conv{rank}d_{what}")(packed)

        transposed = bool(ask("transpose"))
        name = f"conv_transpose{rank}d_unpack" if transposed else f"conv{rank}d_unpack"
        weight, bias = getattr(_quantized, name)(packed)
        return Packed(
            weight.dequantize(), bias, ask("stride"), ask("padding"), ask("dilation"), ask("groups"),
            ask("output_padding") if transposed else None,
        )  # fmt: skip

    return unpacked


_UNPACK: dict[str, Callable[[Any], Packed]] = {
    "LinearPackedParamsBase": _unpack_linear,
    "Conv2dPackedParamsBase": _unpack_convolution(2),
    "Conv3dPackedParamsBase": _unpack_convolution(3),
}
