"""Layers keep the names that their author gave them."""

from __future__ import annotations

import pytest

from models.formats.onnx.names import unique, with_path
from models.formats.onnx.registry import Node


def node(op: str, name: str = "", scopes: tuple[str, ...] = (), layer: str = "") -> Node:
    return Node(op, ("x",), ("y",), name=name, scopes=scopes, layer=layer)


@pytest.mark.parametrize(
    ("given", "weight", "path"),
    [
        (node("Conv", "/layer1/layer1.0/conv1/Conv"), "onnx::Conv_196", "layer1.0.conv1"),
        (node("BatchNormalization", "/1/1.0/1.0.0/fn/fn.0/norm/BatchNormalization"), None, "1.0.0.fn.0.norm"),
        (node("Relu", "/Relu"), None, ""),
        (node("Relu", "n", ("", "layer1", "layer1.0", "layer1.0.relu", "relu_1")), None, "layer1.0.relu"),
        (node("Conv", "n", ("", "bn1", "_native_batch_norm_legit")), "conv1.weight", "conv1"),
        (node("Conv"), "features/conv1_w_0", "features.conv1"),
        (node("Conv", "node_3"), "stem.conv.weight", "stem.conv"),
        (node("Relu", "relu5"), None, "relu5"),
    ],
)
def test_paths(given: Node, weight: str | None, path: str) -> None:
    assert with_path(given, weight).layer == path


def test_the_only_node_of_a_module_gets_its_name() -> None:
    assert unique([node("Conv", layer="conv1"), node("Relu", layer="act")]) == ["conv1", "act"]


def test_the_only_node_with_weights_gets_the_name_of_the_module() -> None:
    assert unique([node("Pad", layer="stem"), node("Conv", layer="stem")]) == ["stem.pad", "stem"]


def test_what_a_block_does_itself_is_named_after_the_operator() -> None:
    nodes = [node("Conv", layer="a.conv"), node("Add", layer="a"), node("Add", layer="a"), node("Relu")]
    assert unique(nodes) == ["a.conv", "a.add", "a.add_1", "relu"]


def test_names_never_clash() -> None:
    nodes = [
        node("Conv", layer="a.add"),
        node("Add", layer="a"),
        node("MatMul", layer="a.b"),
        node("MatMul", layer="a.b"),
    ]
    names = unique(nodes)
    assert len(set(names)) == len(names)
    assert names[0] == "a.add"
