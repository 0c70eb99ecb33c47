"""What comes out where inputs, scores and types end: real architectures in float32 under "auto", and small ones."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrp
from fusion.errors import BadInput, UnbalancedLedger
from lrp.composites import Composite
from tests.nets import bottleneck, calibrated

SIZE = 64
SILENT = 3  # the class whose score is 0, whatever the input
SLOW = ("convnext_tiny", "swin_t")
NETWORKS = [
    "resnet18",
    "mobilenet_v3_small",
    "vit",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]


def vit() -> nn.Module:
    """ViT in small; torchvision starts with a head of zeros."""
    module = torchvision.models.VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    nn.init.normal_(module.heads.head.weight, 0, 0.1)
    nn.init.normal_(module.heads.head.bias, 0, 0.1)
    return module


@cache
def prepared(name: str) -> tuple[nn.Module, lrp.Explainer]:
    """A network with one silent class, and its explainer."""
    torch.manual_seed(0)
    module = vit() if name == "vit" else torchvision.models.get_model(name, weights=None, num_classes=10)
    head = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        head.weight[SILENT], head.bias[SILENT] = 0, 0
    module = calibrated(module, (3, SIZE, SIZE))
    return module, lrp.Explainer(module, composite="auto", device="cpu", example=noise(1))


def noise(count: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, SIZE, SIZE)


def normalized(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 1 as ImageNet's networks take them."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


def pictures() -> dict[str, Tensor]:
    """Images at the edges of what can come in, by what they are."""
    image = noise(1)
    checked = (image[:, :1] > 0).float().expand(-1, 3, -1, -1)
    return {
        "noise": image,
        "zeros": torch.zeros_like(image),
        "tiny": image * 1e-42,
        "a constant": torch.full_like(image, -3.0),
        "black": normalized(torch.zeros_like(image)),
        "white": normalized(torch.ones_like(image)),
        "black and white": normalized(checked),
        "1e4 times": image * 1e4,
        "a constant of 1e4": torch.full_like(image, 1e4),
        "1e18 times": image * 1e18,
    }


@pytest.mark.parametrize("name", NETWORKS)
class TestRealNetworks:
    def test_every_picture_and_every_score_has_a_finite_balanced_map(self, name: str) -> None:
        module, explainer = prepared(name)
        kinds = pictures()
        x = torch.cat(list(kinds.values()))
        with torch.no_grad():
            scores = module(x)
        lowest, highest = scores.argmin(1), scores.argmax(1)
        answer = explainer.explain(x, torch.stack([highest, lowest, torch.full_like(highest, SILENT)], 1))
        size = scores.abs().amax(1, keepdim=True)
        assert float(((answer.output - scores) / size.clamp(min=1e-6)).abs().max()) < 1e-4
        assert bool(answer.relevance.isfinite().all())
        ledger = answer.ledger
        assert ledger is not None
        assert ledger.closes(1e-5)
        negative = (scores.amin(1) < 0).nonzero()[:, 0]
        assert len(negative) >= len(kinds) - 2
        assert bool((answer.score[negative, 1] < 0).all())
        # A score of exactly 0 has nothing to hand out.
        assert not answer.score[:, 2].any()
        assert not answer.relevance[:, 2].any()
        assert not ledger.kept[:, 2].any()
        # Zeros get nothing from rules that multiply by the input; flat does not.
        zeros = answer.relevance[list(kinds).index("zeros"), 0]
        assert bool(zeros.any()) == ("Flat" in explainer.composite.name and bool(scores[1].any()))
        # What is huge does not reach its neighbours in the batch.
        alone = explainer.explain(kinds["noise"], highest[:1])
        difference = (alone.relevance[0] - answer.relevance[0, 0]).abs().max()
        assert float(difference) <= 1e-4 * float(alone.relevance.abs().max())

    def test_a_negative_score_is_the_positive_score_of_its_opposite(self, name: str) -> None:
        _, explainer = prepared(name)
        x = noise(1)
        lowest = int(explainer.predict(x).argmin())
        below = explainer.explain(x, lowest)
        above = explainer.explain(x, lambda scores: -scores[:, lowest])
        assert float(above.score) > 0
        assert float(above.score) == -float(below.score)
        assert torch.equal(above.relevance, -below.relevance)

    @pytest.mark.parametrize("scale", [1e20, 1e30, 3e37])
    def test_beyond_the_type_there_is_an_answer_or_a_refusal(self, name: str, scale: float) -> None:
        """Piecewise linear networks go on until their scores end; a norm's squares end at 1e19."""
        module, explainer = prepared(name)
        x = noise(1).clamp(-3, 3) * scale
        with torch.no_grad():
            scores = module(x)
        try:
            answer = explainer.explain(x)
        except (BadInput, UnbalancedLedger) as error:
            refusal = str(error)
        else:
            assert bool(answer.relevance.isfinite().all())
            assert float((answer.output - scores).abs().max()) < 1e-4 * float(scores.abs().max())
            return
        assert "not finite" in refusal
        assert "explain in float64" in refusal

    def test_several_targets_cost_one_forward(self, name: str) -> None:
        _, explainer = prepared(name)
        x = noise(2)
        one, five = Calls(), Calls()
        with one:
            explainer.explain(x, 0)
        with five:
            explainer.explain(x, [[0, 1, 2, 4, 5]] * 2)
        assert one.count("aten.convolution.default") > 0
        for forward in ("convolution", "_softmax", "gelu", "hardswish", "addmm"):
            assert five.count(f"aten.{forward}.default") == one.count(f"aten.{forward}.default"), forward
        backward = "aten.convolution_backward.default"
        assert five.count(backward) == 5 * one.count(backward) > 0

    def test_eight_threads_are_bitwise_one(self, name: str) -> None:
        _, explainer = prepared(name)
        images = noise(8)

        def ask(i: int) -> list[Tensor]:
            answer = explainer.explain(images[i])
            assert answer.ledger is not None
            return [answer.relevance, answer.output, answer.ledger.kept]

        alone = [ask(i) for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, range(8)))
        for got, want in zip(together, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Calls(TorchDispatchMode):
    """Counts what torch runs, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self.names.count(name)


# --- small networks ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("composite", sorted(lrp.COMPOSITES))
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e15])
def test_every_composite_at_every_size(composite: str, scale: float) -> None:
    module = bottleneck()
    with torch.no_grad():
        module.fc.weight[SILENT], module.fc.bias[SILENT] = 0, 0  # type: ignore[union-attr,operator,index]
    x = torch.randn(2, 3, 16, 16) * scale
    explainer = lrp.Explainer(module, composite=composite, example=x, device="cpu")
    answer = explainer.explain(x, [[0, 1, 2, SILENT]] * 2)
    assert bool(answer.relevance.isfinite().all())
    assert answer.ledger is not None
    assert answer.ledger.closes(1e-5)
    assert not answer.relevance[:, 3].any()


@pytest.mark.parametrize("strict", [True, False])
def test_an_answer_that_is_not_finite_is_refused_and_float64_has_it(strict: bool) -> None:
    x = torch.randn(3, 3, 16, 16)
    x[1] = x[1].sign() * 3e38
    explainer = lrp.Explainer(bottleneck(), example=x, device="cpu", strict=strict)
    asked: list[Callable[[], object]] = [
        lambda: explainer.explain(x),
        lambda: explainer.predict(x),
        lambda: explainer.attribute(x, 1, "InputXGradient"),
    ]
    for ask in asked:
        with pytest.raises(BadInput, match=r"answer to input 1 is not finite.*float32.*explain in float64"):
            ask()
    wide = lrp.Explainer(bottleneck(), example=x, device="cpu", strict=strict, dtype=torch.float64)
    assert bool(wide.explain(x).relevance.isfinite().all())
    with pytest.raises(BadInput, match=r"trained on\.$"):
        wide.explain(x.double() * 5e269)


def test_relevance_that_is_not_finite_is_refused() -> None:
    x = torch.randn(2, 3, 16, 16)
    gamma = lrp.build("EpsilonGammaBox", gamma=1e38)
    with pytest.raises(UnbalancedLedger, match="relevance is not finite"):
        lrp.Explainer(bottleneck(), composite=gamma, example=x, device="cpu").explain(x)


def test_an_overflow_in_a_norm_is_no_answer_of_zeros() -> None:
    """torch's own norms divide by infinity where a square is too large."""
    x = torch.randn(2, 6)
    module = nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    assert bool(module(x * 1e21).isfinite().all())
    for ledger in (True, False):
        explainer = lrp.Explainer(module, composite="EpsilonPlus", example=x, device="cpu", ledger=ledger)
        with pytest.raises(UnbalancedLedger, match="relevance is not finite"):
            explainer.explain(x * 1e21)
    lenient = lrp.Explainer(module, composite="EpsilonPlus", example=x, device="cpu", strict=False)
    assert not bool(lenient.explain(x * 1e21).relevance.isfinite().any())


def test_what_speaks_for_and_against_a_score_of_zero() -> None:
    """Under LRP-0 both have their part; under the epsilon rule nothing is handed out."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        module[1].weight[0] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    x = torch.tensor([[[[3.0, 3.0], [0.5, 0.5]]]], dtype=torch.float64)
    rules = {"LRP-0": lrp.LRP0(), "epsilon": lrp.Epsilon()}
    maps = {
        name: lrp.explain(module, x, 0, composite=Composite(name, rule, rule), dtype=torch.float64).relevance
        for name, rule in rules.items()
    }
    assert maps["LRP-0"].flatten().tolist() == [3.0, -3.0, 1.0, -1.0]
    assert not maps["epsilon"].any()


@pytest.mark.parametrize("norm", ["layer", "group", "rms"])
def test_norms_of_half_precision_are_measured_in_single(norm: str) -> None:
    """The square of 300 is more than float16 holds, yet its norms have an answer there, and so does relevance."""
    make = {
        "layer": lambda: nn.LayerNorm(8),
        "group": lambda: nn.GroupNorm(1, 8),
        "rms": lambda: nn.RMSNorm(8),
    }
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), make[norm](), nn.Linear(8, 3))
    x = torch.randn(2, 6) * 1000
    half, single = (
        lrp.Explainer(module, composite="EpsilonPlus", example=x, dtype=dtype, device="cpu").explain(x, 1)
        for dtype in (torch.float16, torch.float32)
    )
    scale = float(single.relevance.abs().max())
    assert float((half.relevance - single.relevance).abs().max()) <= 0.02 * scale
