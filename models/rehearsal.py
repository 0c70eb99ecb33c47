"""Loads what a conversion needs, by doing a small one, so that a process that waits for a file has it at hand."""

import torch
from torch import nn

import fusion


def rehearse() -> None:
    """Import the readers of files, and let torch set up what it sets up when it is first asked."""
    from models import opened  # noqa: F401
    from models.formats import onnx  # noqa: F401

    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    fusion.fuse(fusion.capture(module, (torch.zeros(2, 1, 2, 2),)), certified=True)
