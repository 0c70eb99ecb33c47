"""Quantized TorchScript, against torch's own runtime: read as its dequantized self and explained."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    convert,
    fuse_modules,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
    quantize_dynamic,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fusion
import models
from fusion.errors import UnsupportedOperator
from lrp import Explainer
from models.convert import DIFFERENT_STEPS
from models.convert import convert as convert_file
from models.formats.torchscript import TorchScriptSource, read
from models.opened import QUANTIZED
from tests.models.nets import calibrate

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = 16


class Net(nn.Module):
    """A residual network with the joins that quantization has functions for."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.join, self.both = nn.quantized.FloatFunctional(), nn.quantized.FloatFunctional()
        self.pool, self.mean = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(self.quant(x))))
        x = self.pool(self.join.add_relu(x, self.body(x)))
        x = self.both.cat([x, torch.sigmoid(x)], 1)
        return self.dequant(self.fc(self.mean(x).flatten(1)))


def images(count: int, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return calibrate(Net())


@pytest.fixture(scope="module")
def quantized(original: nn.Module) -> nn.Module:
    ready = fuse_modules(original, [["stem", "bn", "relu"]])
    ready.qconfig = get_default_qconfig("fbgemm")
    observed = prepare(ready)
    observed(images(16, 1))
    return convert(observed)  # type: ignore[no-any-return]


def saved(module: nn.Module, path: Path, kind: str, size: int = SIZE) -> Path:
    x = images(1, size=size)
    script: Any = torch.jit.script(module) if "scripted" in kind else torch.jit.trace(module, x)
    if "frozen" in kind:
        script = torch.jit.freeze(script)
    if "lite" in kind:
        script._save_for_lite_interpreter(str(path))
    else:
        torch.jit.save(script, str(path))
    return path


def agrees(path: Path, steps: int = 1, size: int = SIZE) -> TorchScriptSource:
    """Equal to torch's runtime within so many steps of the output, with a free batch, without integers in the graph."""
    source = read(path, size=(size, size))
    x = images(5, 2, size)
    with torch.no_grad():
        want, got = source.original(x), source.module(x)
    step = float(torch.unique(want).diff().min())
    assert float((want - got).abs().max()) <= 1.01 * steps * step
    network = fusion.capture(source.module, (source.example,))
    torch.testing.assert_close(network(x), got, rtol=1e-5, atol=1e-6)
    computed = [n for n in network.graph.nodes if n.op == "call_function" and n.meta.get("dtype")]
    assert all(n.meta["dtype"].is_floating_point for n in computed)
    assert source.notes == (QUANTIZED,)
    return source


KINDS = ["traced", "scripted", "traced frozen", "scripted frozen", "traced lite"]


@pytest.mark.parametrize("kind", KINDS)
def test_static_quantization_of_modules(kind: str, quantized: nn.Module, tmp_path: Path) -> None:
    source = agrees(saved(quantized, tmp_path / "net.pt", kind))
    network = fusion.capture(source.module, (source.example,))
    layers = {(layer.layer, layer.op) for layer in network.layers()}
    frozen = "frozen" in kind
    assert (("conv2d_relu_1" if frozen else "stem"), "conv2d") in layers
    assert (("linear_1" if frozen else "fc"), "linear") in layers


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_static_quantization_of_graphs(kind: str, backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = calibrate(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.ReLU6(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6), nn.LeakyReLU(0.1), nn.Linear(6, 4),
        )
    )  # fmt: skip
    observed = prepare_fx(module, get_default_qconfig_mapping(backend), (images(1),))
    observed(images(16, 1))
    agrees(saved(convert_fx(observed), tmp_path / "net.pt", kind))


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamic_quantization(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6)
    )
    path = saved(quantize_dynamic(module.eval(), {nn.Linear}, dtype), tmp_path / "net.pt", kind)
    source = read(path, size=(SIZE, SIZE))
    assert source.notes == (QUANTIZED, "activations are not rounded")
    x = images(5, 2)
    with torch.no_grad():
        want, got = source.original(x), fusion.capture(source.module, (source.example,))(x)
    assert float((want - got).abs().max()) <= 0.01 * float(want.abs().max())


Compute = Callable[[Tensor, Tensor], Tensor]
Q: Any = torch.ops.quantized
COMPUTED: dict[str, Compute] = {
    "add": lambda a, b: Q.add(a, b, 0.05, 100),
    "add_relu": lambda a, b: Q.add_relu(a, b, 0.04, 3),
    "add a number": lambda a, b: Q.add_scalar(a, 0.7),
    "add a large number": lambda a, b: Q.add_scalar(a, 50.0),
    "subtract a large number": lambda a, b: Q.add_scalar(a, -50.0),
    "mul": lambda a, b: Q.mul(a, b, 0.1, 120),
    "times a number": lambda a, b: Q.mul_scalar(a, 0.3),
    "times a negative number": lambda a, b: Q.mul_scalar(a, -0.3),
    "cat": lambda a, b: Q.cat([a, b], 1, 0.06, 90),
    "torch.cat": lambda a, b: torch.cat([a, b], 1),
    "relu": lambda a, b: torch.relu(a),
    "relu6": lambda a, b: Q.relu6(a),
    "clamp": lambda a, b: Q.clamp(a, -0.31, 1.7),
    "hardtanh": lambda a, b: torch.nn.functional.hardtanh(a),
    "sigmoid": lambda a, b: torch.sigmoid(a),
    "sigmoid with a scale": lambda a, b: Q.sigmoid(a, 0.01, 7),
    "tanh": lambda a, b: torch.tanh(a),
    "hardsigmoid": lambda a, b: torch.nn.functional.hardsigmoid(a),
    "hardswish": lambda a, b: Q.hardswish(a, 0.03, 60),
    "elu": lambda a, b: Q.elu(a, 0.04, 40, 0.9),
    "celu": lambda a, b: Q.celu(a, 0.04, 40, 1.2),
    "leaky_relu": lambda a, b: Q.leaky_relu(a, 0.1, False, 0.05, 50),
    "softmax": lambda a, b: Q.softmax(a, 1, 1 / 256, 0),
    "threshold": lambda a, b: Q.threshold(a, 0.5, 0.25),
    "layer_norm": lambda a, b: Q.layer_norm(a, [SIZE], None, None, 1e-5, 0.05, 120),
    "max_pool2d": lambda a, b: torch.max_pool2d(a, [2, 2]),
    "avg_pool2d": lambda a, b: torch.nn.functional.avg_pool2d(a, 3, 2, 1),
    "mean": lambda a, b: torch.mean(a, [2, 3], keepdim=True),
    "upsample": lambda a, b: torch.nn.functional.interpolate(a, scale_factor=2.0),
    "bilinear": lambda a, b: torch.nn.functional.interpolate(a, scale_factor=2.0, mode="bilinear"),
    "slices": lambda a, b: a[:, :2, 1:].transpose(2, 3).contiguous(),
    "chunk": lambda a, b: torch.chunk(a, 3, 1)[1],
    "matmul": lambda a, b: Q.matmul(a, b, 0.2, 110),
}


class Computes(nn.Module):
    def __init__(self, compute: Compute, dtype: torch.dtype) -> None:
        super().__init__()
        self.compute, self.dtype, self.zero = compute, dtype, 0 if dtype == torch.qint8 else 100

    def forward(self, x: Tensor) -> Tensor:
        a = torch.quantize_per_tensor(x, 0.03, self.zero, self.dtype)
        b = torch.quantize_per_tensor(x.flip(1) * 0.7, 0.02, self.zero, self.dtype)
        return self.compute(a, b).dequantize().flatten(1)


@pytest.mark.parametrize("name", COMPUTED)
def test_each_operator_rounds_as_torch_does(name: str, tmp_path: Path) -> None:
    agrees(saved(Computes(COMPUTED[name], torch.quint8), tmp_path / "net.pt", "traced"))


@pytest.mark.parametrize("name", ["add", "mul", "times a negative number", "tanh", "sigmoid", "relu"])
def test_signed_integers_too(name: str, tmp_path: Path) -> None:
    module = Computes(COMPUTED[name], torch.qint8)
    agrees(saved(module, tmp_path / "net.pt", "traced"))


def test_weights_that_are_packed_on_the_way(tmp_path: Path) -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.quantize_per_tensor(x, 0.03, 100, torch.quint8)
            scales, zeros = torch.full((4,), 0.02, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
            weight = torch.quantize_per_channel(self.weight, scales, zeros, 0, torch.qint8)
            packed = torch.ops.quantized.conv2d_prepack(weight, None, [2, 2], [1, 1], [1, 1], 1)
            return torch.ops.quantized.conv2d_relu(a, packed, 0.2, 0).dequantize().flatten(1)

    torch.manual_seed(0)
    agrees(saved(Packs().eval(), tmp_path / "net.pt", "scripted"))


def test_what_cannot_be_told_in_floats_is_named(tmp_path: Path) -> None:
    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.quantize_per_tensor(x, 0.03, 100, torch.quint8).int_repr().float().flatten(1)

    with pytest.raises(UnsupportedOperator, match="int_repr of quantized values"):
        read(saved(Peeks(), tmp_path / "net.pt", "traced"), size=(SIZE, SIZE))


def heatmap(module: Any, x: Tensor, composite: str) -> Tensor:
    network = fusion.fuse(fusion.capture(module, (images(2, size=x.shape[-1]),))).network
    explainer = Explainer(network, composite=composite, device="cpu", dtype=torch.float64)
    found = explainer.explain(x, target=[1] * len(x))
    assert found.ledger is not None
    assert float(found.ledger.error.max()) <= 1e-9
    return torch.as_tensor(found.relevance)


@pytest.mark.parametrize("composite", ["auto", "EpsilonPlus"])
@pytest.mark.parametrize("kind", ["traced", "scripted frozen"])
def test_heatmaps_are_the_float_networks(
    kind: str, composite: str, original: nn.Module, quantized: nn.Module, tmp_path: Path
) -> None:
    x = images(3, 4)
    want = heatmap(original, x, composite)
    script = read(saved(quantized, tmp_path / "net.pt", kind), size=(SIZE, SIZE))
    got = heatmap(script.module, x, composite)
    for a, b in zip(want, got, strict=True):
        assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) >= 0.95


def test_a_conversion_counts_in_steps(quantized: nn.Module, original: nn.Module, tmp_path: Path) -> None:
    path = saved(quantized, tmp_path / "net.pt", "traced")
    assert models.open(path, size=(SIZE, SIZE)).quantized
    assert not models.open(saved(original, tmp_path / "float.pt", "traced"), size=(SIZE, SIZE)).quantized
    manifest = convert_file(path, tmp_path / "artefact", size=(SIZE, SIZE))
    assert QUANTIZED in manifest["notes"]
    assert manifest["certificate"]["max_relative"] <= DIFFERENT_STEPS


def zoo_network(name: str) -> tuple[nn.Module, nn.Module]:
    """A torchvision network with random weights as floats and quantized."""
    zoo = pytest.importorskip("torchvision").models.quantization
    torch.manual_seed(0)
    module = calibrate(getattr(zoo, name)(weights=None, quantize=False))
    twin = copy.deepcopy(module)
    module.fuse_model()
    module.qconfig = get_default_qconfig("fbgemm")
    observed = prepare(module)
    observed(images(8, 1, 64))
    return twin, convert(observed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_heatmaps_of_torchvision_networks(name: str, tmp_path: Path) -> None:
    module, quantized = zoo_network(name)
    x = images(2, 4, 64)
    script = read(saved(quantized, tmp_path / "net.pt", "scripted", 64), size=(64, 64)).module
    want, got = heatmap(module, x, "EpsilonPlus"), heatmap(script, x, "EpsilonPlus")
    for a, b in zip(want, got, strict=True):
        assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("kind", ["traced", "scripted"])
def test_torchvision_networks(name: str, kind: str, tmp_path: Path) -> None:
    """Layer by layer they agree within a step (one in ten thousand values is on the other side of a half), and
    what that comes to in the end is a few steps."""
    _, quantized = zoo_network(name)
    source = read(saved(quantized, tmp_path / "net.pt", kind, 64), size=(64, 64))
    x = images(4, 2, 64)
    with torch.no_grad():
        want, got = source.original(x), fusion.capture(source.module, (source.example,))(x)
    step = float(torch.unique(want).diff().min())
    steps = ((want - got) / step).round().abs()
    assert float(steps.max()) <= 3
    assert float(steps.mean()) <= 1
