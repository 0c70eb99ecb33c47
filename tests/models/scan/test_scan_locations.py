"""The data files that an ONNX file points at, read off the wire."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from models.scan.locations import WITHIN, data_files

Save = Callable[[onnx.ModelProto], Path]
_node = helper.make_node


def external(place: str) -> TensorProto:
    tensor = TensorProto(name=place, dims=[1], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="location")
    tensor.external_data.add(key="location", value=place)
    tensor.external_data.add(key="length", value="4")
    return tensor


def graph(place: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [], [], [external(place)])


def sparse(values: str, indices: str) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(external(values), external(indices), [1])


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(model: onnx.ModelProto) -> Path:
        path = tmp_path / "net.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return write


def everywhere() -> tuple[onnx.ModelProto, list[str]]:
    """A network with a tensor at every place that one can be at, and the names of their files."""
    inner = _node(
        "If", ["c"], ["y"], then_branch=graph("branch", _node("Constant", [], ["k"], value=external("in")))
    )
    listed = _node("Own", [], [], many=[external("one"), external("two")], graphs=[graph("three")])
    sparse_node = _node("Constant", [], ["s"], sparse_value=sparse("attribute-values", "attribute-indices"))
    sparse_node.attribute[0].sparse_tensors.append(sparse("more-values", "more-indices"))
    model = helper.make_model(graph("weight", inner, listed, sparse_node))
    model.graph.sparse_initializer.append(sparse("values", "indices"))
    function = helper.make_function(
        "own", "f", [], [], [_node("Constant", [], ["k"], value=external("f"))], []
    )
    function.attribute_proto.append(helper.make_attribute("default", external("default")))
    model.functions.append(function)
    training = model.training_info.add()
    training.initialization.CopyFrom(graph("initial"))
    training.algorithm.CopyFrom(graph("algorithm"))
    names = ["branch", "in", "one", "two", "three", "attribute-values", "attribute-indices", "more-values"]
    names += ["more-indices", "weight", "values", "indices", "f", "default", "initial", "algorithm"]
    return model, names


def test_every_place_that_a_tensor_can_be_at(save: Save, tmp_path: Path) -> None:
    model, names = everywhere()
    for name in names:
        (tmp_path / name).touch()
    assert sorted(data_files(save(model))) == sorted(names)


def test_the_table_has_every_way_to_a_tensor() -> None:
    """Of the messages that onnx itself knows: a later one may have more."""

    def leads(descriptor: Any, seen: tuple[str, ...] = ()) -> bool:
        if descriptor.name == "TensorProto":
            return True
        inner = [f.message_type for f in descriptor.fields if f.message_type is not None]
        return any(leads(found, (*seen, descriptor.name)) for found in inner if found.name not in seen)

    for name, fields in WITHIN.items():
        descriptor = getattr(onnx, name).DESCRIPTOR
        if name in ("TensorProto", "StringStringEntryProto"):
            continue
        ways = {
            f.number: f.message_type.name
            for f in descriptor.fields
            if f.message_type and leads(f.message_type)
        }
        types = {number for number, kind in ways.items() if kind in ("TypeProto", "ValueInfoProto")}
        assert {n: kind for n, kind in ways.items() if n not in types} == fields
    tensor = onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"]
    assert WITHIN["TensorProto"] == {tensor.number: "StringStringEntryProto"}


def test_only_plain_files_beside_it(save: Save, tmp_path: Path) -> None:
    places = [
        "there",
        "inner/there",
        "net.onnx",
        "link",
        "folder",
        "absent",
        "../outside",
        "/etc/passwd",
        "a\0b",
        "",
    ]
    (tmp_path / "inner").mkdir()
    for name in ("there", "inner/there"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "folder").mkdir()
    (tmp_path.parent / "outside").touch()
    model = helper.make_model(helper.make_graph([], "g", [], [], [external(place) for place in places]))
    assert data_files(save(model)) == ("there", "inner/there")


def test_a_file_without_data_files_and_files_that_are_none(save: Save, tmp_path: Path) -> None:
    assert data_files(save(helper.make_model(helper.make_graph([], "g", [], [])))) == ()
    for content in (b"", b"Buy milk.", b"PK\x03\x04" + bytes(100), b"\xff" * 100, bytes(100)):
        (tmp_path / "other").write_bytes(content)
        assert data_files(tmp_path / "other") == ()


def test_every_truncation_ends(save: Save, tmp_path: Path) -> None:
    model, names = everywhere()
    for name in names:
        (tmp_path / name).touch()
    data = save(model).read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut").write_bytes(data[:length])
        assert set(data_files(tmp_path / "cut")) <= set(names)


def test_graphs_within_graphs_without_end(tmp_path: Path) -> None:
    """Deeper than protobuf itself writes or reads them, so the bytes are put together by hand."""
    for name in ("deep", "level"):
        (tmp_path / name).touch()

    def field(number: int, content: bytes) -> bytes:
        length, size = b"", len(content)
        while size > 0x7F:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    inner = field(5, external("deep").SerializeToString())
    for _ in range(200):
        inner = field(5, external("level").SerializeToString()) + field(1, field(5, field(6, inner)))
    (tmp_path / "net.onnx").write_bytes(field(7, inner))
    assert data_files(tmp_path / "net.onnx") == ("level",)
