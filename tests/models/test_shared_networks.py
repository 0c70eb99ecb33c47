"""The real, trained networks: each agrees with its own runtime, is as accurate as recorded, and explains."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fusion
import lrp
import models
from models.preprocess import InputSpec, prepare

IMAGENET = InputSpec(size=(224, 224), resize="crop", crop_fraction=0.875)
CIFAR = InputSpec(size=(32, 32))
# Caffe's BGR 0..255 minus a mean per channel.
CAFFE = InputSpec(size=(224, 224), mean=(104, 117, 123), std=(1, 1, 1), scale=1.0, order="BGR")
NETWORKS = {
    "mnist_2bn.onnx": InputSpec(size=(28, 28), channels=1, mean=(0.1307,), std=(0.3081,), order="L"),
    "squeezenet1_1_fp16.onnx": CAFFE,
    "vit_bn_cifar10.onnx": CIFAR,
    "resnet20_cifar10.onnx": CIFAR,
    "resnet20_cifar10.torchscript.pt": CIFAR,
    "mobilenet_v2_imagenet.onnx": IMAGENET,
    "mobilenet_v2_imagenet.torchscript.pt": IMAGENET,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_it_answers_as_its_own_runtime_and_explains(name: str, shared: Path) -> None:
    opened = models.open(shared / "networks" / name, input=NETWORKS[name], size=NETWORKS[name].size)
    x = torch.randn(8, *opened.network.inputs[0].shape[1:])  # type: ignore[arg-type]
    fused = fusion.fuse(opened.network)
    certificate = fusion.certify(opened.original, fused.network, [x])
    # The one float16 file is computed in float32 here and in float16 by its own runtime.
    assert certificate.max_relative <= (5e-3 if "fp16" in name else 1e-5)
    assert all(row.into or row.reason for row in fused.report.rows)
    answer = lrp.Explainer(opened.network).explain(x[:2])
    assert torch.isfinite(answer.relevance).all()
    assert answer.relevance.any()
    assert answer.ledger is not None
    assert answer.ledger.closes(1e-3)


def accuracy(name: str, shared: Path, images: list[Tensor], labels: list[int]) -> float:
    opened = models.open(shared / "networks" / name, input=NETWORKS[name], size=NETWORKS[name].size)
    fused = fusion.fuse(opened.network).network
    answers = torch.cat([fused(torch.cat(images[i : i + 20])) for i in range(0, len(images), 20)]).argmax(1)
    return float((answers == torch.tensor(labels)).float().mean())


def test_the_fused_cifar_network_is_as_accurate_as_recorded(shared: Path) -> None:
    data = np.load(shared / "data" / "cifar10_lossless" / "cifar10_lossless_subset.npz")
    images = [prepare(image.reshape(32, 32, 3), CIFAR) for image in data["x_test100"]]
    labels = [int(label) for label in data["y_test100"]]
    assert accuracy("resnet20_cifar10.onnx", shared, images, labels) >= 0.93


def test_the_fused_mnist_network_is_as_accurate_as_recorded(shared: Path) -> None:
    data = np.load(shared / "data" / "mnist.npz")
    spec = NETWORKS["mnist_2bn.onnx"]
    images = [prepare(image, spec) for image in data["x_test"][:500]]
    assert accuracy("mnist_2bn.onnx", shared, images, data["y_test"][:500].tolist()) >= 0.98


def test_the_fused_imagenet_network_is_as_accurate_as_recorded(shared: Path) -> None:
    folder = shared / "data" / "imagenet_samples"
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    index = next(key for key in rows[0] if "index" in key)
    name = next(key for key in rows[0] if "file" in key or "image" in key)
    images = [prepare(folder / row[name], IMAGENET) for row in rows]
    labels = [int(row[index]) for row in rows]
    assert accuracy("mobilenet_v2_imagenet.onnx", shared, images, labels) >= 0.8
