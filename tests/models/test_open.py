"""models.open takes every format, tells them apart by content, and completes the description of the input."""

import copy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import models
from fusion.errors import BadFile, BadInput, CaptureError, ClearfoldError, NonFiniteWeights, NothingToExplain
from models import InputSpec
from models.formats import detect
from models.zoo.loader import UnknownNetwork
from tests.models.nets import scripted, small, traced

pytestmark = pytest.mark.filterwarnings("ignore")


def exported(module: nn.Module, path: Path, batch: int | None = None, **options: object) -> Path:
    x = torch.randn(batch or 2, 3, 16, 16)
    shapes = None if batch else ({0: Dim.AUTO},)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=shapes), path, **options)
    return path


def to_onnx(module: nn.Module, path: Path) -> Path:
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        module, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},), verbose=False
    )
    assert program is not None
    program.save(path)
    return path


def agrees(opened: models.Opened, tolerance: float = 1e-6) -> bool:
    x = torch.randn(3, opened.input.channels, *opened.input.size)
    want, got = opened.original(x), opened.network(x)
    assert want.shape == got.shape == (3, opened.network.outputs[0].shape[1])
    return float((want - got).abs().max()) <= tolerance * float(want.abs().max())


def test_every_format_gives_the_same_network(tmp_path: Path) -> None:
    module = small()
    sources = {
        "module": module,
        "torchscript": scripted(module, tmp_path / "net.pt"),
        "export": exported(module, tmp_path / "net.pt2"),
        "onnx": to_onnx(module, tmp_path / "net.onnx"),
    }
    x = torch.randn(3, 3, 16, 16)
    for format, source in sources.items():
        opened = models.open(source, size=(16, 16))
        assert opened.format == format
        assert opened.input.size == (16, 16)
        assert agrees(opened, 1e-5)
        torch.testing.assert_close(opened.network(x), module(x), rtol=1e-5, atol=1e-5)


def test_the_content_tells_the_format_not_the_name(tmp_path: Path) -> None:
    module = small()
    assert detect(scripted(module, tmp_path / "a.onnx")).name == "torchscript"
    assert detect(exported(module, tmp_path / "b.pt2").rename(tmp_path / "b.pt")).name == "export"
    assert detect(to_onnx(module, tmp_path / "c.onnx").rename(tmp_path / "c.pt2")).name == "onnx"


def test_a_module_is_never_changed() -> None:
    module = small().train()
    before = copy.deepcopy(module.state_dict())
    opened = models.open(module, size=(16, 16))
    opened.original(torch.randn(2, 3, 16, 16))
    assert module.training
    assert all(child.training for child in module.modules())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_old_weight_normalization_vanishes() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    module = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module(torch.randn(2, 3, 8, 8))
    assert agrees(models.open(module, size=(8, 8)))


def test_double_precision_stays(tmp_path: Path) -> None:
    opened = models.open(traced(small().double(), tmp_path / "net.pt"), size=(16, 16))
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(opened.network(x), opened.original(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_program_with_a_fixed_batch_runs_on_any(batch: int, tmp_path: Path) -> None:
    assert agrees(models.open(exported(small(), tmp_path / "net.pt2", batch)))


def test_a_program_for_any_size_takes_the_size_asked_for() -> None:
    free = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(small(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=(free,))
    opened = models.open(program, size=(24, 20))
    assert opened.input.size == (24, 20)
    assert agrees(opened)


def test_a_program_for_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="16x16"):
        models.open(exported(small(), tmp_path / "net.pt2"), size=(32, 32))


def test_defaults_are_imagenets_and_said() -> None:
    opened = models.open(small(), size=(16, 16))
    assert opened.input == InputSpec(size=(16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert opened.labels is None
    assert any("ImageNet" in note for note in opened.notes)


def test_gray_networks_have_gray_defaults() -> None:
    spec = models.open(small(channels=1), size=(16, 16)).input
    assert (spec.channels, spec.order, spec.mean, spec.std) == (1, "L", (0.5,), (0.5,))


METADATA = (
    '{"size": [16, 16], "mean": [0.1, 0.2, 0.3], "std": "0.4, 0.5, 0.6", "channel_order": "bgr", '
    '"labels": ["cat", "dog", "bird", "fish", "fly"]}'
)


@pytest.mark.parametrize("format", ["torchscript", "export"])
def test_the_files_own_description_is_used(format: str, tmp_path: Path) -> None:
    if format == "torchscript":
        path = traced(small(), tmp_path / "net.pt", _extra_files={"clearfold.json": METADATA})
    else:
        path = exported(small(), tmp_path / "net.pt2", extra_files={"clearfold.json": METADATA})
    opened = models.open(path)
    assert opened.input == InputSpec(size=(16, 16), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), order="BGR")
    assert opened.labels == ("cat", "dog", "bird", "fish", "fly")
    assert opened.notes == ()


def test_the_callers_description_goes_before_the_files(tmp_path: Path) -> None:
    path = traced(small(), tmp_path / "net.pt", _extra_files={"clearfold.json": METADATA})
    spec = InputSpec(size=(20, 20), mean=(0.0,), std=(1.0,))
    assert models.open(path, input=spec).input == spec


def test_useless_metadata_is_ignored_and_said(tmp_path: Path) -> None:
    extra = {"a.json": '{"mean": [0.5, 0.5], "labels": ["one", "two"]}'}
    opened = models.open(traced(small(), tmp_path / "net.pt", _extra_files=extra), size=(16, 16))
    assert opened.input.mean == (0.485, 0.456, 0.406)
    assert opened.labels is None
    assert any("2 labels" in note for note in opened.notes)
    assert any("ignored" in note for note in opened.notes)


@pytest.mark.parametrize(
    "text",
    [
        '["a", "b", "c", "d", "e"]',
        "{0: 'a', 1: 'b', 2: 'c', 3: 'd', 4: 'e'}",
        "a,b, c,d,e",
        "a\nb\nc\nd\ne\n",
    ],
)
def test_labels_are_read_as_people_write_them(text: str, tmp_path: Path) -> None:
    path = traced(small(), tmp_path / "net.pt", _extra_files={"labels.txt": text})
    assert models.open(path, size=(16, 16)).labels == ("a", "b", "c", "d", "e")


def test_a_size_that_no_image_has_is_refused() -> None:
    with pytest.raises(BadInput, match="size"):
        models.open(small(), size=(100_000, 100_000))


def test_a_description_for_other_channels_is_refused() -> None:
    with pytest.raises(ClearfoldError, match="channel"):
        models.open(small(), input=InputSpec(size=(16, 16), channels=1))


def test_scores_are_found_among_several_outputs() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": self.inner.stem(x), "logits": self.inner(x), "more": self.inner(x) * 2}

    opened = models.open(Several(), size=(16, 16))
    assert [(o.name, o.kind) for o in opened.network.outputs] == [
        ("features", "map"),
        ("logits", "scores"),
        ("more", "scores"),
    ]
    assert opened.classes == opened.network.outputs[1].shape[1]
    x = torch.randn(3, 3, 16, 16)
    for want, got in zip(opened.original(x), opened.network(x), strict=True):
        torch.testing.assert_close(want, got, rtol=1e-5, atol=1e-5)


def test_trailing_ones_are_dropped() -> None:
    opened = models.open(nn.Sequential(nn.Conv2d(3, 4, 16)), size=(16, 16))
    assert opened.network.outputs[0].shape == (None, 4)
    assert agrees(opened)


class ArgMax(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)).argmax(1), torch.ones(5)


def test_a_network_without_numbers_for_each_image_is_refused() -> None:
    with pytest.raises(NothingToExplain, match="before arg-max"):
        models.open(ArgMax(), size=(16, 16))


def test_a_network_for_other_data_is_refused() -> None:
    with pytest.raises(BadFile, match="4 channels"):
        models.open(nn.Sequential(nn.Conv2d(4, 2, 16)), size=(16, 16))
    with pytest.raises(BadInput, match="size=HxW"):
        models.open(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)))


def test_nan_in_a_modules_weights_is_named() -> None:
    module = small()
    with torch.no_grad():
        module.get_parameter("fc.bias")[0] = float("inf")
    with pytest.raises(NonFiniteWeights, match=r"fc\.bias"):
        models.open(module, size=(16, 16))


def test_a_module_that_branches_on_values_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean([2, 3])) if x.sum() > 0 else self.fc(-x.mean([2, 3]))

    with pytest.raises(CaptureError):
        models.open(Branching(), size=(16, 16))


def test_what_is_no_network_is_named(tmp_path: Path) -> None:
    onnx = to_onnx(small(), tmp_path / "good.onnx").read_bytes()
    cases = {
        "text.onnx": (b"this is a text\n" * 9, "text file"),
        "empty.onnx": (b"", "empty"),
        "lfs.onnx": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        "weights.safetensors": ((8).to_bytes(8, "little") + b'{"a":{} }', "safetensors"),
        "photo.onnx": (b"\x89PNG\r\n\x1a\n\0\0", "image"),
        "noise.onnx": (bytes(range(255, -1, -1)) * 9, "not a network file"),
        "net.onnx.data": (bytes(range(255, -1, -1)) * 9, "the .onnx file that names it"),
        "cut.onnx": (onnx[: len(onnx) // 2], "truncated"),
        "cut.pt2": (exported(small(), tmp_path / "good.pt2").read_bytes()[:-100], "truncated"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadFile, match=message):
            models.open(tmp_path / name)


def test_a_damaged_program_is_refused(tmp_path: Path) -> None:
    data = exported(small(), tmp_path / "net.pt2").read_bytes()
    (tmp_path / "bad.pt2").write_bytes(data.replace(b'"graph_module"', b'"graph_modulo"'))
    with pytest.raises(BadFile, match=r"damaged.*CRC"):
        models.open(tmp_path / "bad.pt2")
    with zipfile.ZipFile(tmp_path / "net.pt2") as source, zipfile.ZipFile(tmp_path / "odd.pt2", "w") as out:
        for entry in source.infolist():
            out.writestr(entry, source.read(entry).replace(b'"graph_module"', b'"graph_modulo"'))
    with pytest.raises(BadFile, match=r"torch\.export"):
        models.open(tmp_path / "odd.pt2")


@pytest.mark.parametrize("name", ["no/such/file.onnx", "hub:resnet18", "resnet18"])
def test_an_unknown_name_lists_what_is_accepted(name: str) -> None:
    with pytest.raises(UnknownNetwork, match=r"builtin.*torchvision:NAME.*ONNX"):
        models.open(name)


def test_other_objects_are_refused() -> None:
    with pytest.raises(BadFile, match="dict is no network"):
        models.open({"weights": 1})


@pytest.mark.parametrize(
    "name",
    ["mnist_2bn.onnx", "resnet20_cifar10.onnx", "resnet20_cifar10.torchscript.pt", "vit_bn_cifar10.onnx"],
)
def test_real_files(name: str, shared: Path) -> None:
    size = (32, 32) if "cifar" in name else None
    assert agrees(models.open(shared / "networks" / name, size=size), 1e-5)


def test_a_real_state_dict_is_refused_with_advice(shared: Path) -> None:
    with pytest.raises(BadFile, match=r"state_dict.*torch\.jit\.trace"):
        models.open(shared / "networks" / "resnet20_cifar10.state_dict.pt")


def test_importing_models_is_light() -> None:
    code = "import sys, models; assert not {'torch', 'onnx', 'torchvision', 'timm', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
