"""Real, trained files agree with ONNX Runtime and keep their authors' names."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_files import agrees

NAMES = {
    "mnist_2bn": {"conv1", "norm1", "fc2"},
    "resnet20_cifar10": {"conv1", "layer1.0.conv1", "layer3.2.bn2", "layer1.0.add", "linear"},
    "mobilenet_v2_imagenet": {"features.0.0.0", "features.1.conv.0.0.0", "features.0.1"},
    "vit_bn_cifar10": {"0.projection", "1.0.0.fn.0.norm", "1.0.0.fn.1.query"},
    "squeezenet1_1_fp16": {"conv1", "fire2.squeeze1x1"},
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_shared_files(shared: Path, name: str) -> None:
    tolerance = 5e-3 if "fp16" in name else 1e-5
    source = agrees(shared / "networks" / f"{name}.onnx", tolerance)
    missing = NAMES[name] - {path for path, _ in source.module.named_modules()}
    assert not missing


def test_half_precision_is_noted(shared: Path) -> None:
    from models.formats.onnx import read

    source = read(shared / "networks" / "squeezenet1_1_fp16.onnx")
    assert "float16 weights: computed in float32" in source.notes
    assert all(p.dtype.itemsize == 4 for p in source.module.parameters())
