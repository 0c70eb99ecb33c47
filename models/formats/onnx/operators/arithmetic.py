"""Elementwise arithmetic, comparisons and logic, with broadcasting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.formats.onnx.registry import Node, operator

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}


@operator(*_UNARY)
def unary(node: Node, x: Tensor) -> Tensor:
    return _UNARY[node.op](x)


def _is_integer(*values: Any) -> bool:
    return not any(v.is_floating_point() if isinstance(v, Tensor) else isinstance(v, float) for v in values)


def _divide(a: Any, b: Any) -> Any:
    """ONNX's integers divide toward zero, as C's do."""
    return torch.div(a, b, rounding_mode="trunc") if _is_integer(a, b) else a / b


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Equal": lambda a, b: a == b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
}


@operator(*_BINARY, since=7, scalars=True)
def binary(node: Node, a: Any, b: Any) -> Tensor:
    result = _BINARY[node.op](a, b)
    assert isinstance(result, Tensor)
    return result


_LOGIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}


@operator(*_LOGIC, since=7)
def logic(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return _LOGIC[node.op](a, b)


@operator("Pow", since=7, scalars=True)
def power(node: Node, a: Any, b: Any) -> Tensor:
    """The result has the base's type."""
    result = torch.pow(a, b)
    return result.to(a.dtype) if isinstance(a, Tensor) else result


@operator("Mod", since=10)
def modulo(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@operator("BitShift", since=11)
def bit_shift(node: Node, x: Tensor, amount: Tensor) -> Tensor:
    left = node.get("direction") == "LEFT"
    return torch.bitwise_left_shift(x, amount) if left else torch.bitwise_right_shift(x, amount)


_VARIADIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
    "Mean": torch.add,
}


@operator(*_VARIADIC, since=6)
def variadic(node: Node, *tensors: Tensor) -> Tensor:
    result = functools.reduce(_VARIADIC[node.op], tensors)
    return result / len(tensors) if node.op == "Mean" else result


@operator("Where", since=9)
def where(node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@operator("IsInf", since=10)
def is_inf(node: Node, x: Tensor) -> Tensor:
    up, down = node.get("detect_positive", 1), node.get("detect_negative", 1)
    signs = [sign(x) for sign, wanted in ((torch.isposinf, up), (torch.isneginf, down)) if wanted]
    return functools.reduce(torch.logical_or, signs, torch.zeros_like(x, dtype=torch.bool))
