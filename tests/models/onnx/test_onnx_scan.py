"""What is refused of an ONNX file before any ONNX tool sees it, and that what is fine passes."""

from __future__ import annotations

import re
import time
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import build

from fusion.errors import BadFile
from models.scan.functions import MOST_CALLS
from models.scan.graphs import MOST_NODES
from models.scan.onnx import decode
from models.scan.wire import Bounds, survey

IMAGE = ("N", 3, 4, 4)


def chain(count: int, op: str = "Relu", domain: str = "") -> list[onnx.NodeProto]:
    """From x to y in so many steps."""
    names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    return [helper.make_node(op, [a], [b], domain=domain) for a, b in pairwise(names)]


def functions(calls: int, depth: int) -> onnx.ModelProto:
    """Functions that each call the next one so many times, `depth` deep."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    bodies = [chain(calls, f"f{i + 1}", "local") for i in range(depth - 1)] + [chain(1)]
    made = [
        helper.make_function("local", f"f{i}", ["x"], ["y"], body, imports) for i, body in enumerate(bodies)
    ]
    return build(chain(1, "f0", "local"), IMAGE, functions=made, domains=["local"])


def branches(depth: int) -> onnx.ModelProto:
    """If within If within If."""
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    other = graph = helper.make_graph(chain(1), "g", [], output)
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=other)
        graph = helper.make_graph([node], "g", [], output)
    return build(graph.node, IMAGE, {"c": np.array(True)})


def refused(model: onnx.ModelProto | bytes, why: str) -> None:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(BadFile, match=why):
        decode(data, "net.onnx")


def message(number: int, content: bytes) -> bytes:
    """A field of protobuf's wire format that holds bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


class TestBytes:
    def test_files_of_real_networks_pass(self, shared: Path) -> None:
        found = sorted((shared / "networks").glob("*.onnx"))
        assert found
        for path in found:
            decode(path.read_bytes(), path.name)

    def test_messages_by_the_million_are_counted_before_they_are_made(self) -> None:
        """2 bytes of the file are 80 bytes of a parser's memory."""
        data = message(7, message(1, b"") * 1_000_000)
        bounds = Bounds(depth=100, fields=20_000, text=100)
        tracemalloc.start()
        with pytest.raises(BadFile, match="more than 20,000 values"):
            survey(data, onnx.ModelProto.DESCRIPTOR, bounds, "net.onnx")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100_000

    def test_graphs_within_graphs_within_graphs(self) -> None:
        decode(branches(30).SerializeToString(), "net.onnx")
        nested = b""  # by hand: protobuf's own serializer stops there too
        for _ in range(40):
            nested = message(1, message(5, message(6, nested)))
        refused(b"\x08\x08" + message(7, nested), "100 deep")

    def test_names_of_megabytes(self) -> None:
        refused(build([helper.make_node("R" * 20_000, ["x"], ["y"])], IMAGE), "NodeProto.op_type.*20,000")

    def test_descriptions_may_be_long_and_of_any_bytes(self) -> None:
        model = build(chain(1), IMAGE)
        model.doc_string = "D" * 100_000
        decode(model.SerializeToString().replace(b"DDD", b"\xff\xfe\xfd", 1), "net.onnx")

    def test_a_name_that_is_no_text(self) -> None:
        model = build([helper.make_node("Relu", ["x"], ["y"], name="QWERTY")], IMAGE)
        refused(model.SerializeToString().replace(b"QWERTY", b"\xffWERTY"), r"NodeProto\.name\) is no UTF-8")

    @pytest.mark.parametrize(
        "data",
        [
            b"\x08",  # ends in the middle of a number
            b"\x08" + b"\xff" * 11,  # a number of more than 64 bits
            b"\x3a\x05\x01",  # promises more than there is
            b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # promises 2^64 bytes
            b"\x3b\x3c",  # groups, which ONNX does not have
            b"\x02\x00",  # the field of number 0
            b"\x3a\x02\x0a\x05\x00\x00",  # a part that is longer than the whole
        ],
    )
    def test_bytes_that_are_no_messages(self, data: bytes) -> None:
        refused(data, "damaged, truncated")


class TestCounts:
    def test_more_nodes_than_are_read(self) -> None:
        refused(build(chain(MOST_NODES + 1), IMAGE), "more than 50,000 nodes")

    def test_functions_within_functions_stand_for_two_to_the_26th(self) -> None:
        model = functions(2, 27)
        assert len(model.SerializeToString()) < 2_500
        refused(model, f"{2**26} nodes")

    def test_a_chain_of_functions(self) -> None:
        decode(functions(1, MOST_CALLS).SerializeToString(), "net.onnx")
        refused(functions(1, 3_000), "100 deep")

    def test_hostile_files_are_refused_at_once(self) -> None:
        """In a time that does not grow with what they stand for."""
        models = [functions(2, 27), functions(1, 3_000), functions(10, 99)]
        before = time.process_time()
        for model in models:
            refused(model, "nodes|deep")
        assert time.process_time() - before < 5


class TestOrder:
    def test_nodes_in_a_circle(self) -> None:
        nodes = [
            helper.make_node("Add", ["x", "b"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"], name="back"),
            helper.make_node("Relu", ["b"], ["y"]),
        ]
        refused(build(nodes, IMAGE), "wait for each other in a circle")

    def test_a_circle_through_a_branch(self) -> None:
        inner = helper.make_graph(
            [helper.make_node("Relu", ["y"], ["z"])],
            "g",
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        )
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        refused(build([node], IMAGE, {"c": np.array(True)}), "circle")

    def test_a_circle_in_a_function(self) -> None:
        body = [helper.make_node("Add", ["x", "b"], ["y"]), helper.make_node("Relu", ["y"], ["b"])]
        made = helper.make_function("local", "f", ["x"], ["y"], body, [helper.make_opsetid("", 17)])
        refused(build(chain(1, "f", "local"), IMAGE, functions=[made], domains=["local"]), "circle")

    def test_a_value_that_two_nodes_compute(self) -> None:
        refused(build([*chain(1), *chain(1)], IMAGE), "two nodes compute 'y'")

    def test_nodes_out_of_order_pass(self) -> None:
        decode(build(chain(5)[::-1], IMAGE).SerializeToString(), "net.onnx")


CONV = {"w": np.ones((2, 3, 3, 3), dtype=np.float32)}


class TestSignatures:
    @pytest.mark.parametrize(
        ("node", "why"),
        [
            (helper.make_node("Conv", ["x"], ["y"]), "has 1 inputs and takes 2 to 3"),
            (helper.make_node("Conv", ["x", "w", "", "w"], ["y"]), "has 4 inputs and takes 2 to 3"),
            (helper.make_node("Conv", ["x", ""], ["y"]), "lacks its input W"),
            (helper.make_node("Relu", [], ["y"], name="r"), r"'r' \(Relu\) has 0 inputs and takes 1"),
            (helper.make_node("Concat", [], ["y"], axis=0), "has 0 inputs and takes 1 or more"),
            (helper.make_node("Relu", ["x"], ["y", "z"]), "has 2 outputs and takes 1"),
            (helper.make_node("Relu", ["x"], []), "has no output"),
            (helper.make_node("BiasGelu", ["x", "w"], [""], domain="com.microsoft"), "has no output"),
            (helper.make_node("Concat", ["x", "x"], ["y"]), "lacks its attribute 'axis'"),
            (helper.make_node("Concat", ["x", "x"], ["y"], axis=0.5), "attribute 'axis' that is no INT"),
            (helper.make_node("Conv", ["x", "w"], ["y"], pads="SAME"), "attribute 'pads' that is no INTS"),
        ],
    )
    def test_of_nodes_that_the_standard_does_not_have(self, node: onnx.NodeProto, why: str) -> None:
        refused(build([node], IMAGE, CONV), why)

    def test_an_attribute_twice(self) -> None:
        node = helper.make_node("Concat", ["x", "x"], ["y"], axis=1)
        node.attribute.append(helper.make_attribute("axis", 2))
        refused(build([node], IMAGE), "has an attribute twice")

    def test_in_a_branch(self) -> None:
        output = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
        inner = helper.make_graph([helper.make_node("Relu", ["x", "x"], ["z"])], "g", [], output)
        node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
        refused(build([node], IMAGE, {"c": np.array(True)}), "has 2 inputs and takes 1")

    def test_the_version_is_that_of_the_file(self) -> None:
        """ReduceMean has its axes as an attribute up to opset 17, as an input from 18 on."""
        node = helper.make_node("ReduceMean", ["x", "axes"], ["y"])
        axes = {"axes": np.array([1])}
        decode(build([node], IMAGE, axes, opset=18).SerializeToString(), "net.onnx")
        refused(build([node], IMAGE, axes, opset=17), "has 2 inputs and takes 1")

    def test_an_attribute_of_no_kind(self) -> None:
        node = helper.make_node("Concat", ["x", "x"], ["y"], axis=1)
        node.attribute[0].ClearField("type")
        refused(build([node], IMAGE), "has an attribute 'axis' of no kind")

    def test_an_attribute_without_what_it_should_hold(self) -> None:
        node = helper.make_node("Constant", [], ["y"], value=declared([1], raw=b"0000"))
        node.attribute[0].ClearField("t")
        refused(build([node], IMAGE), "attribute 'value' that is no TENSOR")

    @pytest.mark.parametrize(
        ("inputs", "outputs", "fits"), [(3, 2, True), (2, 2, False), (4, 2, False), (3, 1, False)]
    )
    def test_the_body_of_a_loop(self, inputs: int, outputs: int, fits: bool) -> None:
        """Of one value that is carried on, and nothing else."""
        kinds = (TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT, TensorProto.FLOAT)
        given = [helper.make_tensor_value_info(f"i{k}", kind, None) for k, kind in enumerate(kinds)]
        made = [helper.make_tensor_value_info(f"o{k}", TensorProto.FLOAT, None) for k in range(2)]
        nodes = [helper.make_node("Identity", [f"i{1 + k}"], [f"o{k}"]) for k in range(2)]
        body = helper.make_graph(nodes, "body", given[:inputs], made[:outputs])
        weights = {"n": np.array(2), "c": np.array(True)}
        model = build([helper.make_node("Loop", ["n", "c", "x"], ["y"], body=body)], IMAGE, weights)
        if fits:
            decode(model.SerializeToString(), "net.onnx")
        else:
            refused(model, "body that does not take and give what the loop does")

    def test_the_branches_of_a_choice(self) -> None:
        empty = helper.make_graph(chain(1), "g", [], [])
        node = helper.make_node("If", ["c"], ["y"], then_branch=empty, else_branch=empty)
        refused(build([node], IMAGE, {"c": np.array(True)}), "then_branch that does not give")

    @pytest.mark.parametrize("change", [{"num_scan_inputs": 9}, {"scan_input_axes": [1, 2]}])
    def test_the_body_of_a_scan(self, change: dict[str, Any]) -> None:
        given = [helper.make_tensor_value_info("i", TensorProto.FLOAT, None)]
        made = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
        body = helper.make_graph([helper.make_node("Relu", ["i"], ["o"])], "body", given, made)
        fine = {"num_scan_inputs": 1, "scan_input_axes": [1]}
        for attributes, fits in ((fine, True), (fine | change, False)):
            model = build([helper.make_node("Scan", ["x"], ["y"], body=body, **attributes)], IMAGE)
            if fits:
                decode(model.SerializeToString(), "net.onnx")
            else:
                refused(model, "scan")


class TestFunctions:
    def test_an_output_that_nothing_computes(self) -> None:
        made = helper.make_function("local", "f", ["x"], ["z"], chain(1), [helper.make_opsetid("", 17)])
        refused(build(chain(1, "f", "local"), IMAGE, functions=[made], domains=["local"]), "output 'z'")

    def test_two_of_one_name(self) -> None:
        made = helper.make_function("local", "f", ["x"], ["y"], chain(1), [helper.make_opsetid("", 17)])
        model = build(chain(1, "f", "local"), IMAGE, functions=[made, made], domains=["local"])
        refused(model, "two functions 'f'")


def with_tensor(tensor: TensorProto) -> onnx.ModelProto:
    model = build([helper.make_node("Add", ["x", "w"], ["y"])], IMAGE)
    model.graph.initializer.append(tensor)
    return model


def declared(dims: Sequence[int], kind: int = TensorProto.FLOAT, raw: bytes | None = b"") -> TensorProto:
    return TensorProto(name="w", dims=dims, data_type=kind, raw_data=raw)


class TestTensors:
    def test_200_gigabytes_that_are_not_there(self) -> None:
        refused(with_tensor(declared([50_000_000_000])), "declares 200,000,000,000 bytes and holds 0")

    def test_sizes_that_overflow(self) -> None:
        refused(with_tensor(declared([2**62, 2**62, 2**62])), "declares .* bytes and holds 0")

    @pytest.mark.parametrize("dims", [[-1, 3], [2] * 40])
    def test_shapes_that_no_tensor_has(self, dims: list[int]) -> None:
        refused(with_tensor(declared(dims, raw=b"0" * 12)), "which no tensor has")

    @pytest.mark.parametrize("kind", [0, 77])
    def test_an_element_type_that_there_is_not(self, kind: int) -> None:
        refused(with_tensor(declared([1], kind, b"0000")), f"element type \\({kind}\\)")

    def test_a_value_of_an_element_type_that_there_is_not(self) -> None:
        model = build(chain(1), IMAGE)
        model.graph.value_info.append(helper.make_tensor_value_info("v", 127, None))
        refused(model, r"'v' is of an element type \(127\)")

    def test_values_missing_from_a_list(self) -> None:
        tensor = helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
        decode(with_tensor(tensor).SerializeToString(), "net.onnx")
        del tensor.float_data[2:]
        refused(with_tensor(tensor), "declares 3 values and holds 2")

    def test_in_a_branch_within_a_function(self) -> None:
        constant = helper.make_node("Constant", [], ["z"], value=declared([1000]))
        output = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
        inner = helper.make_graph([constant], "g", [], output)
        node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
        made = helper.make_function("local", "f", ["x"], ["y"], [node], [helper.make_opsetid("", 17)])
        model = build(chain(1, "f", "local"), IMAGE, functions=[made], domains=["local"])
        refused(model, "declares 4,000 bytes")

    @pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values()) - {0, 8}))
    def test_every_element_type_as_onnx_itself_writes_it(self, kind: int) -> None:
        """As raw bytes and as values, an odd number of them."""
        values = np.ones(5, helper.tensor_dtype_to_np_dtype(kind))
        raw = numpy_helper.from_array(values, "w")
        listed = helper.make_tensor("w", kind, [5], values)
        for tensor in (raw, listed):
            assert tensor.data_type == kind
            decode(with_tensor(tensor).SerializeToString(), "net.onnx")


def test_messages_do_not_repeat_what_is_hostile_in_full() -> None:
    place = "../" + "a" * 16_000
    tensor = TensorProto(name="w", dims=[1], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=place)
    with pytest.raises(BadFile) as error:
        decode(with_tensor(tensor).SerializeToString(), "net.onnx")
    assert re.search("outside of its folder", str(error.value))
    assert len(str(error.value)) < 600
