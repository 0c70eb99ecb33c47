"""Matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.formats.onnx.registry import OWN, Node, operator


@operator("Linear", domain=OWN)
def linear(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a Gemm or MatMul with constant weights becomes; the weight comes as [outputs, inputs]."""
    return F.linear(x, weight, bias)


@operator("MatMul")
def matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator("Gemm", since=7)
def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """The general case; constant weights make a Linear of it before."""
    a = a.t() if node.get("transA", 0) else a
    b = b.t() if node.get("transB", 0) else b
    y = torch.matmul(a, b)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    y = y if alpha == 1 else alpha * y
    return y if c is None or beta == 0 else y + (c if beta == 1 else beta * c)


@operator("Det", since=11)
def determinant(node: Node, x: Tensor) -> Tensor:
    return torch.det(x)


@operator("Einsum", since=12)
def einsum(node: Node, *tensors: Tensor) -> Tensor:
    return torch.einsum(node.get("equation").replace(" ", ""), *tensors)
