"""The one primitive of the surrogate graph: a value whose gradient is somebody else's, weighed by a factor.

Relevance is R(t) = t * g(t), with g the gradient in the surrogate graph. A rule therefore only has to replace a
node y by another expression with the same value and the derivative sum_j factor_j * d carrier_j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

# Where the samples are in a tensor: the axis that follows the batch, and how many values of that axis are slower
# than the sample: (0, 1) for [N, ...], (1, 1) for [L, N, ...], (0, L) for [L * N, ...].
Place: TypeAlias = tuple[int, int]


class Recorder(Protocol):
    """Takes what a node received and what it passed on, summed per sample."""

    count: int  # samples

    def record(self, key: str, received: Tensor, passed: Tensor) -> None: ...


def per_sample(t: Tensor, place: Place, count: int) -> Tensor:
    """Sum of everything but the batch, in float64: -> [count]."""
    axis, outer = place
    return t.movedim(axis, 0).reshape(outer, count, -1).sum((0, 2), dtype=torch.float64)


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder | None,
        key: str,
        degree: int,
        place: Place,
        value: Tensor,
        count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        carriers, factors, offsets = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        ctx.recorder, ctx.key, ctx.degree, ctx.place, ctx.count = recorder, key, degree, place, count
        if recorder is None:
            ctx.save_for_backward(*factors)
        else:
            ctx.save_for_backward(*factors, value, *carriers, *offsets)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        saved = ctx.saved_tensors
        factors = saved[: ctx.count]
        passed = [grad if factor is None else grad * factor for factor in factors]
        if ctx.recorder is not None:
            value, rest = saved[ctx.count], saved[ctx.count + 1 :]
            carriers, offsets = rest[: ctx.count], rest[ctx.count :]
            place, samples = ctx.place, ctx.recorder.count
            total = torch.zeros(samples, dtype=torch.float64, device=value.device)
            for carrier, offset, g in zip(carriers, offsets, passed, strict=True):
                # A carrier that is homogeneous of degree d (up to its constant offset) hands on d times its value.
                own = carrier if offset is None else carrier - offset
                total = total + ctx.degree * per_sample(own * g, place, samples)
            ctx.recorder.record(ctx.key, per_sample(value * grad, place, samples), total)
        return (None, None, None, None, None, None, *passed, *[None] * (2 * ctx.count))


def graft(
    recorder: Recorder | None,
    key: str,
    value: Tensor,
    carriers: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    offsets: Sequence[Tensor | None],
    degree: int = 1,
    place: Place = (0, 1),
) -> Tensor:
    """`value`, with gradient sum_j factors[j] * d carriers[j]; a factor of None counts as one.

    offsets: the part of each carrier that depends on no input (a bias), None for none: the recorder is told that
    this part of the relevance stays here. degree: the degree of homogeneity of the carriers, 2 for products.
    """
    tensors = (*carriers, *factors, *offsets)
    return _Graft.apply(recorder, key, degree, place, value.detach(), len(carriers), *tensors)  # type: ignore[no-any-return]


def by_sample(amounts: Tensor, like: Tensor, place: Place) -> Tensor:
    """[count] -> a tensor that broadcasts against `like`, each value at its sample's place."""
    axis, outer = place
    size, count = like.shape[axis], len(amounts)
    values = amounts[None, :, None].expand(outer, count, size // (outer * count)).reshape(size)
    return values.reshape([size if i == axis else 1 for i in range(like.ndim)])


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder | None,
        key: str,
        place: Place,
        value: Tensor,
        carrier: Tensor,
        samples: Tensor,
    ) -> Tensor:
        ctx.recorder, ctx.key, ctx.place, ctx.count = recorder, key, place, len(samples)
        ctx.save_for_backward(value, carrier)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        value, carrier = ctx.saved_tensors
        place, count = ctx.place, ctx.count
        towards = grads[0] * value.sign()
        came, went = (per_sample(t, place, count) for t in (value * grads[0], carrier * towards))
        scale = ratio(came, went)
        if ctx.recorder is not None:
            ctx.recorder.record(ctx.key, came, went * scale)
        return None, None, None, None, towards * by_sample(scale, towards, place).to(towards.dtype), None


def balanced(
    recorder: Recorder | None, key: str, value: Tensor, carrier: Tensor, samples: Tensor, place: Place
) -> Tensor:
    """`value`, with the gradient c sign(value) d carrier, c such that relevance is conserved in every sample (where any
    reaches the carrier at all). samples: any tensor [N, ...]."""
    return _Balanced.apply(recorder, key, place, value.detach(), carrier, samples)  # type: ignore[no-any-return]


def share(t: Tensor, part: float) -> Tensor:
    """t, with `part` of its gradient."""
    fixed = t.detach()
    return fixed + part * (t - fixed)


class _Sink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, key: str, place: Place, constant: Tensor, anchor: Tensor
    ) -> Tensor:
        ctx.recorder, ctx.key, ctx.place = recorder, key, place
        ctx.save_for_backward(constant)
        return constant.view_as(constant)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (constant,) = ctx.saved_tensors
        amount = per_sample(constant * grads[0], ctx.place, ctx.recorder.count)
        ctx.recorder.record(ctx.key, amount, torch.zeros_like(amount))
        return None, None, None, None, None


def sink(
    recorder: Recorder | None,
    key: str,
    constant: Tensor,
    anchor: Tensor,
    like: Tensor | None = None,
    place: Place = (0, 1),
) -> Tensor:
    """A constant that keeps the relevance it receives and tells the recorder.

    anchor: any tensor of the batch that requires a gradient. like: the tensor [N, ...] that the constant is broadcast
    against, so that every sample has its own share; None where the constant has a batch axis already.
    """
    if recorder is None:
        return constant
    if like is not None:
        shape = torch.broadcast_shapes(constant.shape, like.shape)  # type: ignore[no-untyped-call]
        constant = constant.expand(shape)
    return _Sink.apply(recorder, key, place, constant, anchor)  # type: ignore[no-any-return]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorder: Recorder, key: str, sign: int, place: Place, t: Tensor) -> Tensor:
        ctx.recorder, ctx.key, ctx.sign, ctx.place = recorder, key, sign, place
        ctx.save_for_backward(t)
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (t,) = ctx.saved_tensors
        amount = per_sample(t * grads[0], ctx.place, ctx.recorder.count)
        zero = torch.zeros_like(amount)
        ctx.recorder.record(ctx.key, *((amount, zero) if ctx.sign > 0 else (zero, amount)))
        return None, None, None, None, grads[0]


def received(recorder: Recorder | None, key: str, t: Tensor, place: Place = (0, 1)) -> Tensor:
    """t itself; the recorder learns its relevance as what node `key` received."""
    return t if recorder is None else _Tap.apply(recorder, key, 1, place, t)


def passed(recorder: Recorder | None, key: str, t: Tensor, place: Place = (0, 1)) -> Tensor:
    """t itself; the recorder learns the relevance that node `key` passed to it."""
    return t if recorder is None else _Tap.apply(recorder, key, -1, place, t)


def stabilize(t: Tensor, epsilon: float) -> Tensor:
    """t + epsilon sign(t) with sign(0) = +1."""
    if epsilon == 0:
        return t
    # Not t + where(t >= 0, epsilon, -epsilon): of two Python numbers that would be float32.
    return torch.where(t >= 0, t + epsilon, t - epsilon)


def ratio(numerator: Tensor, denominator: Tensor, epsilon: float = 0.0) -> Tensor:
    """numerator / stabilize(denominator), and 0 where the denominator is exactly 0 all the same."""
    denominator = stabilize(denominator, epsilon)
    quotient = numerator / denominator
    return quotient if epsilon else torch.where(denominator == 0, torch.zeros_like(quotient), quotient)


def spread(t: Tensor, samples: Tensor, place: Place) -> Tensor:
    """The root mean square of each sample's values, to broadcast against them. samples: any [N, ...]."""
    (axis, outer), count = place, len(samples)
    grouped = t.detach().movedim(axis, 0).reshape(outer, count, -1)
    norms = torch.linalg.vector_norm(grouped, dim=(0, 2), dtype=torch.float64)  # no square overflows in it
    mean = norms * (count / max(1, t.numel())) ** 0.5
    return by_sample(mean, t, place)


def relative_ratio(
    numerator: Tensor, denominator: Tensor, epsilon: float, samples: Tensor, place: Place
) -> Tensor:
    """`ratio` with epsilon times the root mean square of the denominators of the same sample. samples: any [N, ...]."""
    margin = (epsilon * spread(denominator, samples, place)).to(denominator.dtype)
    return ratio(numerator, torch.where(denominator >= 0, denominator + margin, denominator - margin))
