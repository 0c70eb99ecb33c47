"""Activations: elementwise functions of one tensor, and softmax."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.formats.onnx.registry import OWN, Node, operator
from models.formats.onnx.values import Value, as_tensor, scalar


@operator("Relu")
def relu(node: Node, x: Tensor) -> Tensor:
    return F.relu(x)


@operator("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("PRelu", since=7)
def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """torch's own where the slope is one number, or one per channel; else by parts."""
    channels = (slope.ndim == x.ndim and slope.shape[0] == 1) or (slope.ndim == x.ndim - 1)
    leading = (
        slope.shape[1] if slope.ndim == x.ndim and slope.ndim > 1 else slope.shape[0] if slope.ndim else 1
    )
    if slope.numel() == 1 or (channels and slope.numel() == leading == x.shape[1]):
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


@operator("ThresholdedRelu")
def thresholded_relu(node: Node, x: Tensor) -> Tensor:
    return F.threshold(x, node.get("alpha", 1.0), 0.0)


@operator("Sigmoid")
def sigmoid(node: Node, x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@operator("Tanh")
def tanh(node: Node, x: Tensor) -> Tensor:
    return torch.tanh(x)


@operator("Elu")
def elu(node: Node, x: Tensor) -> Tensor:
    return F.elu(x, node.get("alpha", 1.0))


@operator("Selu")
def selu(node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return torch.mul(F.elu(x, alpha), gamma)


@operator("Celu")
def celu(node: Node, x: Tensor) -> Tensor:
    return F.celu(x, node.get("alpha", 1.0))


@operator("Gelu", since=20)
def gelu(node: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("Gelu", domain=OWN)
def gelu_from_erf(node: Node, x: Tensor) -> Tensor:
    return F.gelu(x)


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return F.hardtanh(alpha * x + beta, 0.0, 1.0)


@operator("Silu", domain=OWN)
def silu(node: Node, x: Tensor) -> Tensor:
    return F.silu(x)


@operator("HardSwish", domain=OWN)
@operator("HardSwish", since=14)
def hard_swish(node: Node, x: Tensor) -> Tensor:
    return F.hardswish(x)


@operator("Swish", since=24)
def swish(node: Node, x: Tensor) -> Tensor:
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("Mish", since=18)
def mish(node: Node, x: Tensor) -> Tensor:
    return F.mish(x)


@operator("Softplus")
def softplus(node: Node, x: Tensor) -> Tensor:
    return F.softplus(x)


@operator("Softsign")
def softsign(node: Node, x: Tensor) -> Tensor:
    return F.softsign(x)


@operator("Shrink", since=9)
def shrink(node: Node, x: Tensor) -> Tensor:
    bias, limit = node.get("bias", 0.0), node.get("lambd", 0.5)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


@operator("Erf", since=9)
def erf(node: Node, x: Tensor) -> Tensor:
    return torch.erf(x)


@operator("Clip", since=6)
def clip_6(node: Node, x: Tensor) -> Tensor:
    return _clip(x, node.get("min"), node.get("max"))


@operator("Clip", since=11, static=(1, 2))
def clip(node: Node, x: Tensor, low: Value | None = None, high: Value | None = None) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        bounds = [None if b is None else as_tensor(b, x).to(x.dtype) for b in (low, high)]
        return torch.clamp(x, *bounds)
    return _clip(
        x, None if low is None else scalar(low, "Clip"), None if high is None else scalar(high, "Clip")
    )


def _clip(x: Tensor, low: float | None, high: float | None) -> Tensor:
    # Some exporters write float32's own limits for "no bound".
    low = None if low is not None and low < -3e38 else low
    high = None if high is not None and high > 3e38 else high
    if low is None and high is None:
        return x
    if high is None:
        return torch.clamp_min(x, low)  # type: ignore[arg-type]
    if low is None:
        return torch.clamp_max(x, high)
    if low > high or not x.is_floating_point():
        return torch.clamp(x, low, high)
    return F.hardtanh(x, low, high)


@operator("Softmax", since=13)
def softmax(node: Node, x: Tensor) -> Tensor:
    return F.softmax(x, node.get("axis", -1))


def _hard(x: Tensor, axis: int) -> Tensor:
    """One where the (first) largest value is, else zero."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


@operator("Hardmax", since=13)
def hardmax(node: Node, x: Tensor) -> Tensor:
    return _hard(x, node.get("axis", -1))


@operator("Hardmax")
def hardmax_1(node: Node, x: Tensor) -> Tensor:
    return _flattened(_hard, node, x)


@operator("LogSoftmax", since=13)
def log_softmax(node: Node, x: Tensor) -> Tensor:
    return F.log_softmax(x, node.get("axis", -1))


@operator("Softmax")
def softmax_1(node: Node, x: Tensor) -> Tensor:
    return _flattened(F.softmax, node, x)


@operator("LogSoftmax")
def log_softmax_1(node: Node, x: Tensor) -> Tensor:
    return _flattened(F.log_softmax, node, x)


def _flattened(function: object, node: Node, x: Tensor) -> Tensor:
    """Before opset 13 the axes from `axis` on are one; no difference if only one of them is longer than 1."""
    assert callable(function)
    axis = node.get("axis", 1) % x.ndim
    long = [i for i in range(axis, x.ndim) if x.shape[i] != 1]
    if len(long) <= 1:
        result = function(x, long[0] if long else axis)
    else:
        result = function(x.flatten(axis), axis).reshape(x.shape)
    assert isinstance(result, Tensor)
    return result
