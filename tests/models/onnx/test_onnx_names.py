"""Names in a file are an author's words: whatever they are, they never become source code."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fusion
import models

NAMES = [
    'x", 0) is open("{file}", "w") or getattr(self, "y',
    "x=open('{file}', 'w')",
    "x\nopen('{file}', 'w')",
    "class",
    "a b",
    "café",
    "../../weights",
]


@pytest.mark.parametrize("pattern", NAMES)
def test_any_name_of_input_weight_node_and_output(pattern: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    name = pattern.format(file=witness)
    weight, bias = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32), np.ones(5, np.float32)
    image, flat, scores = (f"{name}{part}" for part in ("", "flat", "scores"))
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", [image], [flat], name=name),
            helper.make_node("Gemm", [flat, f"{name}w", f"{name}b"], [scores], name=f"{name}/x", transB=1),
        ],
        name,
        [helper.make_tensor_value_info(image, TensorProto.FLOAT, ["N", 3, 2, 2])],
        [helper.make_tensor_value_info(scores, TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(weight[0], f"{name}w"), numpy_helper.from_array(bias, f"{name}b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")

    opened = models.open(tmp_path / "net.onnx")
    x = torch.rand(3, 3, 2, 2)
    expected = x.flatten(1) @ torch.from_numpy(weight[0]).T + 1
    torch.testing.assert_close(opened.network(x), expected)
    (tmp_path / "artefact").mkdir()
    fusion.save(fusion.fuse(opened.network).network, tmp_path / "artefact", {})
    stored, _ = fusion.load(tmp_path / "artefact")
    torch.testing.assert_close(stored(x), expected)
    assert not witness.exists()
