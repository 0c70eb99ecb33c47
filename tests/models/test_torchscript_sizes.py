"""Sizes in traces, which are written as tensors there: whatever is computed of them, the batch stays free."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusion
from models.formats.torchscript import read
from tests.models.nets import Small, calibrate

pytestmark = pytest.mark.filterwarnings("ignore")


def padded_as_needed(x: Tensor) -> Tensor:
    """What "same" padding takes, where the network works it out itself."""
    height, width = x.shape[-2:]  # tensors, while a trace is made
    down = torch.clamp((height / 2).ceil() * 2 + 3 - height, min=0)
    right = torch.clamp_max(width - 13, 2)
    return F.pad(x, [0, right, 0, down])


def repeated_to_the_batch(x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    mean = x.mean(1)
    return (rows + mean.repeat_interleave(rows.shape[0] // mean.shape[0], dim=0)).view_as(x)


def counted_in_place(x: Tensor) -> Tensor:
    count = x.shape[0]
    count *= x.shape[1]
    return x.reshape(count, -1).softmax(1).view_as(x)


@pytest.mark.parametrize("head", [padded_as_needed, repeated_to_the_batch, counted_in_place])
def test_the_batch_stays_free(head: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    class Net(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(head(x))

    module, path = calibrate(Net()), tmp_path / "net.pt"
    torch.jit.trace(module, torch.randn(2, 3, 15, 15), check_trace=False).save(path)
    source = read(path, size=(15, 15))
    network = fusion.capture(source.module, (source.example,))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 15, 15)
        torch.testing.assert_close(network(x), source.original(x), rtol=1e-5, atol=1e-6)
