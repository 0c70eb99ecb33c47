"""Vision networks of transformers, small and with random weights: opened as modules, equal to themselves, explained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import fusion
import lrp
import models

SIZE = 32
CLASSES = 5
TRANSFORMER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
PATCHES = {**TRANSFORMER, "image_size": SIZE, "patch_size": 8}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}

Make = Callable[[], nn.Module]


def classifier(kind: str, **sizes: Any) -> Make:
    def make() -> nn.Module:
        config = getattr(hf, f"{kind}Config")(num_labels=CLASSES, **sizes)
        return getattr(hf, f"{kind}ForImageClassification")(config)  # type: ignore[no-any-return]

    return make


CLASSIFIERS = {
    "ViT": classifier("ViT", **PATCHES),
    "Beit": classifier("Beit", **PATCHES),
    "Dinov2": classifier("Dinov2", **{**PATCHES, "patch_size": 16}),
    "Swin": classifier(
        "Swin", image_size=SIZE, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "ConvNext": classifier("ConvNext", **STAGES),
    "ResNet": classifier("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "MobileNetV2": classifier("MobileNetV2"),
}


def opened(make: Make) -> tuple[nn.Module, models.Opened, Tensor]:
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():  # the heads are almost zero as they are made
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return module, models.open(module, size=(SIZE, SIZE)), torch.randn(2, 3, SIZE, SIZE)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_answers_as_before_and_explains(name: str) -> None:
    module, found, x = opened(CLASSIFIERS[name])
    with torch.no_grad():
        expected = module(x).logits
    (output,) = found.network.outputs
    assert (output.name, output.kind, output.shape) == ("logits", "scores", (None, CLASSES))
    fused = fusion.fuse(found.network).network
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    explanation = lrp.Explainer(found.network, composite="auto").explain(x)
    assert explanation.relevance.shape == x.shape
    assert explanation.relevance.any()
    assert explanation.ledger is not None
    assert float(explanation.ledger.error.max()) < 1e-5


def test_a_segmenter_s_map_is_explained_where_a_class_wins() -> None:
    sizes = {**STAGES, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}
    _, found, x = opened(
        lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(num_labels=CLASSES, **sizes))
    )
    (output,) = found.network.outputs
    assert (output.name, output.kind) == ("logits", "map")
    explanation = lrp.Explainer(found.network, composite="auto").explain(x)
    assert explanation.ledger is not None
    assert float(explanation.ledger.error.max()) < 1e-5


def test_an_image_s_embedding_is_found_by_its_name() -> None:
    sizes = {**PATCHES, "projection_dim": 16}
    _, found, x = opened(lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**sizes)))
    assert [output.name for output in found.network.outputs] == ["image_embeds", "last_hidden_state"]
    target = lrp.Output("image_embeds", reduce="norm")
    explanation = lrp.Explainer(found.network, composite="auto").explain(x, target)
    assert explanation.ledger is not None
    assert float(explanation.ledger.error.max()) < 1e-5
