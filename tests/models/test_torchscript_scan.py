"""TorchScript that reaches out of its own memory is refused before torch sees it, whatever it hides behind."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.networks import TORCHVISION, Architecture
from fusion.errors import BadFile, ClearfoldError, UnsafeFile, UnsupportedOperator
from models.formats.torchscript import read
from models.formats.torchscript.archive import inspect
from tests.models.nets import scripted, small, traced
from tests.support.hostile import ReadsInForward, ReadsOnLoad, WritesInForward, WritesOnLoad

pytestmark = pytest.mark.filterwarnings("ignore")


class Restorer(WritesOnLoad):
    """The same without the harm."""

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]


def touched(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize("kind", [WritesInForward, WritesOnLoad], ids=["forward", "load"])
def test_writing_a_file_is_refused_before_it_happens(
    kind: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    path = scripted(kind(str(victim)).eval(), tmp_path / "net.pt")
    with pytest.raises(UnsafeFile, match=r"aten::save.*writes files"):
        read(path, size=(8, 8))
    assert not touched(victim)
    torch.jit.load(str(path))(torch.zeros(1, 3, 8, 8))  # what it would have done
    assert touched(victim)


@pytest.mark.parametrize("kind", [ReadsInForward, ReadsOnLoad], ids=["forward", "load"])
def test_reading_a_file_is_refused(kind: Callable[[str], nn.Module], tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(range(64)))
    path = scripted(kind(str(tmp_path / "secret")).eval(), tmp_path / "net.pt")
    with pytest.raises(UnsafeFile, match=r"aten::from_file.*reads"):
        read(path, size=(8, 8))


def test_the_layer_is_named(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(WritesInForward("x"))).eval()
    with pytest.raises(UnsafeFile, match=r"layer '1\.0'"):
        inspect(scripted(network, tmp_path / "net.pt"))


def replaced(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The archive with what a function makes of each entry's bytes (None: as they are)."""
    target = path.with_name("changed.pt")
    found = False
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for entry in source.infolist():
            data = source.read(entry)
            new = change(entry.filename.partition("/")[2], data)
            found = found or new is not None
            out.writestr(entry, data if new is None else new)
    assert found
    return target


def is_linear(name: str) -> bool:
    """The code of linear layers; its class bears another name when it is not the first of the process."""
    return name.startswith("code/__torch__/torch/nn/modules/linear") and name.endswith(".py")


def coded(path: Path, *lines: str) -> Path:
    """The archive with lines of code in place of the linear layer's return."""

    def change(name: str, data: bytes) -> bytes | None:
        if not is_linear(name):
            return None
        head, line, rest = data.partition(b"    return torch.linear")
        assert line
        return head + b"".join(b"    " + code.encode() + b"\n" for code in lines) + line + rest

    return replaced(path, change)


HIDDEN = {
    "an operator": 'ops.aten.save(input, "x")',
    "a method": 'input.save("x")',
    "a module under another name": 't = torch\n    t.save(input, "x")',
    "an operator under another name": 'f = torch.save\n    f(input, "x")',
    "a method under another name": 'f = input.save\n    f("x")',
    "by getattr": 'getattr(input, "save")("x")',
    "by getattr, named": 'f = getattr(input, "save")\n    f("x")',
    "a list": '[torch.save][0](input, "x")',
    "a choice": '(torch.save if True else torch.load)(input, "x")',
    "a deeper name": 'torch.autograd.save(input, "x")',
    "another namespace": "ops.c10d.barrier(input)",
    "a remote call": 'ops.prim.rpc_sync("worker", "f")',
    "a class in C++": "__torch__.torch.classes.dist_rpc.WorkerInfo(1)",
    "a class that is not there": "__torch__.os.system(1)",
    "a lambda": '(lambda: torch.save(input, "x"))()',
    "a comprehension": '[torch.save(input, "x") for i in range(1)]',
    "an f-string": "x = f\"{torch.save(input, 'x')}\"",
    "a word of Python's": '__import__("os")',
    "eval": 'eval("1")',
    "open": 'open("x")',
    "a fork": "fork(input)",
    "another meaning of a word": 'int = torch.save\n    int(input, "x")',
    "a redefined word": 'len = input.save\n    len("x")',
    "a comment": "x = 1 # type: ignore",
    "an import": "import os",
    "a nested function": "def f() -> int:\n      return 1",
    "a global": "global x",
    "a walrus": "x = (y := 1)",
    "a context": 'with input.save("x") as f:\n      pass',
    "an assignment to it": 'torch = ops.aten\n    torch.save(input, "x")',
    "a loop over it": 'for torch in [1]:\n      torch.save(input, "x")',
}


@pytest.mark.parametrize("how", HIDDEN)
def test_no_operator_can_hide(how: str, tmp_path: Path) -> None:
    path = scripted(small(), tmp_path / "net.pt")
    inspect(coded(path, "x = torch.relu(input)"))
    with pytest.raises((UnsafeFile, UnsupportedOperator)):
        inspect(coded(path, HIDDEN[how]))


def test_defaults_and_class_bodies_are_looked_at_too(tmp_path: Path) -> None:
    path = scripted(small(), tmp_path / "net.pt")
    hostile = b'    input: Tensor=torch.from_file("/etc/passwd", False, 4)) -> Tensor:'

    def default(name: str, data: bytes) -> bytes | None:
        return data.replace(b"    input: Tensor) -> Tensor:", hostile) if is_linear(name) else None

    with pytest.raises(UnsafeFile, match="from_file"):
        inspect(replaced(path, default))

    def body(name: str, data: bytes) -> bytes | None:
        line = b"  training : bool\n"
        return data.replace(line, line + b'  x = torch.save(1, "x")\n') if is_linear(name) else None

    with pytest.raises(UnsafeFile, match=r"aten::save"):
        inspect(replaced(path, body))


@pytest.mark.parametrize(
    "data", [b"# \rimport os\n", b"x = 1\x0c\n", b"\xef\xbd\x94orch = 1\n", b"x = '\x00'\n"]
)
def test_characters_that_parsers_read_differently_are_refused(data: bytes, tmp_path: Path) -> None:
    path = scripted(small(), tmp_path / "net.pt")
    with pytest.raises(UnsafeFile, match="characters"):
        inspect(replaced(path, lambda name, old: old + data if is_linear(name) else None))


class Runs:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl", ".py.debug_pkl"])
@pytest.mark.parametrize("call", [(os.system, "true"), (eval, "1")])
def test_a_pickle_that_calls_a_function_is_refused(entry: str, call: Any, tmp_path: Path) -> None:
    path = scripted(small(), tmp_path / "net.pt")
    data = pickle.dumps((Runs(*call),), protocol=2)
    hostile = replaced(path, lambda name, old: data if name.endswith(entry) else None)
    with pytest.raises(UnsafeFile, match=rf"{entry}.*{call[0].__name__}"):
        read(hostile, size=(16, 16))


def test_an_attribute_pickle_of_its_own_is_looked_at_whatever_its_case(tmp_path: Path) -> None:
    path = traced(small(), tmp_path / "net.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("net/Attributes.PKL", pickle.dumps(Runs(os.system, "true"), protocol=2))
    with pytest.raises(UnsafeFile, match="system"):
        inspect(path)


@pytest.mark.parametrize("kind", ["scripted", "frozen"])
def test_weights_that_are_shorter_than_said_are_refused(kind: str, tmp_path: Path) -> None:
    """Torch would fill them up with whatever memory lies behind."""
    script = torch.jit.script(small())
    torch.jit.save(torch.jit.freeze(script) if kind == "frozen" else script, str(tmp_path / "net.pt"))
    folder = "constants" if kind == "frozen" else "data"
    short = replaced(tmp_path / "net.pt", lambda name, old: old[:8] if name == f"{folder}/0" else None)
    with pytest.raises(BadFile, match="lacks weights"):
        read(short, size=(16, 16))
    stored = torch.jit.load(str(short))  # unnoticed
    assert stored is not None


def test_code_in_other_places_is_refused(tmp_path: Path) -> None:
    path = traced(small(), tmp_path / "net.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("net/code/library.so", b"\x7fELF")
    with pytest.raises(UnsafeFile, match=r"library\.so"):
        inspect(path)


def test_code_that_cannot_be_parsed_is_a_bad_file(tmp_path: Path) -> None:
    path = scripted(small(), tmp_path / "net.pt")
    for code in ("x = ((", "x = " + "(" * 5000 + ")" * 5000, "x = " + "-" * 100_000 + "1"):
        with pytest.raises(BadFile):
            inspect(coded(path, code))


def test_state_of_its_own_without_harm_passes(tmp_path: Path) -> None:
    path = scripted(nn.Sequential(Restorer("x"), nn.Linear(3, 2)).eval(), tmp_path / "net.pt")
    source = read(path, size=(8, 8))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(source.module(x), source.original(x))


def test_truncations_and_flipped_bytes_end_in_clear_errors(tmp_path: Path) -> None:
    data = scripted(small(), tmp_path / "net.pt").read_bytes()
    broken = tmp_path / "broken.pt"
    for end in range(0, len(data), 1024):
        broken.write_bytes(data[:end])
        with pytest.raises(ClearfoldError):
            inspect(broken)
    passed = 0
    for position in range(0, len(data), 101):
        flipped = bytearray(data)
        flipped[position] ^= 0xFF
        broken.write_bytes(bytes(flipped))
        try:
            inspect(broken)
            passed += 1  # in weights, where nothing but their checksum tells
        except ClearfoldError:
            pass
    assert passed < len(data) / 101


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_what_torch_writes_of_every_family_passes(name: str, tmp_path: Path) -> None:
    module = Architecture(f"torchvision:{name}", (3, 224, 224)).build()
    for parameter in module.parameters():  # one number each: it is the code that is looked at
        parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)
    path, x = tmp_path / "net.pt", torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        trace, script = torch.jit.trace(module, x, check_trace=False), torch.jit.script(module)
        for kind in (trace, script, torch.jit.freeze(trace), torch.jit.freeze(script)):
            torch.jit.save(kind, str(path))
            inspect(path)
        script._save_for_lite_interpreter(str(path))
        inspect(path)
