"""The operators that a stored network may contain: an allow-list of pure tensor functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusion.errors import ArtefactError
from fusion.network import SIZE_FUNCTIONS

aten = torch.ops.aten

# Deterministic functions of their arguments: no file, no memory address, no in-place write, no random number.
ALLOWED = frozenset(
    """
    _adaptive_avg_pool2d _softmax _to_copy _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d abs acos acosh
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d add addcdiv addcmul addmm affine_grid_generator amax amin arange argmax
    argmin as_strided asin asinh atan atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm
    broadcast_tensors broadcast_to bucketize cat ceil celu channel_shuffle chunk clamp clamp_max
    clamp_min col2im concat constant_pad_nd conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d copy cos cosh cosine_similarity cumprod cumsum det diagonal div dot einsum elu
    embedding empty_like eq erf exp expand expand_as fill flatten flip floor floor_divide fmod full
    full_like gather ge gelu glu grid_sampler group_norm gt hardshrink hardsigmoid hardswish
    hardtanh im2col index index_put index_select instance_norm interpolate isnan layer_norm le
    leaky_relu lerp linalg_vector_norm linear linspace local_response_norm log log10 log1p log2
    log_softmax logical_and logical_not logical_or logical_xor logsumexp lstm lt masked_fill matmul
    max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d maximum mean meshgrid min minimum
    mish mm movedim mul mv nan_to_num narrow ne neg new_full new_ones new_zeros norm ones ones_like
    pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal reflection_pad1d
    reflection_pad2d reflection_pad3d relu relu6 remainder repeat repeat_interleave
    replication_pad1d replication_pad2d replication_pad3d reshape rms_norm roll rot90 round rsqrt
    rsub scalar_tensor scaled_dot_product_attention scatter scatter_reduce select select_scatter
    selu sigmoid sign silu sin sinh slice slice_scatter softmax softplus softshrink sort split
    split_with_sizes sqrt square squeeze stack std sub sum sym_size t tan tanh tensor_split
    threshold tile to topk transpose tril triu trunc type_as unbind unflatten unfold unsqueeze
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d var var_mean view view_as where zeros zeros_like
    """.split()
)

_ATEN = "aten."
_SIZE = "operator."


def operator_key(target: Any) -> str:
    """The stored name of a call target, e.g. "aten.conv2d.default" or "operator.mul"."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return f"{_ATEN}{target._schema.name.split('::')[1]}.{target._overloadname}"
    name = getattr(target, "__name__", str(target))
    if SIZE_FUNCTIONS.get(name) is target:
        return f"{_SIZE}{name}"
    return str(target)


def operator_for(key: str) -> Callable[..., Any]:
    """The function behind a stored name; raises ArtefactError for whatever is not on the list."""
    if key.startswith(_SIZE) and key.removeprefix(_SIZE) in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[key.removeprefix(_SIZE)]
    parts = key.split(".")
    if len(parts) == 3 and parts[0] == "aten" and parts[1] in ALLOWED:
        packet = getattr(aten, parts[1], None)
        if packet is not None and parts[2] in packet.overloads():
            return getattr(packet, parts[2])  # type: ignore[no-any-return]
    raise ArtefactError(f"The stored network contains the operator '{key}', which this version does not run.")


def is_allowed(target: Any) -> bool:
    """Whether a call target may be stored."""
    try:
        return operator_for(operator_key(target)) is not None
    except ArtefactError:
        return False
