"""Zoo networks come with their weights, preprocessing and labels, or with an error that helps."""

import sys
from pathlib import Path

import pytest
import torch

import models
from models.zoo import loader
from models.zoo.loader import UnknownNetwork, ZooUnavailable

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("name", "is_zoo"),
    [
        ("builtin", True),
        ("torchvision:resnet18", True),
        ("timm:", True),
        ("builtin:x", False),
        ("net.onnx", False),
        ("C:/net.onnx", False),
        ("torchvision", False),
    ],
)
def test_zoo_names_are_told_from_files(name: str, is_zoo: bool) -> None:
    assert loader.is_zoo_name(name) is is_zoo


def test_torchvision_weights_bring_their_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = pytest.importorskip("torchvision").models
    weights = zoo.SqueezeNet1_1_Weights.DEFAULT
    torch.manual_seed(0)
    module = zoo.squeezenet1_1().eval()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(module.state_dict(), folder / weights.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    opened = models.open("torchvision:squeezenet1_1")

    assert opened.format == "torchvision"
    assert opened.input.size == (224, 224)
    assert opened.input.resize == "crop"
    assert opened.input.crop_fraction == 224 / 256
    assert opened.labels == tuple(weights.meta["categories"])
    x = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(opened.network(x), module(x))
        torch.testing.assert_close(opened.original(x), module(x))


def test_torchvision_preprocessing_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from models.preprocess import prepare

    zoo = pytest.importorskip("torchvision").models
    monkeypatch.setattr(zoo, "get_model", lambda name, weights: zoo.squeezenet1_1())
    source = loader.load("torchvision:squeezenet1_1")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 430, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    expected = zoo.SqueezeNet1_1_Weights.DEFAULT.transforms()(image)[None]
    assert source.input is not None
    torch.testing.assert_close(prepare(image, source.input), expected, atol=0.02, rtol=0)


def test_timm_weights_bring_their_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    from huggingface_hub import constants
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = timm.create_model("test_resnet").eval()
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(module.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    opened = models.open("timm:test_resnet.r160_in1k")

    assert opened.format == "timm"
    assert opened.input.size == (160, 160)
    assert opened.input.mean == pytest.approx(module.pretrained_cfg["mean"])
    assert opened.input.crop_fraction == pytest.approx(0.875, abs=0.1)
    assert opened.labels is not None
    assert len(opened.labels) == 1000
    x = torch.randn(3, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(opened.network(x), module(x), rtol=1e-4, atol=1e-5)


def test_timm_weights_out_of_reach_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ZooUnavailable, match=r"timm:test_resnet.*network connection.*HF_HOME"):
        models.open("timm:test_resnet")


def test_torchvision_weights_out_of_reach_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.error
    import urllib.request

    pytest.importorskip("torchvision")

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(ZooUnavailable, match=r"torchvision:resnet18.*network connection.*TORCH_HOME"):
        models.open("torchvision:resnet18")


def test_a_damaged_checkpoint_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = pytest.importorskip("torchvision").models
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / zoo.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]).write_bytes(b"not a checkpoint")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ZooUnavailable, match="damaged one must be deleted"):
        models.open("torchvision:squeezenet1_1")


@pytest.mark.parametrize(
    ("name", "near"),
    [("torchvision:resnet81", "resnet18"), ("timm:resnt18", "resnet18"), ("timm:resnet18.a1_in1", "a1_in1k")],
)
def test_an_unknown_name_suggests_near_ones(name: str, near: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    with pytest.raises(UnknownNetwork, match=f"Did you mean .*{near}"):
        models.open(name)


def test_networks_for_other_tasks_are_not_offered() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(UnknownNetwork, match="no classifier"):
        models.open("torchvision:fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_says_how_to_install_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ZooUnavailable, match=r"pip install 'clearfold\[zoo\]'"):
        models.open(f"{package}:resnet18")


def test_the_builtin_network_needs_nothing_else() -> None:
    from models.zoo import network

    if not network.WEIGHTS_FILE.is_file():
        pytest.skip("the built-in network is not trained yet")
    opened = models.open("builtin")
    assert opened.format == "builtin"
    assert opened.labels is not None
    assert opened.network.outputs[0].shape == (None, len(opened.labels))


def test_missing_builtin_weights_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.zoo import network

    monkeypatch.setattr(network, "WEIGHTS_FILE", tmp_path / "builtin.safetensors")
    with pytest.raises(ZooUnavailable, match="builtin"):
        models.open("builtin")
