"""Pickles are read opcode by opcode; what no network's pickle holds is refused, and nothing is run."""

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from fusion.errors import BadFile, UnsafeFile
from models.formats.torchscript.allowed import GLOBALS
from models.scan.pickles import MAX_BYTES, MAX_DEPTH, Storage, scan_pickle


def allowed(module: str, name: str) -> bool:
    return (module, name) in GLOBALS


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def test_what_torch_saves_passes() -> None:
    state = OrderedDict(
        weight=torch.randn(2, 3), steps=torch.tensor(3), names=["a", "b"], size=(1, 2.5, None)
    )
    file = io.BytesIO()
    torch.save(state, file)
    with ZipFile(file) as archive:
        storages = scan_pickle(archive.read("archive/data.pkl"), allowed, "state")
    assert storages == [Storage("0", 24), Storage("1", 8)]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "system"), (eval, "eval"), (exec, "exec"), (getattr, "getattr")]
)
def test_a_call_of_another_function_is_refused(
    function: Callable[..., Any], name: str, protocol: int
) -> None:
    data = pickle.dumps({"weight": Calls(function, "1")}, protocol=protocol)
    expected = name if protocol in (1, 2, 3) else "STACK_GLOBAL|opcode|" + name
    with pytest.raises(UnsafeFile, match=expected):
        scan_pickle(data, allowed, "'net.pt' (data.pkl)")


@pytest.mark.parametrize(
    "data",
    [
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"Pwhatever\n.",  # PERSID
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x02ccollections\nOrderedDict\n.more",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02c__torch__.nets\nNet\n.",
        b"\x80\x02ccollections OrderedDict\n\n.",
    ],
)
def test_odd_opcodes_names_and_tails_are_refused(data: bytes) -> None:
    with pytest.raises(UnsafeFile):
        scan_pickle(data, allowed, "file")


@pytest.mark.parametrize("named", [b"Nx", b"K\x05", b")", b"(X\x07\x00\x00\x00storageNK\x01K\x02K\x03t"])
def test_what_is_kept_beside_is_a_storage(named: bytes) -> None:
    with pytest.raises((UnsafeFile, BadFile)):
        scan_pickle(b"\x80\x02" + named + b"Q.", allowed, "file")


def test_nesting_is_bounded_also_by_way_of_the_memo() -> None:
    def nested(depth: int) -> bytes:
        return b"\x80\x02" + b")" + b"\x85" * depth + b"."

    scan_pickle(nested(MAX_DEPTH), allowed, "file")
    with pytest.raises(UnsafeFile, match="deep"):
        scan_pickle(nested(MAX_DEPTH + 1), allowed, "file")
    remembered = b"\x80\x02)" + b"\x85q\x00" * MAX_DEPTH + b"0h\x00\x85."
    with pytest.raises(UnsafeFile, match="deep"):
        scan_pickle(remembered, allowed, "file")


def test_size_is_bounded() -> None:
    with pytest.raises(UnsafeFile, match="64 MiB"):
        scan_pickle(bytes(MAX_BYTES + 1), allowed, "file")


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x80\x02", b"\x80\x02(", b"\x80\x02\x85.", b"\x80\x02h\x05.", b"\xff."]
)
def test_damaged_pickles_are_bad_files(data: bytes) -> None:
    with pytest.raises(BadFile):
        scan_pickle(data, allowed, "file")
