"""Operators that the ONNX standard defines by other operators: their definitions, for those without a function here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import SymInt, Tensor

from models.formats.onnx.file import function_body
from models.formats.onnx.registry import Body, Node

_CODES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int8: onnx.TensorProto.INT8,
    torch.int16: onnx.TensorProto.INT16,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
    torch.bool: onnx.TensorProto.BOOL,
}


def defined() -> set[str]:
    """The operators of the standard that it defines by others."""
    schemas: Any = onnx.defs.get_all_schemas()
    return {
        schema.name
        for schema in schemas
        if not schema.domain and (schema.has_function or schema.has_context_dependent_function)
    }


def definition(node: Node, look: Callable[[str], Any]) -> Body | None:
    """The body that ONNX gives a node's operator; None where it gives none, or where it depends on types that `look`
    does not know (yet)."""
    if not onnx.defs.has(node.op, ""):
        return None
    schema: Any = onnx.defs.get_schema(node.op, node.opset, "")  # onnx's stubs lack its functions
    attributes = {key: _attribute(key, value) for key, value in node.attributes.items()}
    call = helper.make_node(node.op, list(node.inputs), list(node.outputs))
    call.attribute.extend(attributes.values())
    call.attribute.extend(
        attribute.default_value
        for key, attribute in schema.attributes.items()
        if key not in attributes and attribute.default_value.name
    )
    if schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= node.opset]
        stored = schema.get_function_with_opset_version(max(versions)) if versions else None
    elif schema.has_context_dependent_function:
        types = [_type(look(name)) if name else onnx.TypeProto() for name in node.inputs]
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= node.opset]
        if not versions or any(kind is None for kind in types):
            return None
        stored = schema.get_context_dependent_function_with_opset_version(
            max(versions), call.SerializeToString(), [t.SerializeToString() for t in types if t is not None]
        )
    else:
        return None
    if not stored:
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(stored)
    return function_body(function, call)


def _attribute(key: str, value: Any) -> onnx.AttributeProto:
    if isinstance(value, np.ndarray):
        return helper.make_attribute(key, numpy_helper.from_array(value))
    return helper.make_attribute(key, value)


def _type(value: Any) -> onnx.TypeProto | None:
    """The type and shape of a value, free sizes left out; None of nothing known."""
    if isinstance(value, Tensor):
        shape = [None if isinstance(size, SymInt) else int(size) for size in value.shape]
        return helper.make_tensor_type_proto(_CODES[value.dtype], shape)
    if isinstance(value, np.ndarray):
        return helper.make_tensor_type_proto(onnx.TensorProto.INT64, list(value.shape))
    return None
