"""TorchScript files become networks with the author's layer names and the script's own numbers."""

import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusion
from fusion.errors import BadFile, CaptureError, NonFiniteWeights, UnsupportedOperator
from models.formats.torchscript import read
from tests.models.nets import Small, calibrate, scripted, small, traced

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["traced", "scripted", "traced frozen", "scripted frozen", "traced folded", "scripted folded"]


def save(module: nn.Module, path: Path, kind: str, x: Tensor) -> Path:
    script = torch.jit.trace(module, x) if kind.startswith("traced") else torch.jit.script(module)
    if kind.endswith(("frozen", "folded")):
        script = torch.jit.freeze(script, optimize_numerics=kind.endswith("folded"))
    torch.jit.save(script, str(path))
    return path


def difference(path: Path, x: Tensor) -> float:
    """Network against script on another batch size than the example's, relative to the largest output."""
    source = read(path, size=tuple(x.shape[2:]))
    assert source.example.shape[0] == 2
    network = fusion.capture(source.module, (source.example,))
    want, got = source.original(x), network(x)
    want = want if isinstance(want, Tensor) else want[0]
    return float((want - got).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_scripts_own(kind: str, tmp_path: Path) -> None:
    module, x = small(), torch.randn(2, 3, 16, 16)
    path = save(module, tmp_path / "net.pt", kind, x)
    assert difference(path, torch.randn(3, 3, 16, 16)) <= 1e-6


@pytest.mark.parametrize("kind", KINDS[:4])
def test_in_double_precision_too(kind: str, tmp_path: Path) -> None:
    module, x = small().double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    path = save(module, tmp_path / "net.pt", kind, x)
    assert difference(path, torch.randn(3, 3, 16, 16, dtype=torch.float64)) <= 1e-12


FAMILY = ["vgg11_bn", "resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v2"]
FAMILY += ["googlenet", "squeezenet1_1", "mnasnet0_5"]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, KINDS[i % 2]) for i, name in enumerate(FAMILY)]
    + [pytest.param(name, KINDS[(i + 1) % 2], marks=SLOW) for i, name in enumerate(FAMILY)],
)
def test_torchvision_networks_keep_their_names(name: str, kind: str, tmp_path: Path) -> None:
    zoo = pytest.importorskip("torchvision").models
    options = {"init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    module, size = calibrate(getattr(zoo, name)(weights=None, **options)), 64
    path = save(module, tmp_path / "net.pt", kind, torch.randn(2, 3, size, size))
    source = read(path, size=(size, size))
    network = fusion.capture(source.module, (source.example,))
    x = torch.randn(3, 3, size, size)
    want = source.original(x)
    want = want if isinstance(want, Tensor) else want[0]
    torch.testing.assert_close(network(x), want, rtol=0, atol=1e-6 * float(want.abs().max()))
    paths = dict(module.named_modules())
    assert all(layer.layer in paths for layer in network.layers())
    named = {
        layer.layer for layer in network.layers() if layer.op in ("batch_norm", "conv2d", "linear", "relu")
    }
    assert {n for n, m in module.named_modules() if isinstance(m, nn.Conv2d) and "aux" not in n} <= named


@pytest.mark.parametrize("name", ["resnet20_cifar10", "mobilenet_v2_imagenet"])
def test_real_files(name: str, shared: Path) -> None:
    size = 32 if "cifar" in name else 96
    path = shared / "networks" / f"{name}.torchscript.pt"
    assert difference(path, torch.randn(3, 3, size, size)) <= 1e-6


@pytest.mark.parametrize("kind", KINDS[:2])
def test_layers_without_weights_have_names_too(kind: str, tmp_path: Path) -> None:
    path = save(small(), tmp_path / "net.pt", kind, torch.randn(2, 3, 16, 16))
    source = read(path, size=(16, 16))
    network = fusion.capture(source.module, (source.example,))
    found = {(layer.layer, layer.op) for layer in network.layers()}
    assert {("blocks.0.relu", "relu"), ("blocks.1.bn", "batch_norm"), ("fc", "linear")} <= found
    assert "blocks.0.conv.weight" in network.constants


def test_frozen_scripts_get_names_from_their_operators(tmp_path: Path) -> None:
    path = save(small(), tmp_path / "net.pt", "scripted frozen", torch.randn(2, 3, 16, 16))
    source = read(path, size=(16, 16))
    network = fusion.capture(source.module, (source.example,))
    found = {(layer.layer, layer.op) for layer in network.layers()}
    assert {
        ("conv2d_1", "conv2d"),
        ("batch_norm_2", "batch_norm"),
        ("relu_2", "relu"),
        ("linear_1", "linear"),
    } <= found


def test_a_script_saved_in_training_mode_is_read_in_evaluation_mode(tmp_path: Path) -> None:
    module = small()
    path = scripted(module.train(), tmp_path / "net.pt")
    source = read(path, size=(16, 16))
    network = fusion.capture(source.module, (source.example,))
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(network(x), module.eval()(x))


def test_a_trace_of_training_mode_is_refused(tmp_path: Path) -> None:
    path = traced(small().train(), tmp_path / "net.pt")
    with pytest.raises(CaptureError, match=r"blocks\.0\.bn.*eval"):
        read(path, size=(16, 16))


def test_what_the_optimizer_for_mobile_devices_does_is_read(tmp_path: Path) -> None:
    """Convolutions with folded normalizations, additions joined with ReLU, and bytecode beside the code."""

    class Joined(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = torch.relu(torch.add(self.blocks(x), x, alpha=2))
            return self.fc(self.drop(x).mean([2, 3]))

    torch.manual_seed(0)
    module, x = calibrate(Joined()), torch.randn(3, 3, 16, 16)
    script = torch.jit.freeze(torch.jit.script(module))
    torch._C._jit_pass_fuse_add_relu(script.graph)
    assert "_add_relu" in str(script.graph)
    script._save_for_lite_interpreter(str(tmp_path / "net.ptl"))
    assert difference(tmp_path / "net.ptl", x) <= 1e-6
    names = zipfile.ZipFile(tmp_path / "net.ptl").namelist()
    assert any(name.endswith("bytecode.pkl") for name in names)


@pytest.mark.parametrize("kind", ["traced frozen", "scripted frozen", "scripted folded"])
def test_heatmaps_of_frozen_scripts_are_the_modules(kind: str, tmp_path: Path) -> None:
    from lrp import Explainer

    module, x = small(), torch.randn(2, 3, 16, 16)
    source = read(save(module, tmp_path / "net.pt", kind, x), size=(16, 16))
    found = []
    for read_from in (module, source.module):
        network = fusion.fuse(fusion.capture(read_from, (x,))).network
        found.append(Explainer(network, device="cpu").explain(x, target=[1, 2]).relevance)
    assert float((found[0] - found[1]).abs().max()) <= 1e-5 * float(found[0].abs().max())


def test_what_an_optimizer_made_unreadable_says_so(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.optimize_for_inference(torch.jit.script(small())), str(tmp_path / "net.pt"))
    with pytest.raises(UnsupportedOperator, match=r"optimize_for_inference.*before"):
        read(tmp_path / "net.pt", size=(16, 16))
    path = rewritten(scripted(small(), tmp_path / "s.pt"), "torch.relu_(", "ops.prepacked.conv2d_clamp_run(")
    with pytest.raises(UnsupportedOperator, match=r"optimize_for_mobile.*before"):
        read(path, size=(16, 16))


class Loops(nn.Module):
    """Lists, loops, conditions and a default argument, as scripted code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(3)])
        self.fc = nn.Linear(9, 4)

    def forward(
        self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        parts: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            parts.append(layer(x) * i if i > 0 else layer(x))
        if x.dim() != 4:
            raise ValueError("four dimensions, please")
        merged = torch.cat(parts, 1)
        n, c = merged.shape[0], merged.shape[1]
        for _ in range(2):
            merged = merged / scale
        assert c == 9
        if mask is not None:
            merged = merged * mask
        return self.fc(merged.reshape(n, c, -1).mean(-1)), None


def test_python_in_scripts_is_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert difference(scripted(Loops().eval(), tmp_path / "net.pt"), torch.randn(5, 3, 8, 8)) <= 1e-6


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gate(x).mean([2, 3]))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return x
        return -x


class Quantizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), Writer())

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean([2, 3])


class Writer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.resize_(x.shape)


def test_an_unsupported_operator_is_named_with_its_layer(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperator, match=r"resize_.*features\.1"):
        read(scripted(Quantizing().eval(), tmp_path / "net.pt"), size=(8, 8))


def test_a_custom_operator_is_named_with_its_layer(tmp_path: Path) -> None:
    path = rewritten(scripted(small(), tmp_path / "net.pt"), "torch.relu_(", "ops.mylib.relu(")
    with pytest.raises(UnsupportedOperator, match=r"mylib::relu"):
        read(path, size=(16, 16))


def rewritten(path: Path, old: str, new: str) -> Path:
    """The archive with a piece of its code replaced."""
    target = path.with_name("changed.pt")
    found = False
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith(".py") and old.encode() in data:
                data, found = data.replace(old.encode(), new.encode()), True
            out.writestr(entry, data)
    assert found
    return target


def test_nan_in_the_weights_is_named(tmp_path: Path) -> None:
    module = small()
    with torch.no_grad():
        module.get_parameter("blocks.1.conv.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeights, match=r"blocks\.1\.conv\.weight"):
        read(traced(module, tmp_path / "net.pt"), size=(16, 16))
    with pytest.raises(NonFiniteWeights):
        read(save(module, tmp_path / "f.pt", "traced frozen", torch.randn(2, 3, 16, 16)), size=(16, 16))


def test_an_open_size_is_assumed_and_said(tmp_path: Path) -> None:
    source = read(traced(small(), tmp_path / "net.pt"))
    assert source.example.shape == (2, 3, 224, 224)
    assert "224x224" in source.notes[0]


def test_the_channels_are_those_of_the_first_convolution(tmp_path: Path) -> None:
    assert read(traced(small(channels=1), tmp_path / "n.pt", channels=1)).example.shape[1] == 1
    depthwise = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert read(traced(depthwise.eval(), tmp_path / "d.pt")).example.shape[1] == 3


def test_a_size_that_cannot_be_is_refused_with_advice(tmp_path: Path) -> None:
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).eval()
    path = traced(fixed, tmp_path / "net.pt")
    with pytest.raises(BadFile, match="size=HxW"):
        read(path)
    assert read(path, size=(16, 16)).example.shape == (2, 3, 16, 16)


def test_extra_files_are_metadata(tmp_path: Path) -> None:
    extra = {"config.json": '{"size": [16, 16], "mean": [0.5, 0.5, 0.5]}', "labels.txt": "a\nb"}
    source = read(traced(small(), tmp_path / "net.pt", _extra_files=extra))
    assert source.example.shape == (2, 3, 16, 16)
    assert source.metadata["mean"] == [0.5, 0.5, 0.5]
    assert source.metadata["labels"] == "a\nb"
    assert source.notes == ()


def test_several_inputs_are_refused(tmp_path: Path) -> None:
    class Two(Small):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.fc((x + y).mean([2, 3]))

    with pytest.raises(BadFile, match="2 inputs"):
        read(scripted(Two().eval(), tmp_path / "net.pt"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    data = traced(small(), tmp_path / "net.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadFile, match="truncated"):
        read(tmp_path / "cut.pt")


def test_what_is_no_torchscript_is_named(tmp_path: Path) -> None:
    module = small()
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.save(module.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("import torch\n" * 20)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    cases = {"state.pt": "state_dict", "old.pt": "pickle", "text.pt": "text file", "other.pt": "zip archive"}
    for name, message in cases.items():
        with pytest.raises(BadFile, match=message):
            read(tmp_path / name)


def test_reading_warns_of_nothing(tmp_path: Path) -> None:
    path = traced(small(), tmp_path / "net.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = read(path, size=(16, 16))
        source.original(source.example)


def test_the_original_answers_in_the_type_it_is_asked_in(tmp_path: Path) -> None:
    source = read(traced(small().double(), tmp_path / "net.pt"), size=(16, 16))
    assert source.example.dtype == torch.float64
    assert source.original(torch.randn(1, 3, 16, 16)).dtype == torch.float32
