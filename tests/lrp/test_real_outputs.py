"""Segmenters, detectors and embedding networks of torchvision and timm (random weights), in three forms: every output
is kept, agrees with its own runtime, and is explained to the last unit."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import fusion
import lrp
import models
from lrp import Output

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

SIZE = (64, 64)
NONE = {"weights": None, "weights_backbone": None, "num_classes": 5}


class Heads(nn.Module):
    """A detector's raw heads, as a user cuts them out to export them."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))  # type: ignore[operator,no-any-return]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, _, name = name.partition(":")
    if kind == "segmentation":
        return getattr(torchvision.models.segmentation, name)(**NONE).eval()  # type: ignore[no-any-return]
    if kind == "detection":
        return Heads(getattr(torchvision.models.detection, name)(**NONE)).eval()
    options = {"img_size": SIZE} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=0, **options).eval()


CASES: dict[str, list[Output]] = {
    "segmentation:fcn_resnet50": [Output("out", region="wins"), Output("out", channel=1, reduce="mean")],
    "segmentation:deeplabv3_mobilenet_v3_large": [
        Output("out", region="wins"),
        Output("out", index=(2, 3, 4)),
    ],
    "segmentation:lraspp_mobilenet_v3_large": [Output("out", channel=3, region=lrp.Box(8, 8, 40, 30))],
    "detection:retinanet_resnet50_fpn": [
        Output("cls_logits", index=(17, 2)),
        Output("cls_logits", channel=2, reduce="max"),
        Output("bbox_regression", index=(17, 0)),
    ],
    "detection:ssdlite320_mobilenet_v3_large": [Output("cls_logits", channel=2, reduce="max")],
    "embedding:resnet18": [Output(reduce="norm"), Output(index=7)],
    "embedding:vit_tiny_patch16_224": [Output(reduce="norm"), Output(index=7)],
}


def in_form(module: nn.Module, form: str, folder: Path) -> nn.Module | Path:
    x = torch.randn(2, 3, *SIZE)
    if form == "module":
        return module
    path = folder / f"net.{form}"
    with torch.no_grad():
        if form == "pt":
            torch.jit.trace(module, x, strict=False).save(path)  # type: ignore[no-untyped-call]
        else:
            answers = module(x)
            names = list(answers) if isinstance(answers, dict) else ["embedding"]
            torch.onnx.export(
                module,
                (x,),
                path,
                dynamo=False,
                opset_version=17,
                input_names=["x"],
                output_names=names,
                dynamic_axes={name: {0: "batch"} for name in ("x", *names)},
            )
    return path


@pytest.mark.parametrize("form", ["module", "pt", "onnx"])
@pytest.mark.parametrize("name", CASES)
def test_every_output_is_kept_and_explained(name: str, form: str, tmp_path: Path) -> None:
    module = make(name)
    opened = models.open(in_form(module, form, tmp_path), size=SIZE)
    x = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = module(x)
    wanted = answers if isinstance(answers, dict) else {opened.network.outputs[0].name: answers}
    assert [spec.name for spec in opened.network.outputs] == list(wanted)
    assert opened.classes is None
    fused = fusion.fuse(opened.network).network
    assert fusion.certify(opened.original, fused, [x]).max_relative < 1e-3
    explainer = lrp.Explainer(fused, composite="auto")
    for output, want in zip(explainer.outputs(x).values(), wanted.values(), strict=True):
        torch.testing.assert_close(output, want.detach(), rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    answer = explainer.explain(x, [*CASES[name]])
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-3
    assert bool(answer.relevance.isfinite().all())
    assert answer.relevance.shape[1] == len(CASES[name])


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_a_whole_detector_is_cut_at_its_raw_heads(name: str) -> None:
    torch.manual_seed(0)
    detector = getattr(torchvision.models.detection, name)(**NONE)
    opened = models.open(detector, size=SIZE)
    assert {spec.name for spec in opened.network.outputs} == {"cls_logits", "bbox_regression"}
    x = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        want = Heads(detector.eval())(x)
    for spec, got in zip(opened.network.outputs, opened.network(x), strict=True):
        torch.testing.assert_close(got, want[spec.name], rtol=1e-3, atol=1e-4)
    answer = lrp.Explainer(opened.network, composite="auto").explain(x)
    assert answer.explained[0][0].text.startswith("the largest value of 'cls_logits', at [")
