"""Attention as one operator: torch's scaled dot product, on which the rules for attention hang.

What that has not (a soft cap, the weights as an output, lengths per sample) is read by ONNX's own definition of the
operator in `expansion`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.formats.onnx.registry import Node, operator


@operator("Attention", since=23)
def attention(
    node: Node,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The answer in the query's layout ([N, L, heads * E] or [N, heads, L, E]), then all keys and all values."""
    flat = query.ndim == 3
    heads, sources = node.get("q_num_heads", 0), node.get("kv_num_heads", 0)
    if flat:
        query, key, value = split_heads(query, heads), split_heads(key, sources), split_heads(value, sources)
    past = 0 if past_key is None else past_key.shape[2]
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    shared = query.shape[1] // key.shape[1]
    every_key, every_value = (t.repeat_interleave(shared, 1) if shared > 1 else t for t in (key, value))
    y = dot_product(
        query, every_key, every_value, mask, node.get("scale"), bool(node.get("is_causal", 0)), past
    )
    return merge_heads(y) if flat else y, key, value


def dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
    past: int,
) -> Tensor:
    """softmax(scale q kᵀ + mask) v over [N, heads, L, E]; `causal` lets the i-th query see the first past + i keys."""
    if causal and (mask is not None or past):
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(past)
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = torch.logical_and(mask, seen)
        else:
            mask = torch.where(seen, mask, -torch.inf)
        causal = False
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, L, heads * E] as [N, heads, L, E]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[N, heads, L, E] as [N, L, heads * E]."""
    return x.transpose(1, 2).flatten(2)
