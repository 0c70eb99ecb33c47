"""What is refused, and that the message says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import build
from torch.nn import functional as F

from fusion.errors import BadFile, BadInput, MissingData, NonFiniteWeights, UnsupportedOperator
from models.formats.onnx import read

Save = Callable[[onnx.ModelProto], Path]
node = helper.make_node
IMAGE = ("N", 3, 4, 4)
RELU = helper.make_node("Relu", ["x"], ["y"])


def conv(**weights: np.ndarray[Any, Any]) -> onnx.ModelProto:
    return build([helper.make_node("Conv", ["x", *weights], ["y"])], IMAGE, weights)


WEIGHT = np.ones((2, 3, 3, 3), dtype=np.float32)


@pytest.mark.parametrize("data", [b"", b"not an onnx file", b"\x08\x07", bytes(range(256)) * 20])
def test_bytes_that_are_no_onnx_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=r"net\.onnx is not a readable ONNX file"):
        read(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    data = conv(w=np.ones((64, 3, 3, 3), dtype=np.float32)).SerializeToString()
    path = tmp_path / "net.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadFile):
        read(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="cannot be read"):
        read(tmp_path / "none.onnx")


def test_an_unknown_operator_is_named_with_its_layer(save: Save) -> None:
    node = helper.make_node("NonMaxSuppression", ["x", "x"], ["y"], name="/head/nms/NonMaxSuppression")
    with pytest.raises(UnsupportedOperator) as error:
        read(save(build([node], IMAGE)))
    assert error.value.op == "ai.onnx::NonMaxSuppression (opset 17)"
    assert error.value.layer == "head.nms"


def test_a_custom_domain_is_refused_by_name(save: Save) -> None:
    node = helper.make_node("Blur", ["x"], ["y"], domain="com.example")
    with pytest.raises(UnsupportedOperator, match=r"com\.example::Blur"):
        read(save(build([node], IMAGE, domains=["com.example"])))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_listed(save: Save, value: float) -> None:
    weight = WEIGHT.copy()
    weight[0, 0, 0, 0] = value
    with pytest.raises(NonFiniteWeights) as error:
        read(save(conv(**{"layer1.conv.weight": weight})))
    assert error.value.names == ("layer1.conv.weight",)


def external(name: str, place: str = "net.onnx.data") -> TensorProto:
    tensor = numpy_helper.from_array(WEIGHT, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    return tensor


def test_external_data_in_an_initializer(save: Save) -> None:
    model = conv(w=WEIGHT)
    model.graph.initializer[0].CopyFrom(external("w"))
    with pytest.raises(MissingData, match=r"'net\.onnx\.data', which is not beside it"):
        read(save(model))


@pytest.mark.parametrize("place", ["/etc/passwd", "../net.onnx.data", "a/../../b", "C:\\keys", "..\\keys"])
def test_external_data_outside_of_the_folder(save: Save, place: str) -> None:
    model = conv(w=WEIGHT)
    model.graph.initializer[0].CopyFrom(external("w", place))
    with pytest.raises(BadFile, match="outside of its folder"):
        read(save(model))


def test_external_data_in_a_constant_of_a_subgraph(save: Save) -> None:
    constant = helper.make_node("Constant", [], ["z"], value=external("z", "hidden.data"))
    inner = helper.make_graph(
        [constant], "g", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    node = helper.make_node("If", ["c"], ["q"], then_branch=inner, else_branch=inner)
    with pytest.raises(MissingData, match=r"'hidden\.data'"):
        read(save(build([node, RELU], IMAGE, {"c": np.array(True)})))


def test_an_old_opset(save: Save) -> None:
    with pytest.raises(BadFile, match="opset 6"):
        read(save(build([RELU], IMAGE, opset=6)))


def test_an_opset_that_is_not_known_yet(save: Save) -> None:
    newest = onnx.defs.onnx_opset_version()
    read(save(build([RELU], IMAGE, opset=newest)))
    with pytest.raises(BadFile, match=f"opset {newest + 1}"):
        read(save(build([RELU], IMAGE, opset=newest + 1)))


def test_several_inputs_are_listed(save: Save) -> None:
    model = build([helper.make_node("Add", ["x", "z"], ["y"])], IMAGE)
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, IMAGE))
    with pytest.raises(BadFile, match=r"declares 2: 'x' FLOAT \?x3x4x4, 'z' FLOAT"):
        read(save(model))


def test_an_input_that_is_no_float_image(save: Save) -> None:
    with pytest.raises(BadFile, match=r"'x' FLOAT \?x10"):
        read(save(build([RELU], ("N", 10))))
    with pytest.raises(BadFile, match="BOOL"):
        read(save(build([RELU], IMAGE, kind=TensorProto.BOOL)))


def test_an_open_image_size_is_asked_for(save: Save) -> None:
    path = save(build([RELU], ("N", 3, "h", "w")))
    with pytest.raises(BadInput, match="size=HxW"):
        read(path)
    assert read(path, size=(5, 7)).example.shape == (2, 3, 5, 7)


def test_a_size_against_the_file(save: Save) -> None:
    with pytest.raises(BadInput, match="fixes the image size"):
        read(save(build([RELU], IMAGE)), size=(8, 8))


def test_shapes_that_depend_on_pixels(save: Save) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["i"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["i", "zero"], ["s"]),
        helper.make_node("Reshape", ["x", "s"], ["y"]),
    ]
    with pytest.raises(BadFile, match="pixel values"):
        read(save(build(nodes, IMAGE, {"zero": np.array([0])})))


def test_a_constant_of_billions_of_elements(save: Save) -> None:
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])]
    with pytest.raises(BadFile, match="asks for a tensor"):
        read(save(build(nodes, IMAGE, {"s": np.array([2**36])})))


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    nodes = [
        helper.make_node(c, [f"v{i}"], [f"v{i + 1}"], domain="local" if c != "Relu" else "")
        for i, c in enumerate(calls)
    ]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["v0"], [f"v{len(calls)}"], nodes, imports)


def call(name: str, *functions: onnx.FunctionProto) -> onnx.ModelProto:
    node = helper.make_node(name, ["x"], ["y"], domain="local")
    return build([node], IMAGE, functions=functions, domains=["local"])


def test_functions_are_inlined(save: Save) -> None:
    source = read(save(call("g", function("f", ["Relu", "Relu"]), function("g", ["f", "f"]))))
    assert float(source.module(source.example - 1).abs().max()) == 0


def test_functions_that_multiply_without_end(save: Save) -> None:
    levels = [function(f"f{i}", [f"f{i - 1}"] * 10 if i else ["Relu"] * 10) for i in range(12)]
    with pytest.raises(BadFile, match="1000000000000 nodes"):
        read(save(call("f11", *levels)))


def test_functions_that_call_themselves(save: Save) -> None:
    with pytest.raises(BadFile, match="calls itself"):
        read(save(call("f", function("f", ["g"]), function("g", ["f"]))))


def versioned(nodes: list[onnx.NodeProto], opset: int) -> onnx.ModelProto:
    """A call of a function of another opset than the network's."""
    imports = [helper.make_opsetid("", opset)]
    own = helper.make_function("local", "f", ["a"], ["b"], nodes, imports)
    calls = [node("f", ["x"], ["z"], domain="local"), node("Relu", ["z"], ["y"])]
    return build(calls, IMAGE, opset=17, functions=[own], domains=["local"])


@pytest.mark.parametrize(
    ("opset", "nodes", "wanted"),
    [
        # Over all axes from the second on, before 13.
        (12, [node("Softmax", ["a"], ["b"])], lambda x: x.flatten(1).softmax(1).reshape(x.shape)),
        # Attributes, before 11.
        (9, [node("Clip", ["a"], ["b"], min=-0.5, max=0.25)], lambda x: x.clamp(-0.5, 0.25)),
        (10, [node("Pad", ["a"], ["b"], pads=[0, 0, 1, 1, 0, 0, 0, 2])], lambda x: F.pad(x, (1, 2, 1, 0))),
        (11, [node("ReduceSum", ["a"], ["b"], axes=[1])], lambda x: x.sum(1, keepdim=True)),
        # Newer than the network itself.
        (20, [node("Gelu", ["a"], ["b"])], F.gelu),
        # A function that calls one of yet another version.
        (
            12,
            [node("Softmax", ["a"], ["c"]), node("f13", ["c"], ["b"], domain="local")],
            lambda x: x.flatten(1).softmax(1).reshape(x.shape).softmax(-1),
        ),
    ],
)
def test_a_function_of_another_opset_is_read_by_its_own(
    save: Save, opset: int, nodes: list[onnx.NodeProto], wanted: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = versioned(nodes, opset)
    if nodes[-1].domain:
        model.functions[0].opset_import.append(helper.make_opsetid("local", 1))
        softmax, imports = node("Softmax", ["p"], ["q"]), [helper.make_opsetid("", 13)]
        model.functions.append(helper.make_function("local", "f13", ["p"], ["q"], [softmax], imports))
    source = read(save(model))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(source.module(x), wanted(x).relu())


@pytest.mark.parametrize("opset", [6, onnx.defs.onnx_opset_version() + 1])
def test_a_function_of_an_opset_that_is_not_read(save: Save, opset: int) -> None:
    with pytest.raises(BadFile, match=rf"in its function 'f'\) uses ONNX opset {opset}"):
        read(save(versioned([node("Relu", ["a"], ["b"])], opset)))


def test_a_node_without_a_name_is_called_by_its_operator_and_result(save: Save) -> None:
    with pytest.raises(UnsupportedOperator, match="in layer 'NonMaxSuppression -> y'"):
        read(save(build([node("NonMaxSuppression", ["x", "x"], ["y"])], IMAGE)))


def test_batch_statistics_are_refused(save: Save) -> None:
    weights = {k: np.ones(3, dtype=np.float32) for k in "sbmv"}
    node = helper.make_node("BatchNormalization", ["x", *weights], ["y", "m2", "v2"], training_mode=1)
    with pytest.raises(UnsupportedOperator, match="evaluation mode"):
        read(save(build([node], IMAGE, weights)))


def test_an_opset_that_the_runtime_does_not_know_yet(save: Save) -> None:
    model = build([RELU], IMAGE, opset=onnx.defs.onnx_opset_version())
    try:
        onnxruntime.InferenceSession(model.SerializeToString())
        pytest.skip("the runtime knows all opsets")
    except Exception:
        source = read(save(model))
    with pytest.raises(BadFile, match=r"runs ONNX opsets up to \d+, and the file uses a newer one"):
        source.original(source.example)


def test_what_the_runtime_says_of_a_file_comes_without_its_own_places(save: Save) -> None:
    """A cast whose result is declared to be of another type, as some converters to float16 leave it."""
    model = build([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], IMAGE)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    source = read(save(model))
    with pytest.raises(BadFile, match=r"ONNX Runtime does not accept the file: Type Error"):
        source.original(source.example)
