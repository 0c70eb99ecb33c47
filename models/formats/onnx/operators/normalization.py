"""Normalizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.nn import functional as F

from fusion.errors import UnsupportedOperator
from models.formats.onnx.operators.padding import pad
from models.formats.onnx.registry import Node, operator


@operator("BatchNormalization", since=7)
def batch_normalization(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Statistics of a batch of images would mix them; those of constants, by which exporters write standardized
    weights, are constants."""
    # Before opset 14 a training file has more outputs instead of an attribute; `spatial=0` is opset 7's own.
    training = bool(node.get("training_mode", 0) or any(node.outputs[1:]))
    of_images = any(isinstance(side, SymInt) for side in x.shape)
    if (training and of_images) or node.get("spatial", 1) == 0:
        raise UnsupportedOperator(
            f"{node.title} with batch statistics",
            node.called,
            "Export the network in evaluation mode (model.eval()).",
        )
    if not training:
        return F.batch_norm(x, mean, var, scale, bias, training=False, eps=node.get("epsilon", 1e-5))
    others = [axis for axis in range(x.ndim) if axis != 1]
    kept = node.get("momentum", 0.9)
    own_var, own_mean = torch.var_mean(x, others, correction=0)
    y = F.batch_norm(x, own_mean, own_var, scale, bias, training=False, eps=node.get("epsilon", 1e-5))
    return y, mean * kept + own_mean * (1 - kept), var * kept + own_var * (1 - kept)


@operator("InstanceNormalization", since=6)
def instance_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    """The mean and the inverse deviation are further outputs."""
    shape, eps = tuple(x.shape[node.get("axis", -1) :]), node.get("epsilon", 1e-5)
    if tuple(scale.shape) != shape:
        scale = scale.expand(shape)
    if bias is not None and tuple(bias.shape) != shape:
        bias = bias.expand(shape)
    y = F.layer_norm(x, shape, scale, bias, eps)
    if not any(node.outputs[1:]):
        return y
    axes = list(range(-len(shape), 0))
    mean = x.mean(axes, keepdim=True)
    deviation = (x - mean).square().mean(axes, keepdim=True)
    return y, mean, torch.rsqrt(deviation + eps)


@operator("SimplifiedLayerNormalization")
@operator("RMSNormalization", since=23)
def rms_normalization(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    shape = tuple(x.shape[node.get("axis", -1) :])
    return F.rms_norm(x, shape, scale.expand(shape), node.get("epsilon", 1e-5))


@operator("GroupNormalization", since=18)
def group_normalization_18(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Opset 18 scales per group; opset 21 corrected that to per channel."""
    each = x.shape[1] // node.get("num_groups")
    return F.group_norm(
        x,
        node.get("num_groups"),
        scale.repeat_interleave(each),
        bias.repeat_interleave(each),
        node.get("epsilon", 1e-5),
    )


@operator("GroupNormalization", since=21)
def group_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, node.get("num_groups"), scale, bias, node.get("epsilon", 1e-5))


@operator("LRN")
def local_response_normalization(node: Node, x: Tensor) -> Tensor:
    size, alpha, beta, k = (
        node.get("size"),
        node.get("alpha", 1e-4),
        node.get("beta", 0.75),
        node.get("bias", 1.0),
    )
    if size % 2:
        return F.local_response_norm(x, size, alpha, beta, k)
    # torch puts the odd channel of an even size before, ONNX after.
    before, after = (size - 1) // 2, size // 2
    squares = pad((x * x).flatten(2).unsqueeze(1), (before, 0), (after, 0))
    total = F.avg_pool2d(squares, (size, 1), stride=1).squeeze(1).reshape(x.shape)
    return torch.div(x, (k + alpha * total).pow(beta))


@operator("LpNormalization")
def lp_normalization(node: Node, x: Tensor) -> Tensor:
    return F.normalize(x, p=float(node.get("p", 2)), dim=node.get("axis", -1), eps=1e-30)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(node: Node, x: Tensor) -> Tensor:
    axes = list(node.get("axes", (0, 2, 3)))
    if isinstance(x.shape[0], SymInt) and 0 in axes:
        raise UnsupportedOperator(f"{node.title} over the batch", node.called)
    centered = x - x.mean(axes, keepdim=True)
    return centered / (torch.sqrt((centered * centered).mean(axes, keepdim=True)) + 1e-9)
