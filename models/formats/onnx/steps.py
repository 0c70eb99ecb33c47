"""The steps of a plan: an ONNX node, the function that computes it, and where its arguments come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.formats.onnx.batch import Batched
from models.formats.onnx.patterns import Known
from models.formats.onnx.registry import Node
from models.formats.onnx.values import Numbers


@dataclass(frozen=True)
class Variable:
    """An argument that depends on the image, by the name of the ONNX value."""

    name: str


@dataclass(frozen=True)
class Constant:
    """An argument that is a weight, by the name that the file gives it."""

    value: Known


@dataclass(frozen=True, eq=False)
class Static:
    """An argument that Python knows: numbers, a scalar, or nothing."""

    value: Numbers | float | int | None


Argument = Variable | Constant | Static | Batched


@dataclass(frozen=True, eq=False)
class Step:
    """One node to run: on tensors, or (`sizes`) on numbers; `release` are the values not read after it."""

    node: Node
    run: Callable[..., Any]
    arguments: tuple[Argument, ...]
    sizes: bool
    release: tuple[str, ...] = ()
