"""Normalizers that torch has no module for, each computing what its authors' published implementation computes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _random(*shape: int, around: float = 1.0, spread: float = 0.3) -> nn.Parameter:
    """A parameter that no fold gets right by accident."""
    return nn.Parameter(around + spread * torch.randn(*shape))


# --- maps with constant coefficients ----------------------------------------------------------------------------------
class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm over splits of the batch (Hoffer et al. 2017, arXiv:1705.08741): every split has running statistics of
    its own, and evaluation takes their average."""

    def __init__(self, channels: int, splits: int) -> None:
        super().__init__(channels)
        self.splits = splits
        self.register_buffer("running_mean", 0.2 * torch.randn(channels * splits))
        self.register_buffer("running_var", torch.rand(channels * splits) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = (t.view(self.splits, -1).mean(0) for t in (self.running_mean, self.running_var))
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


class ClippedBatchNorm(nn.Module):
    """Batch norm whose slope is bounded (Srinivas et al. 2022, arXiv:2206.07144): gamma and beta are absent, and all
    channels share the factor s min(1 / s, L) with s = min_c sqrt(running_var_c + eps)."""

    def __init__(self, channels: int, log_lipschitz: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.log_lipschitz = nn.Parameter(torch.tensor(log_lipschitz))

    def forward(self, x: Tensor) -> Tensor:
        assert self.bn.running_var is not None
        smallest = (self.bn.running_var + self.bn.eps).sqrt().min()
        factor = smallest * torch.minimum(1 / smallest, self.log_lipschitz.exp())
        return self.bn(x) * factor  # type: ignore[no-any-return]


class DynamicTanh(nn.Module):
    """gamma tanh(alpha x) + beta over the last axis (Zhu et al. 2025, arXiv:2503.10622)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([0.7]))
        self.weight, self.bias = _random(features), _random(features, around=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


# --- statistics of the input --------------------------------------------------------------------------------------
class RootMeanSquareNorm(nn.Module):
    """RMSNorm spelled out, as language models ship it (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = _random(features), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of [N, C, H, W], spelled out as ConvNeXt does (Liu et al. 2022, arXiv:2201.03545)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = _random(channels), _random(channels, around=0.0), eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class FilterResponseNorm(nn.Module):
    """y = max(gamma x / sqrt(nu^2 + |eps|) + beta, tau), nu^2 the mean of x^2 over space (Singh & Krishnan 2020,
    arXiv:1911.09737)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.gamma, self.beta = _random(*shape), _random(*shape, around=0.0)
        self.tau = _random(*shape, around=-0.3)
        self.eps = nn.Parameter(torch.tensor(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2).mean(dim=[2, 3], keepdim=True)
        x = x * torch.rsqrt(square + self.eps.abs())
        return torch.max(self.gamma * x + self.beta, self.tau)


class VarianceNorm(nn.Module):
    """Division by the deviation over space, without centering: gamma x / sqrt(var x + eps) + beta."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.gamma, self.beta, self.eps = _random(*shape), _random(*shape, around=0.0), eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(dim=(2, 3), unbiased=False, keepdim=True)
        return x / torch.sqrt(variance + self.eps) * self.gamma + self.beta


class AdaNorm(nn.Module):
    """phi(y) y with phi = C (1 - k y), phi held constant in training (Xu et al. 2019, arXiv:1911.07013): the deviation
    is unbiased and eps is added to it."""

    def __init__(self, scale: float = 2.0, k: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.scale, self.k, self.eps = scale, k, eps

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        x = x - mean
        centre = x.mean(-1, keepdim=True)
        shrink = (self.k * (x - centre) / (deviation + self.eps)).detach()
        return self.scale * ((x - x * shrink) / (deviation + self.eps))


class MixtureNorm(nn.Module):
    """sum_k p(k|x) / sqrt(lambda_k) (x - mu_k) / sigma_k, then gamma and beta (Kalayeh & Shah 2018, arXiv:1806.02892).

    The mixture is one of K Gaussians with diagonal covariance over the C channels of a position.
    """

    def __init__(self, channels: int, components: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.register_buffer("weights", torch.softmax(torch.randn(components), 0))
        self.register_buffer("means", 0.5 * torch.randn(components, channels))
        self.register_buffer("variances", torch.rand(components, channels) + 0.5)
        self.gamma, self.beta = _random(1, channels, 1, 1), _random(1, channels, 1, 1, around=0.0)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weights, means, variances = (getattr(self, n) for n in ("weights", "means", "variances"))
        shape = (1, *means.shape, 1, 1)
        variances = variances.reshape(shape) + self.eps
        middle = x.unsqueeze(1) - means.reshape(shape)
        density = -0.5 * (middle.pow(2) / variances + torch.log(2 * math.pi * variances)).sum(2)
        prior = weights.reshape(1, -1, 1, 1)
        belongs = torch.softmax(torch.log(prior) + density, dim=1)
        pieces = (belongs / torch.sqrt(prior)).unsqueeze(2) * (middle / torch.sqrt(variances))
        return self.gamma * pieces.sum(1) + self.beta


class EvoNormS0(nn.Module):
    """x sigmoid(v x) / std_group(x) gamma + beta (Liu et al. 2020, arXiv:2004.02967)."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.v, self.gamma, self.beta = _random(*shape), _random(*shape), _random(*shape, around=0.0)
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        grouped = x.reshape(n, self.groups, c // self.groups, h, w)
        variance = grouped.var(dim=(2, 3, 4), unbiased=False, keepdim=True)
        deviation = torch.sqrt(variance + self.eps).expand_as(grouped).reshape(n, c, h, w)
        return x * torch.sigmoid(self.v * x) / deviation * self.gamma + self.beta


# --- weights ------------------------------------------------------------------------------------------------------
class StandardizedConv(nn.Conv2d):
    """(W - mean) / std per filter (Qiao et al. 2019, arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / deviation, self.bias, self.stride, self.padding)


class ScaledStandardizedConv(nn.Conv2d):
    """gain (W - mean) / sqrt(max(var fan_in, eps)) per filter (Brock et al. 2021, arXiv:2101.08692)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = _random(self.out_channels, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fan_in = self.weight[0].numel()
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        scale = torch.rsqrt(torch.maximum(var * fan_in, torch.tensor(1e-4).to(var))) * self.gain
        return F.conv2d(x, self.weight * scale - mean * scale, self.bias, self.stride, self.padding)


class WeightNormDropConnect(nn.Linear):
    """DropConnect (Wan et al. 2013) on a weight-normalized matrix: training drops weights, inference has their mean."""

    def __init__(self, inputs: int, outputs: int, drop: float = 0.3) -> None:
        super().__init__(inputs, outputs)
        self.drop, self.g = drop, _random(outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.g * self.weight / self.weight.norm(dim=1, keepdim=True)
        if self.training:
            weight = weight * torch.bernoulli(torch.full_like(weight, 1 - self.drop))
        else:
            weight = weight * (1 - self.drop)
        return F.linear(x, weight, self.bias)


class _Binarize(torch.autograd.Function):
    """The sign, with a gradient that is not its derivative (a straight-through estimate)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return grads[0] * (weight.abs() <= 1)


class BinaryConv(nn.Conv2d):
    """sign(W) mean|W| per filter (binary-weight networks: Rastegari et al. 2016, arXiv:1603.05279)."""

    def forward(self, x: Tensor) -> Tensor:
        signs: Tensor = _Binarize.apply(self.weight)  # type: ignore[no-untyped-call]
        scale = self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, signs * scale, self.bias, self.stride, self.padding)


# --- other layers next to a batch norm --------------------------------------------------------------------------------
class _NegativeDistance(torch.autograd.Function):
    """-sum_i |w_ki - x_ip|, with the published gradients, which are not its derivatives."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(weight, columns)
        return -(weight.unsqueeze(2) - columns.unsqueeze(0)).abs().sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, columns = ctx.saved_tensors
        difference = columns.unsqueeze(0) - weight.unsqueeze(2)
        grad = grads[0].unsqueeze(1)
        by_weight = (difference * grad).sum(2)
        by_weight = by_weight / by_weight.norm(p=2).clamp(min=1e-12) * math.sqrt(by_weight.numel()) / 5
        return by_weight, (-difference.clamp(-1, 1) * grad).sum(0)


class AdderConv(nn.Module):
    """y_k = -sum_i |x_i - w_ki| over zero-padded patches (AdderNet: Chen et al. 2020, arXiv:1912.13200). The samples of
    a batch are columns of one matrix, the fastest index last."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        filters = self.weight.shape[0]
        height, width = (
            (size - self.kernel + 2 * self.padding) // self.stride + 1 for size in (height, width)
        )
        columns = F.unfold(
            x.view(1, -1, x.shape[2], x.shape[3]), self.kernel, padding=self.padding, stride=self.stride
        )
        columns = columns.view(n, -1, height * width).permute(1, 2, 0).contiguous()
        columns = columns.view(columns.shape[0], -1)
        out: Tensor = _NegativeDistance.apply(self.weight.view(filters, -1), columns)  # type: ignore[no-untyped-call]
        return out.view(filters, height, width, n).permute(3, 0, 1, 2).contiguous()


class CenteredSoftplus(nn.Module):
    """(softplus(b x) - log 2) / b with a learned b > 0 (Srinivas et al. 2022, arXiv:2206.07144)."""

    def __init__(self, log_beta: float = 1.5) -> None:
        super().__init__()
        self.log_beta = nn.Parameter(torch.tensor(log_beta))

    def forward(self, x: Tensor) -> Tensor:
        beta = self.log_beta.exp() + 1e-3
        return (F.softplus(beta * x) - math.log(2.0)) / beta


class Polynomial(nn.Module):
    """a x^2 + b x + c, which homomorphic encryption can evaluate (Chabanne et al. 2017, ePrint 2017/035)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v)) for v in (0.4, 0.7, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x**2 + self.b * x + self.c


class FocusedConv(nn.Conv2d):
    """A convolution of what lies in the area of interest, where the channels' sum reaches a threshold (Tan et al. 2022,
    doi:10.1109/AICAS54282.2022.9870012)."""

    threshold: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        inside = x.sum(1, keepdim=True) >= self.threshold
        return super().forward(x * inside.to(x.dtype))
