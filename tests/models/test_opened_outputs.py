"""Networks of every kind are opened with all their outputs: maps, rows, embeddings, numbers, and class scores."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusion
import models
from fusion.errors import CaptureError
from models.embeddings import is_embedding

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = (16, 16)


class Segmenter(nn.Module):
    """As torchvision's: a dict of maps; beside them what is no output of floats by image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.classifier, self.aux = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.stem(x)
        up = nn.functional.interpolate(self.classifier(features), x.shape[-2:], mode="bilinear")
        return {"out": up, "labels": up.argmax(1), "aux": self.aux(features)}


def in_form(module: nn.Module, form: str, folder: Path) -> nn.Module | Path:
    """The module, or a file of it."""
    x = torch.randn(2, 3, *SIZE)
    module = module.eval()
    if form == "module":
        return module
    path = folder / f"net.{form}"
    if form == "onnx":
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(module, (x,), dynamic_shapes=shapes, verbose=False)
        assert program is not None
        program.save(path)
    elif form == "pt2":
        torch.export.save(
            torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), path
        )
    else:
        torch.jit.script(module).save(path)  # type: ignore[no-untyped-call]
    return path


@pytest.mark.parametrize("form", ["module", "pt", "pt2", "onnx"])
def test_a_segmenter_keeps_its_maps_in_every_format(form: str, tmp_path: Path) -> None:
    opened = models.open(in_form(Segmenter(), form, tmp_path), size=SIZE)
    kept = opened.network.outputs
    assert [(o.kind, o.shape) for o in kept] == [("map", (None, 4, 16, 16)), ("map", (None, 4, 8, 8))]
    if form != "onnx":  # the exporter names outputs itself
        assert [o.name for o in kept] == ["out", "aux"]
    assert opened.classes is None
    assert any("Left out" in note for note in opened.notes)
    certificate = fusion.certify(
        opened.original, fusion.fuse(opened.network).network, [torch.randn(3, 3, *SIZE)]
    )
    assert certificate.max_relative < 1e-5


def test_the_names_of_onnx_outputs_are_kept(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).eval()
    torch.onnx.export(
        module, (torch.randn(2, 3, *SIZE),), tmp_path / "net.onnx", output_names=["logits"], dynamo=False
    )
    (output,) = models.open(tmp_path / "net.onnx", size=SIZE).network.outputs
    assert (output.name, output.kind) == ("logits", "scores")


def test_names_and_kinds_survive_storing_and_folding(tmp_path: Path) -> None:
    network = fusion.fuse(models.open(Segmenter(), size=SIZE).network).network.returning(["aux", "out"])
    fusion.save(network.returning(["aux"], {"aux": "tensor"}), tmp_path, {})
    (output,) = fusion.load(tmp_path)[0].outputs
    assert (output.name, output.kind, output.shape) == ("aux", "tensor", (None, 4, 8, 8))
    (tmp_path / "two").mkdir()
    fusion.save(network, tmp_path / "two", {})
    assert fusion.load(tmp_path / "two")[0].outputs == network.outputs


def features(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), *layers)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return (y + self.b(y)).relu().mean((2, 3))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.patches(x).flatten(2).transpose(1, 2))[:, 0]


POOL = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("module", "embeds"),
    [
        (Residual(), True),
        (Tokens(), True),
        (features(nn.SiLU(), *POOL), True),
        (nn.Sequential(Tokens(), nn.Linear(8, 5)), False),
        (nn.Sequential(Tokens(), nn.Linear(8, 5), nn.Softmax(1)), False),
        (features(nn.ReLU(), *POOL), False),  # SqueezeNet averages maps of scores: the graph does not tell
        (nn.Sequential(Residual(), nn.Linear(8, 5), nn.BatchNorm1d(5)), False),
    ],
)
def test_embeddings_are_told_from_class_scores_by_what_makes_them(module: nn.Module, embeds: bool) -> None:
    network = fusion.capture(module, (torch.randn(2, 3, *SIZE),))
    assert is_embedding(network, network.output_values[0]) is embeds
    opened = models.open(module, size=SIZE)
    assert opened.network.outputs[0].kind == ("vector" if embeds else "scores")
    assert (opened.classes is None) is embeds


def test_what_the_source_says_decides() -> None:
    module = features(nn.ReLU(), *POOL)
    module.num_classes = 0  # type: ignore[assignment]
    assert models.open(module, size=SIZE).classes is None


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv2d(3, 4, 3), "map"),
        (nn.Sequential(nn.Conv2d(3, 1, 16), nn.Flatten()), "value"),
        (nn.Sequential(nn.Conv2d(3, 1, 16), nn.Flatten(0)), "value"),
        (nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(2)), "rows"),
    ],
)
def test_networks_without_classes_are_opened(module: nn.Module, kind: str) -> None:
    opened = models.open(module, size=SIZE)
    assert opened.network.outputs[0].kind == kind
    assert opened.classes is None
    x = torch.randn(3, 3, *SIZE)
    torch.testing.assert_close(opened.network(x), opened.original(x), rtol=1e-5, atol=1e-5)


class Detector(nn.Module):
    """A one-stage detector with torchvision's parts."""

    def __init__(self, two_stages: bool = False) -> None:
        super().__init__()
        self.transform = nn.Identity()
        self.transform.image_mean = [0.1, 0.2, 0.3]  # type: ignore[assignment]
        self.transform.image_std = [0.5, 0.5, 0.5]  # type: ignore[assignment]
        self.backbone = nn.Conv2d(3, 6, 3, 2, 1)
        setattr(self, "rpn" if two_stages else "head", _Heads())

    def forward(self, images: Tensor) -> list[Tensor]:
        scores = self.head([self.backbone(self.transform(images))])["cls_logits"]
        return [s[s > 0] for s in scores]


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 4, 1)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        both = {"cls_logits": self.scores, "bbox_regression": self.boxes}
        return {k: torch.cat([f(x).flatten(2).transpose(1, 2) for x in features], 1) for k, f in both.items()}


def test_a_detector_is_cut_at_its_raw_heads() -> None:
    opened = models.open(Detector(), size=SIZE)
    assert [(o.name, o.kind) for o in opened.network.outputs] == [
        ("cls_logits", "rows"),
        ("bbox_regression", "boxes"),
    ]
    assert opened.input.mean == (0.1, 0.2, 0.3)
    assert any("non-maximum suppression" in note for note in opened.notes)


def test_detectors_that_are_no_one_graph_are_refused_with_the_way_out() -> None:
    with pytest.raises(CaptureError, match=r"net\.rpn\.head"):
        models.open(Detector(two_stages=True), size=SIZE)
    with pytest.raises(CaptureError, match="raw heads"):
        fusion.capture(Detector(), (torch.randn(2, 3, *SIZE),))
