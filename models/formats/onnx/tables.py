"""Classifiers that answer a dictionary of scores by class (`ZipMap`), as Custom Vision, Core ML's and scikit-learn's
converters write them: the table behind it is the output, its columns are the classes."""

from __future__ import annotations

import onnx

from models.formats.onnx.excerpt import keep

_DOMAIN = "ai.onnx.ml"  # the standard's part for what is no neural network


def take_tables(proto: onnx.ModelProto) -> tuple[str, ...] | None:
    """Puts a table of scores in the place of each dictionary that a file answers, without what is then not needed, and
    returns the names of the classes, () where they are numbers. A file without dictionaries (None) stays as it is."""
    maps = {node.output[0]: node for node in proto.graph.node if _is_map(node)}
    if not maps:
        return None
    labels: tuple[str, ...] = ()
    outputs: list[str] = []
    for output in proto.graph.output:
        node = maps.get(output.name)
        if node is None:
            if output.type.tensor_type.elem_type != onnx.TensorProto.STRING:
                outputs.append(output.name)
            continue
        outputs.append(node.input[0])
        labels = labels or _labels(node)
    keep(proto.graph, tuple(dict.fromkeys(outputs)))
    return labels


def _is_map(node: onnx.NodeProto) -> bool:
    return node.domain == _DOMAIN and node.op_type == "ZipMap" and len(node.input) == 1 and bool(node.output)


def _labels(node: onnx.NodeProto) -> tuple[str, ...]:
    given = next((a.strings for a in node.attribute if a.name == "classlabels_strings"), ())
    return tuple(label.decode(errors="replace") for label in given)
