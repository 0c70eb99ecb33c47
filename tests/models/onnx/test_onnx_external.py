"""Networks that keep their weights in other files: as exporters write them, and as nobody should."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import agrees, array, build, classifier

import models
from fusion.errors import BadFile, MissingData
from models.formats.onnx import read
from models.scan import external

Network = Callable[..., Path]
IMAGE = ("N", 3, 4, 4)
WEIGHT = array(2, 3, 3, 3)


def net() -> onnx.ModelProto:
    """With weights, a constant in a node, and one in a branch."""
    then = helper.make_node("Constant", [], ["t"], value=numpy_helper.from_array(array(1, 4, 1, 1, seed=4)))
    branch = helper.make_graph(
        [then], "branch", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    )
    layers = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(array(1, 4, 1, 1, seed=3))),
        helper.make_node("Mul", ["f", "k"], ["a"]),
        helper.make_node("If", ["yes"], ["b"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["a", "b"], ["g"]),
    ]
    return classifier(layers, {"yes": np.array(True)}, 17)


@pytest.mark.parametrize("location", ["net.onnx.data", "weights/net.bin", None])
def test_as_onnx_writes_them(tmp_path: Path, location: str | None) -> None:
    """All in one file, or one file for each."""
    (tmp_path / "weights").mkdir()
    path = tmp_path / "net.onnx"
    onnx.save(
        net(),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=location is not None,
        location=location,
        size_threshold=0,
        convert_attribute=True,
    )
    stored = onnx.load(path, load_external_data=False)
    assert all(tensor.data_location == TensorProto.EXTERNAL for tensor in stored.graph.initializer)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 1 + (6 if location is None else 1)
    agrees(path)
    source = read(path)
    for file in written:
        file.unlink()
    assert source.original(torch.zeros(1, 3, 8, 8)).shape == (1, 3)  # it needs none of them any more


def test_as_torch_writes_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3)
    ).eval()
    path = tmp_path / "net.onnx"
    x = torch.rand(2, 3, 8, 8)
    torch.onnx.export(module, (x,), path, dynamo=True, external_data=True, verbose=False)
    assert (tmp_path / "net.onnx.data").is_file()
    opened = models.open(path)
    with torch.no_grad():
        torch.testing.assert_close(opened.network(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values()) - {0, 8}))
def test_every_kind_of_number(tmp_path: Path, kind: int) -> None:
    """An odd number of them, so that those that share a byte are counted right."""
    tensor = numpy_helper.from_array(np.ones(5, helper.tensor_dtype_to_np_dtype(kind)), "w")
    data = tensor.raw_data
    (tmp_path / "net.data").write_bytes(data)
    model = with_data(at("w", "net.data", length=len(data), dims=[5], kind=kind))
    external.embed(model, tmp_path, "net.onnx")
    assert model.graph.initializer[0] == tensor


def test_data_that_tensors_share(tmp_path: Path) -> None:
    values = array(10)
    (tmp_path / "net.data").write_bytes(values.tobytes())
    model = with_data(
        at("a", "net.data", dims=[10]),
        at("b", "net.data", offset=8, length=12, dims=[3]),
        at("c", "net.data", offset=40, length=0, dims=[0]),
    )
    assert external.embed(model, tmp_path, "net.onnx")
    a, b, c = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    assert np.array_equal(a, values)
    assert np.array_equal(b, values[2:5])
    assert c.shape == (0,)


def test_values_beside_external_data_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "net.data").write_bytes(array(1).tobytes())
    tensor = at("w", "net.data", dims=[1])
    tensor.float_data.append(7.0)
    model = with_data(tensor)
    external.embed(model, tmp_path, "net.onnx")
    assert numpy_helper.to_array(model.graph.initializer[0]) == array(1)


def test_places_that_do_not_count_are_not_looked_at(tmp_path: Path) -> None:
    """What a tool leaves behind that has put the data into the file itself."""
    model = with_data(numpy_helper.from_array(WEIGHT, "w"))
    model.graph.initializer[0].external_data.add(key="location", value="../gone.data")
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    agrees(path, batched=False)


def at(
    name: str,
    place: str,
    dims: tuple[int, ...] | list[int] = WEIGHT.shape,
    kind: int = TensorProto.FLOAT,
    **where: object,
) -> TensorProto:
    """A tensor whose data is in another file."""
    tensor = TensorProto(name=name, dims=dims, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": place, **where}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_data(*tensors: TensorProto) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["x", tensors[0].name], ["y"])]
    model = build(nodes, IMAGE)
    model.graph.initializer.extend(tensors)
    return model


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    def check(model: onnx.ModelProto, kind: type[BadFile] = BadFile) -> str:
        """What is said of a network that is not read."""
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        path = folder / "net.onnx"
        path.write_bytes(model.SerializeToString())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(BadFile) as error:
            read(path)
        assert type(error.value) is kind
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
        assert len(str(error.value)) < 1000
        return str(error.value)

    return check


Refused = Callable[..., str]


def test_all_files_that_are_missing_are_named(refused: Refused) -> None:
    said = refused(with_data(*(at(f"w{i}", f"part{i}.bin") for i in range(5))), MissingData)
    assert "'part0.bin', 'part1.bin', 'part2.bin' and 2 others, which are not beside it" in said


# A name in the network's folder, and what makes it something else than a plain file.
TRAPS: Mapping[str, Callable[[Path], Any]] = {
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "link-to-a-plain-file": lambda path: path.symlink_to("net.onnx"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_no_plain_file(tmp_path: Path, refused: Refused, trap: str) -> None:
    (tmp_path / "own").mkdir()
    TRAPS[trap](tmp_path / "own" / "net.data")
    assert "no plain file" in refused(with_data(at("w", "net.data")))


def test_a_folder_that_is_a_link(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "net.data").write_bytes(WEIGHT.tobytes())
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "inner").symlink_to(tmp_path / "elsewhere")
    assert "no plain file" in refused(with_data(at("w", "inner/net.data")))


def test_a_file_that_stands_for_a_folder(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "inner").write_bytes(b"")
    assert "no plain file" in refused(with_data(at("w", "inner/net.data")))


@pytest.mark.parametrize("place", ["", ".", "a\0b", "a\nb", "\u202eatad", "a\\b", "a" * 300, "a/" * 20 + "b"])
def test_names_that_are_none(refused: Refused, place: str) -> None:
    assert "a name that is not taken" in refused(with_data(at("w", place)))


@pytest.mark.parametrize("place", ["/dev/zero", "/proc/self/environ", "..", "a/../..", "\\\\host\\share\\w"])
def test_places_elsewhere(refused: Refused, place: str) -> None:
    assert "outside of its folder" in refused(with_data(at("w", place)))


SIZE = WEIGHT.nbytes


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"offset": -4}, "gives '-4' as the offset of its data"),
        ({"length": -SIZE}, "as the length of its data, which is no number of bytes"),
        ({"length": "1e9"}, "no number of bytes"),
        ({"length": "9" * 19}, "no number of bytes"),
        ({"offset": 4}, f"is {SIZE:,} bytes from 4 on in 'net.data', which has {SIZE:,} bytes"),
        ({"offset": 2**40}, "truncated or of another export"),
        ({"length": SIZE - 4}, f"declares {SIZE:,} bytes and has {SIZE - 4:,} in 'net.data'"),
        ({"length": 200 * 10**9}, f"declares {SIZE:,} bytes and has 200,000,000,000"),
    ],
)
def test_data_that_is_not_where_it_is_said_to_be(
    tmp_path: Path, refused: Refused, where: dict[str, object], says: str
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "net.data").write_bytes(WEIGHT.tobytes())
    said = refused(with_data(at("w", "net.data", **where)))
    assert says in said


def test_a_place_that_is_given_twice(refused: Refused) -> None:
    tensor = at("w", "net.data")
    tensor.external_data.add(key="location", value="../../etc/passwd")
    assert "says twice where its data is" in refused(with_data(tensor))


def test_text(tmp_path: Path, refused: Refused) -> None:
    assert "text as raw bytes" in refused(with_data(at("w", "net.data", [3], TensorProto.STRING)))


def test_200_gigabytes_of_a_short_file(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "net.data").write_bytes(bytes(100))
    said = refused(with_data(at("w", "net.data", [50 * 10**9])))
    assert "which has 100 bytes" in said


def test_200_gigabytes_of_a_file_that_is_all_holes(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "net.data").touch()
    os.truncate(tmp_path / "own" / "net.data", 200 * 10**9)
    said = refused(with_data(at("w", "net.data", [50 * 10**9])))
    assert "186.3 GiB of weights" in said
    assert "up to 2 GiB are read" in said


def test_a_thousand_tensors_that_are_all_the_same_data(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "net.data").write_bytes(bytes(2**20))
    said = refused(with_data(*(at(f"w{i}", "net.data", [2**18]) for i in range(1000))))
    assert "share their data more than 8 times over" in said


def test_more_files_than_anybody_writes(refused: Refused) -> None:
    said = refused(with_data(*(at(f"w{i}", f"w{i}", [1]) for i in range(2001))))
    assert "up to 2,000 are read" in said


def test_the_networks_own_file_is_data_like_any(tmp_path: Path) -> None:
    """Nothing is in it that whoever sent it does not know."""
    path = tmp_path / "net.onnx"
    path.write_bytes(with_data(at("w", "net.onnx", [1, 3, 1, 1])).SerializeToString())
    agrees(path, batched=False)
