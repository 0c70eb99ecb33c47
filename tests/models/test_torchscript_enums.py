"""Scripts that branch on an enumeration of their author's, as those of timm's patch embeddings, where the class is not
installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusion
from models.formats.torchscript.reader import read

# In a process of its own: here, nothing may know the class.
AUTHOR = """
import sys
from enum import Enum

import torch
from torch import nn


class Format(Enum):
    NCHW = "NCHW"
    NLC = "NLC"


class Net(nn.Module):
    output: Format

    def __init__(self, output: Format) -> None:
        super().__init__()
        self.output = output
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x).relu()
        if self.output == Format.NLC:
            y = y.flatten(2).transpose(1, 2).mean(1)
        elif self.output != Format.NCHW:
            y = y * 0.0
        else:
            y = y.mean((2, 3)) * 2.0
        return self.head(y)


torch.manual_seed(0)
torch.jit.script(Net(Format[sys.argv[2]]).eval()).save(sys.argv[1])
"""


@pytest.mark.parametrize("member", ["NLC", "NCHW"])
def test_a_branch_on_an_enumeration(tmp_path: Path, member: str) -> None:
    code, path = tmp_path / "author.py", tmp_path / "net.pt"
    code.write_text(AUTHOR)
    subprocess.run([sys.executable, str(code), str(path), member], check=True, capture_output=True)
    source = read(path, size=(8, 8))
    network = fusion.capture(source.module, (source.example,))
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(network(x), source.original(x))
    assert ("mul" in [layer.op for layer in network.layers()]) is (member == "NCHW")
    assert not any("Format" in name for name in torch.jit._state._name_to_pyclass)
