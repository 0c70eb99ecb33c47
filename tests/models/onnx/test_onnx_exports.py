"""Fresh exports of torchvision's families by both of torch's exporters."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_files import agrees
from torch import nn

torchvision = pytest.importorskip("torchvision")

FAMILIES = [
    "vgg11_bn",
    "resnet18",
    "resnext50_32x4d",
    "densenet121",
    "mobilenet_v2",
    "googlenet",
    "squeezenet1_1",
    "mnasnet0_5",
    "vit_b_16",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "convnext_tiny",
    "swin_t",
    "regnet_y_400mf",
]
QUICK = {
    ("resnet18", "dynamo"),
    ("resnet18", "legacy"),
    ("squeezenet1_1", "dynamo-fixed"),
    ("mobilenet_v3_small", "legacy"),
    ("shufflenet_v2_x0_5", "legacy"),
}
WAYS = ["dynamo", "dynamo-fixed", "legacy"]


def network(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None}
    size = 96
    if name == "googlenet":
        options |= {"transform_input": True, "aux_logits": False, "init_weights": False}
    if name == "vit_b_16":
        options |= {"image_size": size}
    module = torchvision.models.get_model(name, **options).eval()
    for tensor in module.parameters():
        if not tensor.any():  # an output layer that starts at zero would hide everything
            nn.init.normal_(tensor, std=0.1)
    return module, size


def export(module: nn.Module, size: int, way: str, path: Path) -> None:
    x = torch.randn(2, 3, size, size)
    buffer = io.BytesIO()
    if way == "legacy":
        torch.onnx.export(
            module,
            (x,),
            buffer,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )
        path.write_bytes(buffer.getvalue())
    elif way == "dynamo":
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(
            module, (x,), path, dynamo=True, external_data=False, dynamic_shapes=shapes, verbose=False
        )
    else:
        torch.onnx.export(module, (x[:1],), path, dynamo=True, external_data=False, verbose=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) in QUICK else pytest.mark.slow)
        for name in FAMILIES
        for way in WAYS
        # The older exporter has no adaptive pool to sizes that do not divide the input's.
        if (name, way) != ("vgg11_bn", "legacy")
    ],
)
def test_families(tmp_path: Path, name: str, way: str) -> None:
    module, size = network(name)
    path = tmp_path / "net.onnx"
    export(module, size, way, path)
    source = agrees(path)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(source.module(x), module(x), rtol=1e-3, atol=1e-4)
    paths = {path for path, _ in source.module.named_modules()}
    if name.startswith("resn"):
        assert {"conv1", "layer1.0.conv1", "layer1.0.add", "layer4.1.conv2", "fc"} <= paths


def test_normalizations_survive_an_export_in_training_mode_of_the_exporter(tmp_path: Path) -> None:
    """`training=PRESERVE` keeps the BatchNormalization nodes that other exports fold."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    buffer = io.BytesIO()
    keep = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        module, (torch.randn(1, 3, 8, 8),), buffer, dynamo=False, training=keep, do_constant_folding=False
    )
    path = tmp_path / "net.onnx"
    path.write_bytes(buffer.getvalue())
    names = [name for name, _ in agrees(path).module.named_modules()]
    assert {"0", "1", "2"} <= set(names)
