"""ONNX files before any ONNX tool sees them: decoded, and nothing in them that a tool would hang or crash on.

Decoding alone is no danger once the bytes are counted (protobuf stops at a depth of 100, and makes about 80 bytes of a
message); everything behind it is: inliners, checkers and runtimes follow calls without end and believe declared sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fusion.errors import BadFile
from models.scan.external import embed
from models.scan.functions import STANDARD, check_functions
from models.scan.graphs import check_order, check_size
from models.scan.signatures import check_signatures
from models.scan.tensors import check_tensors, check_types
from models.scan.wire import Bounds, damaged, survey

_OLDEST_OPSET = 7

_KIB, _MIB = 2**10, 2**20
# 50,000 nodes with everything that exporters note about each come to about two million values.
_BOUNDS = Bounds(
    depth=100,
    fields=5_000_000,
    text=16 * _KIB,
    texts={"StringStringEntryProto.value": 16 * _MIB}
    | {
        f"{message}Proto.doc_string": None
        for message in "Model Graph Node Attribute Tensor ValueInfo Function".split()
    },
)


def decode(data: bytes, name: str) -> onnx.ModelProto:
    """A file's bytes as protobuf, checked; `name` is for messages only.

    The data of its tensors is copied. No path that it holds is followed. Raises BadFile.
    """
    proto = parse(data, name)
    embed(proto, None, name)
    check(proto, name)
    return proto


def parse(data: bytes, name: str) -> onnx.ModelProto:
    """A file's bytes as protobuf, counted and not looked into any further. Raises BadFile."""
    survey(data, onnx.ModelProto.DESCRIPTOR, _BOUNDS, name)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise damaged(name) from error
    if not proto.ir_version or not proto.opset_import or not proto.graph.node:
        raise BadFile(f"{name} is not a readable ONNX file: it holds no network. Export it again.")
    return proto


def check(proto: onnx.ModelProto, name: str) -> None:
    """Refuse what a tool would hang or crash on, in a network that has all its data. Raises as `decode`."""
    for refuse in _CHECKS:
        refuse(proto, name)


def _check_opset(proto: onnx.ModelProto, name: str) -> None:
    """Refuse versions of the standard that are not read, in the network and in each function that states its own."""
    _check_version(proto.opset_import, name)
    for function in proto.functions:
        if any(o.domain in STANDARD for o in function.opset_import):
            _check_version(function.opset_import, f"{name} (in its function '{function.name}')")


def _check_version(imports: Iterable[onnx.OperatorSetIdProto], name: str) -> None:
    opsets = {o.domain: o.version for o in imports}
    version = max((opsets[domain] for domain in STANDARD if domain in opsets), default=0)
    if version < _OLDEST_OPSET:
        raise BadFile(
            f"{name} uses ONNX opset {version}; opsets from {_OLDEST_OPSET} on are read. "
            "Export it with a newer one."
        )
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise BadFile(
            f"{name} uses ONNX opset {version}; opsets up to {newest} are read. Export it with an older one."
        )


# Counted first, so that none of the others takes longer than the file is large.
_CHECKS: tuple[Callable[[onnx.ModelProto, str], None], ...] = (
    check_size,
    _check_opset,
    check_tensors,
    check_types,
    check_functions,
    check_order,
    check_signatures,
)
