"""Classifiers that answer a dictionary of scores by class, and the class in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import array, build

import fusion
import lrp
import models

Save = Callable[[onnx.ModelProto], Path]
NAMES = ("zebra", "ant", "mouse", "bee")


def dictionary(words: bool) -> onnx.ModelProto:
    """As Custom Vision writes it."""
    classes = {"classlabels_strings": NAMES} if words else {"classlabels_int64s": range(len(NAMES))}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Softmax", ["f"], ["probabilities"], axis=1),
        helper.make_node("ZipMap", ["probabilities"], ["loss"], domain="ai.onnx.ml", **classes),
        helper.make_node("ArgMax", ["probabilities"], ["best"], axis=1, keepdims=0),
    ]
    if words:
        nodes.append(
            helper.make_node("ArrayFeatureExtractor", ["words", "best"], ["classLabel"], domain="ai.onnx.ml")
        )
    else:
        nodes.append(helper.make_node("Identity", ["best"], ["classLabel"]))
    model = build(nodes, ("N", 3, 8, 8), {"w": array(len(NAMES), 3, 3, 3)}, opset=11, domains=["ai.onnx.ml"])
    model.graph.initializer.append(
        helper.make_tensor("words", TensorProto.STRING, [len(NAMES)], [name.encode() for name in NAMES])
    )
    key = TensorProto.STRING if words else TensorProto.INT64
    number = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(key, number))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("classLabel", key, None))
    model.graph.output.append(helper.make_value_info("loss", maps))
    for name, value in (
        ("Image.BitmapPixelFormat", "Bgr8"),
        ("Image.NominalPixelRange", "NominalRange_0_255"),
    ):
        model.metadata_props.add(key=name, value=value)
    return model


@pytest.mark.parametrize("words", [True, False])
def test_the_table_behind_a_dictionary_is_explained(save: Save, words: bool) -> None:
    opened = models.open(save(dictionary(words)))
    assert [(spec.name, spec.kind) for spec in opened.network.outputs] == [("probabilities", "scores")]
    assert opened.labels == (NAMES if words else None)
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    assert fusion.certify(opened.original, opened.network, [x]).max_relative <= 1e-5
    found = lrp.Explainer(opened.network, device="cpu").explain(x)
    assert found.ledger is not None
    assert float(found.ledger.error.max()) <= 1e-5


def test_what_such_files_say_of_the_image_is_heeded(save: Save) -> None:
    spec = models.open(save(dictionary(True))).input
    assert (spec.order, spec.scale, spec.mean, spec.std) == ("BGR", 1.0, (0.0,) * 3, (1.0,) * 3)
