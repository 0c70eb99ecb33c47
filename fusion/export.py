"""A network back in the formats of others: a torch.export program and an ONNX file, both with a free batch."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from fusion.network import Network, graph_module
from fusion.tracing import TRACING


def to_exported(network: Network) -> ExportedProgram:
    """The network as a torch.export program whose constants keep their names."""
    example = tuple(
        torch.zeros(
            [2 if size is None else size for size in spec.shape], dtype=spec.dtype, device=network.device
        )
        for spec in network.inputs
    )
    shapes = tuple({0: Dim.DYNAMIC} for _ in example)
    module = graph_module(network.constants, network.copy().graph, "Network")
    with TRACING, torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)


def save_exported(network: Network, path: Path) -> None:
    """Write the network as a .pt2 file."""
    torch.export.save(to_exported(network), path)


def to_onnx(network: Network, path: Path, *, opset: int = 18) -> None:
    """Write the network as one self-contained ONNX file with a free batch dimension."""
    program = to_exported(network)
    # The exporter reports its progress on stdout; a library must not.
    with TRACING, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
        assert onnx_program is not None
        onnx_program.save(str(path), external_data=False)
