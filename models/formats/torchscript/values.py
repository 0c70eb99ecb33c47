"""TorchScript operations on plain Python values: a registry of one small function per operation."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.formats.torchscript.program import Node
from models.formats.torchscript.quantized import Quantized

Values = Sequence[Any]
PRIMS: dict[str, Callable[[Node, Values], Any]] = {}
PYTHON: dict[str, Callable[..., Any]] = {}

# TorchScript writes dtypes, layouts and memory formats as integers (c10/core/ScalarType.h, MemoryFormat.h).
DTYPES: dict[int, torch.dtype] = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    8: torch.complex32,
    9: torch.complex64,
    10: torch.complex128,
    11: torch.bool,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
}
CODES: dict[torch.dtype, int] = {dtype: code for code, dtype in DTYPES.items()}
LAYOUTS: dict[int, torch.layout] = {0: torch.strided}
MEMORY_FORMATS: dict[int, torch.memory_format] = {
    0: torch.contiguous_format,
    1: torch.preserve_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
}
CONVERSIONS: dict[str, dict[int, Any]] = {
    "ScalarType": DTYPES,
    "Optional[ScalarType]": DTYPES,
    "Layout": LAYOUTS,
    "Optional[Layout]": LAYOUTS,
    "MemoryFormat": MEMORY_FORMATS,
    "Optional[MemoryFormat]": MEMORY_FORMATS,
}


def as_argument(value: Any, type_name: str) -> Any:
    """The value as `torch.ops` wants it for an argument of that type."""
    table = CONVERSIONS.get(type_name)
    return table[value] if table is not None and isinstance(value, int) else value


def prim(*kinds: str) -> Callable[[Callable[[Node, Values], Any]], Callable[[Node, Values], Any]]:
    def register(function: Callable[[Node, Values], Any]) -> Callable[[Node, Values], Any]:
        PRIMS.update(dict.fromkeys(kinds, function))
        return function

    return register


@prim("prim::ListConstruct")
def _list(_: Node, values: Values) -> Any:
    return list(values)


@prim("prim::TupleConstruct")
def _tuple(_: Node, values: Values) -> Any:
    return tuple(values)


@prim("prim::DictConstruct")
def _dict(_: Node, values: Values) -> Any:
    return dict(zip(values[::2], values[1::2], strict=True))


@prim("prim::ListUnpack", "prim::TupleUnpack")
def _unpack(_: Node, values: Values) -> Any:
    return tuple(values[0])


@prim("prim::TupleIndex")
def _tuple_index(_: Node, values: Values) -> Any:
    return values[0][values[1]]


@prim("prim::TupleSlice")
def _tuple_slice(node: Node, values: Values) -> Any:
    return values[0][node.attributes["beg"] : node.attributes["end"]]


@prim("prim::NumToTensor", "prim::unchecked_cast", "prim::unchecked_unwrap_optional")
def _same(_: Node, values: Values) -> Any:
    return values[0]


_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor, Quantized),
    "int": (int, torch.SymInt),
    "float": (float, torch.SymFloat),
    "bool": (bool, torch.SymBool),
    "str": (str,),
    "NoneType": (type(None),),
}


@prim("prim::isinstance")
def _isinstance(node: Node, values: Values) -> Any:
    kinds = [_KINDS.get(name, (list, tuple, dict)) for name in node.attributes["types"]]
    return any(isinstance(values[0], kind) for kind in kinds)


@prim("prim::Uninitialized", "prim::Print", "prim::Warn")
def _nothing(_: Node, __: Values) -> Any:
    return None


@prim("prim::device")
def _device(_: Node, values: Values) -> Any:
    return values[0].device


@prim("prim::type")
def _device_type(_: Node, values: Values) -> Any:
    return values[0].type


@prim("prim::dtype")
def _dtype(_: Node, values: Values) -> Any:
    return CODES[values[0].dtype]


@prim("prim::layout")
def _layout(_: Node, __: Values) -> Any:
    return 0


@prim("prim::is_quantized")
def _is_quantized(_: Node, values: Values) -> Any:
    return isinstance(values[0], Quantized)


@prim("prim::is_cuda", "prim::is_sparse", "prim::is_mkldnn", "prim::is_nested")
def _no(_: Node, __: Values) -> Any:
    # The answer of a dense tensor on a CPU: the captured graph is moved to other devices as a whole.
    return False


@prim("prim::shape")
def _shape(_: Node, values: Values) -> Any:
    return list(values[0].shape)


@prim("prim::min")
def _min(_: Node, values: Values) -> Any:
    return min(values[0]) if len(values) == 1 else min(values)


@prim("prim::max")
def _max(_: Node, values: Values) -> Any:
    return max(values[0]) if len(values) == 1 else max(values)


@prim("prim::abs")
def _abs(_: Node, values: Values) -> Any:
    return abs(values[0])


@prim("prim::data", "prim::requires_grad")
def _data(node: Node, values: Values) -> Any:
    return values[0].detach() if node.kind == "prim::data" else False


def _size(x: Any, dim: int | None = None) -> Any:
    return list(x.shape) if dim is None else x.shape[dim]


def _add(a: Any, b: Any, alpha: Any = 1) -> Any:
    return a + b if isinstance(a, list | str) else a + alpha * b


def _append(items: list[Any], item: Any) -> list[Any]:
    items.append(item)
    return items


def _contains(items: Any, item: Any) -> bool:
    return any(item is other or (not isinstance(item, Tensor) and item == other) for other in items)


def _set_item(items: Any, key: Any, value: Any) -> Any:
    items[key] = value
    return items


def _slice(items: Any, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    return items[start:end:step]


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    rounding = {None: lambda q: q, "floor": math.floor, "trunc": math.trunc}
    return a // b if rounding_mode == "floor" else rounding[rounding_mode](a / b)


def _number(kind: type) -> Callable[..., Any]:
    def convert(value: Any) -> Any:
        # int() of a symbolic size would fix it to the example's.
        return value if kind is int and isinstance(value, torch.SymInt) else kind(value)

    return convert


def _floor(value: Any) -> Any:
    return value if isinstance(value, torch.SymInt) else math.floor(value)


def _ceil(value: Any) -> Any:
    return value if isinstance(value, torch.SymInt) else math.ceil(value)


def _clamp(value: Any, low: Any = None, high: Any = None) -> Any:
    value = value if low is None else torch.sym_max(value, low)
    return value if high is None else torch.sym_min(value, high)


def _range_length(low: Any, high: Any, step: Any) -> Any:
    return len(range(low, high, step))


# Reads of a tensor's shape and type: they take tensors, but no tensor computation comes of them.
ABOUT_TENSORS: dict[str, Callable[..., Any]] = {
    "aten::size": _size,
    "aten::dim": lambda x: x.dim(),
    "aten::ndimension": lambda x: x.dim(),
    "aten::numel": lambda x: x.numel(),
    "aten::len": lambda x: x.shape[0] if isinstance(x, Tensor | Quantized) else len(x),
    "aten::is_floating_point": lambda x: x.is_floating_point(),
    "aten::is_complex": lambda x: x.is_complex(),
    "aten::is_contiguous": lambda x: True,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    "aten::append": _append,
    "aten::insert": lambda items, index, item: items.insert(index, item),
    "aten::_set_item": _set_item,
    "aten::__contains__": _contains,
    "aten::list": list,
    "aten::to.prim_dtype": lambda x, dtype, *_: x if dtype is None else x.to(DTYPES[dtype]),
    "aten::to.prim_Device": lambda x, device, dtype=None, *_: x if dtype is None else x.to(DTYPES[dtype]),
    "aten::to.prim_other": lambda x, *_: x,
}

# Conversions of a 0-d tensor to a number; what tracing recorded as one is mostly a size.
CASTS = frozenset(
    f"aten::{kind}" for kind in ("Int", "Float", "Bool", "IntImplicit", "FloatImplicit", "ScalarImplicit")
)

PYTHON.update(
    {
        "aten::Int": _number(int),
        "aten::Float": _number(float),
        "aten::Bool": _number(bool),
        "aten::IntImplicit": _number(int),
        "aten::FloatImplicit": _number(float),
        "aten::ScalarImplicit": lambda a: a,
        "aten::add": _add,
        "aten::sub": lambda a, b, alpha=1: a - alpha * b,
        "aten::rsub": lambda a, b, alpha=1: b - alpha * a,
        "aten::mul": operator.mul,
        "aten::div": _divide,
        "aten::floordiv": operator.floordiv,
        "aten::floor_divide": operator.floordiv,
        "aten::__floordiv__": operator.floordiv,
        "aten::remainder": operator.mod,
        "aten::pow": operator.pow,
        "aten::neg": operator.neg,
        "aten::floor": _floor,
        "aten::ceil": _ceil,
        "aten::clamp": _clamp,
        "aten::clamp_min": _clamp,
        "aten::clamp_max": lambda a, high: _clamp(a, high=high),
        "aten::round": round,
        "aten::sqrt": math.sqrt,
        "aten::log": math.log,
        "aten::exp": math.exp,
        "aten::eq": operator.eq,
        "aten::ne": operator.ne,
        "aten::lt": operator.lt,
        "aten::le": operator.le,
        "aten::gt": operator.gt,
        "aten::ge": operator.ge,
        "aten::__and__": operator.and_,
        "aten::__or__": operator.or_,
        "aten::__xor__": operator.xor,
        "aten::__not__": operator.not_,
        "aten::__getitem__": operator.getitem,
        "aten::select": lambda items, _, index: items[index],
        "aten::slice": _slice,
        "aten::extend": lambda items, more: items.extend(more),
        "aten::pop": lambda items, index=-1: items.pop(index),
        "aten::reverse": lambda items: items.reverse(),
        "aten::copy": lambda items: items.copy(),
        "aten::keys": lambda items: list(items.keys()),
        "aten::values": lambda items: list(items.values()),
        "aten::items": lambda items: list(items.items()),
        "aten::get": lambda items, key, default=None: items.get(key, default),
        "aten::sum": sum,
        "aten::__range_length": _range_length,
        "aten::__derive_index": lambda index, start, step: start + index * step,
        "aten::format": lambda text, *values: text.format(*values),
        "aten::str": str,
        "aten::percentFormat": lambda text, *values: text % values,
        "aten::warn": lambda *_: None,
        # With gradients on, scripted attention takes its readable path and not one fused, opaque operator.
        "aten::is_grad_enabled": lambda: True,
        "aten::is_autocast_enabled": lambda *_: False,
        "aten::is_scripting": lambda: True,
    }
)
