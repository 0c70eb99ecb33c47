"""torch.export archives that would call, evaluate, unpickle or load more than a network are refused unopened."""

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._export.serde.schema import SCHEMA_VERSION
from torch._export.serde.serialize import serialize

import models
from fusion.errors import BadFile, ClearfoldError, UnsafeFile
from models.formats import exported
from tests.models.nets import small, traced

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(small(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=shapes), path)
    return path


def rewritten(
    program: Path, target: Path, entry: str, change: Callable[[bytes], bytes], new: str = ""
) -> Path:
    """The archive with one entry changed, or another put beside it."""
    found = False
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(target, "w") as out:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith(entry):
                found = True
                if new:
                    out.writestr(info.filename.removesuffix(entry) + new, change(data))
                else:
                    data = change(data)
            out.writestr(info.filename, data)
    assert found
    return target


class Makes:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def stored(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_what_torch_saves_is_read(program: Path) -> None:
    opened = models.open(program)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(opened.network(x), opened.original(x))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network as torch wrote it before 2.8: no folder around it. Its input is called as one of Python's
    functions."""
    folder = tmp_path_factory.mktemp("flat")
    shapes = ({0: torch.export.Dim("batch")},)
    network = torch.nn.Sequential(small())
    artifact = serialize(torch.export.export(network, (torch.randn(2, 3, 16, 16),), dynamic_shapes=shapes))
    with zipfile.ZipFile(folder / "net.pt2", "w") as out:
        out.writestr("version", ".".join(map(str, SCHEMA_VERSION)))
        out.writestr("serialized_exported_program.json", artifact.exported_program)
        out.writestr("serialized_state_dict.pt", artifact.state_dict)
        out.writestr("serialized_constants.pt", artifact.constants)
        out.writestr("serialized_example_inputs.pt", artifact.example_inputs)
        out.writestr("extra_files/about.json", json.dumps({"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}))
    return folder / "net.pt2"


def test_the_layout_of_older_versions_is_read(flat: Path) -> None:
    opened = models.open(flat)
    assert opened.format == "export"
    assert opened.input.mean == (0.1, 0.2, 0.3)
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(opened.network(x), opened.original(x))


@pytest.mark.parametrize(
    "entry", ["extra_files/models/model.json", "more/x", "extra_files/../x", "extra_files/"]
)
def test_the_layout_of_older_versions_has_no_folders(entry: str, flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with zipfile.ZipFile(path, "w") as out, zipfile.ZipFile(flat) as source:
        out.writestr(entry, b"{}")
        for info in source.infolist():
            out.writestr(info, source.read(info))
    with pytest.raises(ClearfoldError):
        models.open(path)


def test_pickles_of_the_older_layout_are_looked_at(flat: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = rewritten(
        flat, tmp_path / "net.pt2", "serialized_example_inputs.pt", lambda _: stored(Makes(made))
    )
    with pytest.raises(UnsafeFile, match="mkdir"):
        models.open(path)
    assert not made.exists()


def test_operators_of_the_older_layout_are_looked_at(flat: Path, tmp_path: Path) -> None:
    def change(data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.conv2d.default", b"torch.os.system")

    path = rewritten(flat, tmp_path / "net.pt2", "serialized_exported_program.json", change)
    with pytest.raises(UnsafeFile, match=r"os\.system"):
        models.open(path)


def test_an_unpickled_call_is_refused_before_it_happens(program: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    hostile = rewritten(
        program, tmp_path / "bad.pt2", "sample_inputs/model.pt", lambda _: stored(((Makes(victim),), {}))
    )
    with pytest.raises(UnsafeFile, match=r"sample_inputs.*mkdir"):
        exported.read(hostile)
    assert not victim.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.load(hostile)  # what it would have done
    assert victim.exists()


@pytest.mark.parametrize(
    "target", ["torch.os.system", "torch.load", "torch.ops.aten.from_file.default", "exec", "#x:y"]
)
def test_an_operator_off_the_list_is_refused(target: str, program: Path, tmp_path: Path) -> None:
    hostile = rewritten(
        program,
        tmp_path / "bad.pt2",
        "models/model.json",
        lambda data: data.replace(b"torch.ops.aten.relu.default", target.encode()).replace(
            b"torch.ops.aten.relu_.default", target.encode()
        ),
    )
    with pytest.raises(UnsafeFile, match=target):
        exported.read(hostile)


@pytest.mark.parametrize(
    "expression",
    [
        "exec('1')",
        "__import__('os').system('true')",
        "Symbol('x').func",
        "Symbol('print(1)')",
        "(lambda: 1)()",
        "[1][0]",
    ],
)
def test_an_expression_that_is_no_arithmetic_is_refused(
    expression: str, program: Path, tmp_path: Path
) -> None:
    def change(data: bytes) -> bytes:
        graph = json.loads(data)
        todo = [graph]
        while todo:
            value = todo.pop()
            if isinstance(value, dict):
                if "expr_str" in value:
                    value["expr_str"] = expression
                todo += value.values()
            elif isinstance(value, list):
                todo += value
        return json.dumps(graph).encode()

    with pytest.raises(UnsafeFile, match="expression"):
        exported.read(rewritten(program, tmp_path / "bad.pt2", "models/model.json", change))


def test_pickled_weights_are_looked_at(program: Path, tmp_path: Path) -> None:
    def pickled(data: bytes) -> bytes:
        table = json.loads(data)
        for payload in table["config"].values():
            payload["use_pickle"] = payload["path_name"] == "weight_0"
        return json.dumps(table).encode()

    table = rewritten(program, tmp_path / "table.pt2", "model_weights_config.json", pickled)
    with pytest.raises(BadFile, match="weight_0"):  # raw, and not pickled at all
        exported.read(table)
    hostile = rewritten(
        table, tmp_path / "bad.pt2", "weights/weight_0", lambda _: stored(Makes(tmp_path / "x"))
    )
    with pytest.raises(UnsafeFile, match=r"weight_0.*mkdir"):
        exported.read(hostile)
    shape = small().get_parameter("stem.weight").shape
    right = rewritten(
        table,
        tmp_path / "good.pt2",
        "weights/weight_0",
        lambda _: stored(torch.nn.Parameter(torch.zeros(shape))),
    )
    assert exported.read(right).network is not None


@pytest.mark.parametrize("prefix", ["opaque_obj_0", "custom_obj_0", "../sample_inputs/model.pt"])
def test_python_objects_are_refused(prefix: str, program: Path, tmp_path: Path) -> None:
    table = {"config": {"thing": {"path_name": prefix, "use_pickle": True, "is_param": False}}}
    hostile = rewritten(
        program, tmp_path / "bad.pt2", "model_constants_config.json", lambda _: json.dumps(table).encode()
    )
    with pytest.raises(UnsafeFile, match="Python object"):
        exported.read(hostile)


@pytest.mark.parametrize(
    ("entry", "data"),
    [
        ("data/aotinductor/model/x.so", b"\x7fELF"),
        ("data/other.pkl", pickle.dumps(Makes(Path("x")), protocol=2)),
        ("serialized_constants.pt", stored(Makes(Path("x")))),
    ],
)
def test_further_parts_are_looked_at(entry: str, data: bytes, program: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile):
        exported.read(rewritten(program, tmp_path / "bad.pt2", "archive_format", lambda _: data, entry))


def test_a_script_inside_is_refused(program: Path, tmp_path: Path) -> None:
    script = traced(small(), tmp_path / "net.pt").read_bytes()
    hostile = rewritten(program, tmp_path / "bad.pt2", "sample_inputs/model.pt", lambda _: script)
    with pytest.raises(ClearfoldError, match=r"TorchScript|compressed"):
        exported.read(hostile)
