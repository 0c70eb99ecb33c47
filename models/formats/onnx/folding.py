"""What depends on constants only, computed once: rearranged weights, tables, whole files whose inputs are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fusion.errors import BadFile, UnsupportedOperator
from models.formats.onnx import lowerings, operators  # noqa: F401  (they fill the registries)
from models.formats.onnx.expansion import Worklist, expand, why_not
from models.formats.onnx.explained import explained
from models.formats.onnx.file import OnnxFile
from models.formats.onnx.names import with_path
from models.formats.onnx.patterns import Known, live
from models.formats.onnx.registry import OPTIMIZED, OWN, Node, Operator, find
from models.formats.onnx.values import Numbers, as_tensor


def evaluate(file: OnnxFile, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What a file computes of these inputs, all of its outputs, through the functions that plans are made of.

    There is no batch and no network here: inputs and outputs are of any shape and type. Raises UnsupportedOperator and
    BadFile like a plan.
    """
    known = {name: Known(tensor, name) for name, tensor in {**file.weights, **inputs}.items()}
    rest = fold(live(file.nodes, file.outputs), known)
    for node in rest:
        operator_of(node)
    missing = [name for name in file.outputs if name not in known]
    if missing:
        raise BadFile(f"Nothing in the file computes its output '{missing[0]}'. Export it again.")
    return tuple(known[name].tensor for name in file.outputs)


def first_weight(node: Node, known: Mapping[str, Known]) -> str | None:
    return next((known[name].name for name in node.inputs if name in known), None)


def operator_of(node: Node) -> Operator:
    found = find(node)
    if found is None:
        raise UnsupportedOperator(node.title, node.called, why_not(node) or _foreign(node))
    return found


def _foreign(node: Node) -> str:
    """The advice for operators of domains of which none is read."""
    if not node.domain or node.domain in (OWN, *OPTIMIZED):
        return ""
    return "Only operators of the ONNX standard and of ONNX Runtime's optimizer are read; export without custom ones."


def fold(nodes: Iterable[Node], known: dict[str, Known]) -> list[Node]:
    """Compute what depends on constants only, into `known`; the nodes that are left."""
    rest = []
    todo = Worklist(nodes)

    def look(name: str) -> Tensor | None:
        return known[name].tensor if name in known else None

    for node in todo:
        with explained(node):
            expanded = expand(node, known, look)
        if expanded is not None:
            todo.put(expanded)
        elif all(name in known or not name for name in node.inputs):
            fold_one(with_path(node, first_weight(node, known)), known)
        else:
            rest.append(node)
    return rest


# Operators whose result is still the same weight, only arranged in another way.
_ARRANGING = {
    "Identity",
    "Transpose",
    "Cast",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "DequantizeLinear",
}


def fold_one(node: Node, known: dict[str, Known]) -> None:
    operator = operator_of(node)
    arguments = [
        None if not name else as_array(known[name]) if i in operator.static else known[name].tensor
        for i, name in enumerate(node.inputs)
    ]
    with torch.no_grad(), explained(node):
        results = operator.run(node, *arguments)
    source = known[node.inputs[0]].name if node.op in _ARRANGING else None
    for name, result in zip(
        node.outputs, results if isinstance(results, tuple) else (results,), strict=False
    ):
        if not name:
            continue
        tensor = as_tensor(result)
        # Views would keep their base alive, and expanded ones hide their size.
        known[name] = Known(tensor.contiguous(), source or name)


def as_array(constant: Known) -> Numbers:
    return constant.tensor.numpy()
