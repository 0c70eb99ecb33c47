"""What "auto" picks, on what grounds, and that the reason reaches the user."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusion
import lrp
from fusion.errors import BadComposite
from lrp.auto import anatomy, pick
from lrp.composites import Composite
from tests.nets import family


def captured(module: nn.Module, size: int = 32) -> fusion.Network:
    return fusion.fuse(fusion.capture(module.eval(), (torch.randn(2, 3, size, size),))).network


class Attention(nn.Module):
    """Self-attention over tokens [N, T, C], whole or spelled out."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.project = fused, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        q, k, v = self.qkv(t).chunk(3, -1)
        if self.fused:
            return t + self.project(nn.functional.scaled_dot_product_attention(q, k, v))  # type: ignore[no-any-return]
        return t + self.project((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)  # type: ignore[no-any-return]


class Patches(nn.Module):
    """A stem of patches, convolutions behind it, and something on the tokens."""

    def __init__(self, body: nn.Module, convolutions: int = 0, mixer: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.convolutions = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(convolutions)])
        self.mix = nn.Linear(16, 16) if mixer else None
        self.body, self.head = body, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        t = self.convolutions(self.stem(x)).flatten(2)
        t = t if self.mix is None else self.mix(t)
        return self.head(self.body(t.transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, t: Tensor) -> Tensor:
        return self.lstm(t)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("fused", [True, False])
def test_a_transformer_gets_gamma_everywhere(fused: bool) -> None:
    choice = pick(captured(Patches(Attention(16, fused))))
    assert choice.composite.name == "GammaViT"
    assert isinstance(choice.composite.linear, lrp.Gamma)
    assert isinstance(choice.composite.convolution, lrp.Gamma)
    assert "transformer (1 attention layers" in choice.reason


def test_convolutions_beside_attention_make_a_hybrid() -> None:
    choice = pick(captured(Patches(Attention(16, True), convolutions=2)))
    assert choice.composite.name == "GammaPlusFlat"
    assert "1 attention layers, 2 convolutions" in choice.reason


def test_mixers_and_recurrent_networks() -> None:
    mixer, recurrent = (
        pick(captured(m)) for m in (Patches(nn.GELU(), mixer=True), Patches(Recurrent(), mixer=True))
    )
    assert mixer.composite.name == recurrent.composite.name == "GammaPlusFlat"
    assert "mix tokens" in mixer.reason
    assert "1 LSTM" in recurrent.reason


@pytest.mark.parametrize(
    ("name", "composite", "words"),
    [
        ("resnet18", "EpsilonPlusFlatSteady", "piecewise linear"),
        ("mobilenet_v3_small", "EpsilonPlusFlatSmooth", "hard swish and"),
    ],
)
def test_convolutional_networks_get_z_plus(name: str, composite: str, words: str) -> None:
    choice = pick(captured(family(name)))
    assert choice.composite.name == composite
    assert choice.composite == lrp.build(composite)  # what is picked can be had by name
    assert words in choice.reason


def test_a_gate_is_no_attention() -> None:
    found = anatomy(captured(family("mobilenet_v3_small")))
    assert found.attention == 0
    assert (
        found.gates == 9
    )  # one per squeeze-and-excite block of MobileNetV3-Small (Howard et al. 2019, table 2)


def test_a_softmax_over_classes_is_no_attention() -> None:
    assert anatomy(captured(nn.Sequential(family("resnet18"), nn.Softmax(1)))).attention == 0


def test_the_explainer_takes_auto_says_why_and_lets_overrides_win() -> None:
    network = fusion.capture(Patches(Attention(16, True)).eval(), (torch.randn(2, 3, 32, 32),))
    explainer = lrp.Explainer(network, composite="auto", rules={"head": lrp.LRP0()}, device="cpu")
    assert explainer.composite.name == "GammaViT"
    assert any("GammaViT was picked for a transformer" in note for note in explainer.notes)
    rules = {layer: rule for layer, _, rule in explainer.table()}
    assert rules["head"] == "LRP0()"
    assert rules["body.qkv"] == "Gamma(gamma=0.05)"
    x = torch.randn(2, 3, 32, 32)
    by_hand = Composite("by hand", lrp.Gamma(100.0), lrp.Gamma(0.05)).override({"head": lrp.LRP0()})
    expected = lrp.Explainer(network, composite=by_hand, device="cpu").explain(x, 2)
    found = explainer.explain(x, 2)
    assert found.composite == "GammaViT"
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=0, atol=0)


def test_what_a_user_names_needs_no_reason() -> None:
    network = fusion.capture(Patches(nn.GELU()).eval(), (torch.randn(2, 3, 32, 32),))
    explainer = lrp.Explainer(network, device="cpu")
    assert not any("picked" in note for note in explainer.notes)
    with pytest.raises(BadComposite, match="automatic"):
        lrp.Explainer(network, composite="automatic", device="cpu")
