"""The fused network back as ONNX and as a torch.export program, with the same outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import fusion
from tests.fusion.test_centering import Transformer
from tests.nets import family


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "transformer"])
def test_fused_networks_export_to_both_formats(name: str, tmp_path: Path) -> None:
    # The transformer's layer norms have become RMS norms.
    module = Transformer(8).eval() if name == "transformer" else family(name)
    size = 8 if name == "transformer" else 64
    fused = fusion.fuse(fusion.capture(module, (torch.randn(1, 3, size, size),))).network
    x = torch.randn(3, 3, size, size)
    expected = fused(x)

    fusion.to_onnx(fused, tmp_path / "fused.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "fused.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5 * float(expected.abs().max()))

    fusion.save_exported(fused, tmp_path / "fused.pt2")
    program = torch.export.load(tmp_path / "fused.pt2")
    torch.testing.assert_close(program.module()(x), expected)
    again = fusion.from_exported(program)
    torch.testing.assert_close(again(x), expected)
    assert set(again.constants) == set(fused.constants)
