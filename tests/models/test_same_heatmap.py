"""One network, any format, one heatmap: module, TorchScript, ONNX and torch.export give the same relevance."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import lrp
import models
from tests.nets import family

SIZE = 64
QUICK = ("resnet18", "mobilenet_v2", "squeezenet1_1")
LONG = ("vgg11_bn", "resnext50_32x4d", "densenet121", "googlenet", "mnasnet0_5")
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]


def written(module: nn.Module, x: Tensor, folder: Path, onnx: bool) -> dict[str, Path]:
    """The module in the files of each format."""
    paths = {
        "torchscript": folder / "net.pt",
        "export": folder / "net.pt2",
        "core ATen": folder / "core.pt2",
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, x).save(str(paths["torchscript"]))
        program = torch.export.export(module, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
        torch.export.save(program, paths["export"])
        torch.export.save(program.run_decompositions(), paths["core ATen"])
        if onnx:
            paths["onnx"] = folder / "net.onnx"
            with contextlib.redirect_stdout(io.StringIO()):
                exported = torch.onnx.export(
                    module, (x,), dynamo=True, dynamic_shapes=({0: Dim.DYNAMIC},), verbose=False
                )
            exported.save(str(paths["onnx"]))
    return paths


def relevance(source: nn.Module | Path, x: Tensor) -> Tensor:
    network = models.open(source, size=(SIZE, SIZE)).network
    return lrp.Explainer(network, composite="EpsilonPlusFlat", dtype=x.dtype).explain(x, 3).relevance


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_heatmap_in_single_precision(name: str, tmp_path: Path) -> None:
    module, x = family(name, SIZE), torch.randn(2, 3, SIZE, SIZE)
    expected = relevance(module, x)
    for form, path in written(module, x, tmp_path, onnx=True).items():
        got = relevance(path, x)
        # Exporters fold batch norms in float32 themselves, which is as far off as float32 is.
        assert float((got - expected).abs().max()) <= 5e-3 * float(expected.abs().max()), form


@pytest.mark.parametrize("name", NAMES)
def test_formats_that_keep_the_layers_agree_in_double_precision(name: str, tmp_path: Path) -> None:
    module, x = family(name, SIZE).double(), torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    expected = relevance(module, x)
    for form, path in written(module, x, tmp_path, onnx=False).items():
        got = relevance(path, x)
        assert float((got - expected).abs().max()) <= 1e-9 * float(expected.abs().max()), form
