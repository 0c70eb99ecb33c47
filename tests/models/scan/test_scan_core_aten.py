"""Programs decomposed to core ATen pass the scan, and what the scan lets in for them computes on tensors alone."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import models
from fusion.errors import UnsafeFile
from models.formats import exported
from models.formats.torchscript.allowed import CORE, vocabulary

pytestmark = pytest.mark.filterwarnings("ignore")

_TRAINING = ("_backward", "native_dropout", "rand", "randn", "randperm", "nonzero")
# Of what an argument may be: numbers, tensors, choices; a word would name a file, a place or another process.
_PLAIN = {"Tensor", "int", "float", "bool", "number", "Scalar", "SymInt", "Device", "ScalarType", "Generator"}


class Layers(nn.Module):
    """One of each kind of layer that core ATen has another name for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.groups, self.images = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.tokens, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardswish(self.images(self.groups(self.norm(self.conv(x)))))
        t = self.tokens(nn.functional.max_pool2d(y, 4).flatten(2).transpose(1, 2))
        return self.head((t + self.attention(t, t, t, need_weights=False)[0]).mean(1)).log_softmax(1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def decomposed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module, path = Layers().eval(), tmp_path_factory.mktemp("core") / "net.pt2"
    program = torch.export.export(module, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: Dim.AUTO},))
    torch.export.save(program.run_decompositions(), path)
    return module, path


def test_a_saved_decomposed_program_opens_as_the_network(decomposed: tuple[nn.Module, Path]) -> None:
    module, path = decomposed
    network, x = models.open(path).network, torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network(x), module(x), rtol=1e-4, atol=1e-5)
    ops = {layer.op for layer in network.layers()}
    assert {"batch_norm", "group_norm", "instance_norm", "layer_norm", "scaled_dot_product_attention"} <= ops
    assert {"hardswish", "max_pool2d", "log_softmax", "linear"} <= ops
    assert not any("native" in op or op in ("_softmax", "bmm", "addmm") for op in ops)


def test_what_evaluation_has_of_core_aten_may_be_called() -> None:
    names = {
        name
        for name in dir(torch.ops.aten)
        for overload in getattr(getattr(torch.ops.aten, name), "overloads", list)()
        if torch.Tag.core in getattr(getattr(torch.ops.aten, name), overload).tags
    }
    # What writes into its input is none of a functional program.
    wanted = {name for name in names if not name.endswith((*_TRAINING, "_")) and not name.startswith("sym_")}
    assert len(wanted) > 100
    assert {name for name in wanted if f"aten::{name}" not in vocabulary().operators} == set()


@pytest.mark.parametrize("name", CORE)
def test_what_is_let_in_for_it_takes_and_gives_numbers_and_tensors(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema
        for part in (*schema.arguments, *schema.returns):
            words = str(part.type).replace("Optional", "").replace("List", "").strip("[]")
            assert words in _PLAIN, f"{schema}: {part.type}"


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten._native_batch_norm_legit_no_training_from_file.default",
        "torch.ops.c10d._native_batch_norm_legit_no_training.default",
        "torch.ops.aten._native_batch_norm_legit_no_training.default.__globals__",
        "torch._native_batch_norm_legit_no_training",
    ],
)
def test_what_stands_in_the_place_of_a_norm_is_looked_at(
    target: str, decomposed: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    norm, hostile = b"torch.ops.aten._native_batch_norm_legit_no_training.default", tmp_path / "bad.pt2"
    replaced = 0
    with zipfile.ZipFile(decomposed[1]) as source, zipfile.ZipFile(hostile, "w") as out:
        for info in source.infolist():
            data = source.read(info)
            replaced += data.count(norm)
            out.writestr(info.filename, data.replace(norm, target.encode()))
    assert replaced
    with warnings.catch_warnings(), pytest.raises(UnsafeFile, match=target.replace(".", r"\.")):
        exported.read(hostile)
