"""ONNX Runtime's own attention operators (domain com.microsoft), as the standard's.

A mask there says which keys may be seen, and a large negative number is added to the logits of those that may not.
Pasts belong to language models that write word by word, and are refused.

Facts: ONNX Runtime's schemas of its contributed operators, and its kernels for the CPU.
"""

from __future__ import annotations

import torch
from torch import SymInt

from models.formats.onnx.lowering import MICROSOFT, Writer, lowering

_MASKS = ("mask_filter_value",)


@lowering(
    "Attention",
    domain=MICROSOFT,
    attributes=(*_MASKS, "num_heads", "qkv_hidden_sizes", "scale", "unidirectional", "do_rotary"),
)
def attention(
    write: Writer,
    x: str,
    w: str,
    b: str = "",
    mask: str = "",
    past: str = "",
    bias: str = "",
    length: str = "",
) -> tuple[str, ...] | None:
    """Queries, keys and values by one matrix, then attention; `bias` is added to the weights' logits."""
    if past or length or write.get("do_rotary", 0):
        raise write.refused("with a past or rotary positions")
    if mask:
        hidden = _hidden(write, mask, x)
        if hidden is None:
            return None
        bias = write("Add", hidden, bias) if bias else hidden
    y = write("MatMul", x, w)
    y = write("Add", y, b) if b else y
    sizes = list(write.get("qkv_hidden_sizes") or [write.weight(w).shape[1] // 3] * 3)
    query, key, value = write.several("Split", y, write.constant(sizes, torch.int64), count=3, axis=-1)
    return (_attended(write, query, key, value, bias),)


@lowering(
    "QAttention", domain=MICROSOFT, attributes=(*_MASKS, "num_heads", "scale", "unidirectional", "do_rotary")
)
def quantized_attention(
    write: Writer,
    x: str,
    w: str,
    b: str,
    xs: str,
    ws: str,
    mask: str = "",
    xz: str = "",
    wz: str = "",
    past: str = "",
) -> tuple[str, ...]:
    settings = write.given(*_MASKS, "num_heads", "scale", "unidirectional", "do_rotary")
    floats = (write("DequantizeLinear", x, xs, xz), write("DequantizeLinear", w, ws, wz, axis=1))
    return (write("Attention", *floats, b, mask, past, domain=MICROSOFT, **settings),)


@lowering(
    "MultiHeadAttention", domain=MICROSOFT, attributes=(*_MASKS, "num_heads", "scale", "unidirectional")
)
def multi_head_attention(
    write: Writer, query: str, key: str = "", value: str = "", b: str = "", *rest: str
) -> tuple[str, ...] | None:
    """Queries [N, L, heads * E] with keys and values in the same layout; keys and values in one [N, L, heads, 2, E]; or
    all three in one [N, L, heads, 3, E]. A bias of all three is added first. Further inputs: a mask, a bias of the
    logits, a past."""
    mask, bias, *past = (*rest, "", "")
    if any(past):
        raise write.refused("with a past")
    ranks = [write.rank(name) for name in (query, key) if name]
    if None in ranks:
        return None
    if mask:
        hidden = _hidden(write, mask, key or query)
        if hidden is None:
            return None
        bias = write("Add", hidden, bias) if bias else hidden
    if not key:
        query, key, value = _unpacked(write, query, 3)
    elif ranks == [3, 5] and not value:
        key, value = _unpacked(write, key, 2)
    elif ranks != [3, 3] or not value:
        raise write.refused("with keys of another layout")
    if b:
        size = write.weight(b).shape[0] // 3
        if write.look(query) is not None:
            size = int(write.look(query).shape[2])
        sizes = write.constant([size, size, write.weight(b).shape[0] - 2 * size], torch.int64)
        parts = write.several("Split", b, sizes, count=3, axis=0)
        query, key, value = (write("Add", t, p) for t, p in zip((query, key, value), parts, strict=True))
    return (_attended(write, query, key, value, bias),)


def _unpacked(write: Writer, packed: str, count: int) -> list[str]:
    """[N, L, heads, count, E] as so many of [N, L, heads * E]."""
    first = write("Transpose", packed, perm=(3, 0, 1, 2, 4))
    parts = write.several("Split", first, count=count, axis=0, num_outputs=count)
    flat, zero = write.constant([0, 0, -1], torch.int64), write.constant([0], torch.int64)
    return [write("Reshape", write("Squeeze", part, zero), flat) for part in parts]


def _attended(write: Writer, query: str, key: str, value: str, bias: str) -> str:
    heads = write.get("num_heads")
    return write(
        "Attention", query, key, value, bias,
        q_num_heads=heads, kv_num_heads=heads, scale=write.get("scale"), is_causal=write.get("unidirectional", 0),
    )  # fmt: skip


def _hidden(write: Writer, mask: str, keys: str) -> str | None:
    """What a mask adds to the logits [N, heads, L, keys]; None where its shape or theirs is not known yet.

    A mask [N, keys] or [N, L, keys] has 0 for keys that may not be seen; one of a single dimension has how many of an
    image's keys there are, or, with two entries for one image, before which key they end and at which they begin.
    """
    rank, image = write.rank(mask), write.look(keys)
    if rank is None or image is None:
        return None
    whole = write("Cast", mask, to=7)
    if rank == 1:
        count = image.shape[1]
        if isinstance(count, SymInt):
            raise write.refused("with a mask of a length that follows the batch")
        places = write.constant(torch.arange(int(count)))
        seen = _within(write, mask, whole, places)
    elif rank in (2, 3):
        seen = write("Greater", whole, write.constant(0, torch.int64))
    else:
        raise write.refused(f"with a mask of {rank} dimensions")
    seen = write("Unsqueeze", seen, write.constant([1] if rank == 3 else [1, 2], torch.int64))
    return write("Where", seen, write.constant(0.0), write.constant(write.get("mask_filter_value", -10000.0)))


def _within(write: Writer, mask: str, whole: str, places: str) -> str:
    """Whether keys are among those that one number says for each image, or two for a single one."""
    one = write.constant([1], torch.int64)
    entries = write.look(mask).shape[0]
    if entries == 2 and mask in write.known:
        end, start = write.several("Split", whole, count=2, axis=0, num_outputs=2)
        after = write("GreaterOrEqual", places, write("Unsqueeze", start, one))
        return write("And", write("Less", places, write("Unsqueeze", end, one)), after)
    if mask in write.known and entries != 1:
        raise write.refused(f"with a mask of {entries} numbers")
    return write("Less", places, write("Unsqueeze", whole, one))
