"""The ledger wherever the samples are: behind a reshape into windows, on the second axis, merged with tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrp
from tests.fusion.test_review_capture import Forward

F64 = torch.float64


def closes(module: nn.Module, x: Tensor, **options: object) -> lrp.Explanation:
    """Explain in float64; a ledger that does not close raises."""
    module = module.double().eval()
    explainer = lrp.Explainer(module, example=x, device="cpu", dtype=F64, **options)  # type: ignore[arg-type]
    answer = explainer.explain(x, 1)
    torch.testing.assert_close(answer.output, module(x).detach(), rtol=1e-11, atol=1e-11)
    assert answer.ledger is not None
    assert answer.ledger.kept.shape == (len(x),)
    torch.testing.assert_close(answer.ledger.input + answer.ledger.kept, answer.score, rtol=1e-9, atol=1e-9)
    single = torch.cat([explainer.explain(x[i], 1).relevance for i in range(len(x))])
    torch.testing.assert_close(answer.relevance, single, rtol=1e-9, atol=1e-9)
    return answer


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    return Forward(
        lambda m, x: m.fc(m.layer(m.patch(x.flatten(2).transpose(1, 2))).mean(1)),  # type: ignore[operator]
        patch=nn.Linear(3, 8), layer=layer, fc=nn.Linear(8, 3),
    )  # fmt: skip


def windows() -> nn.Module:
    return Forward(
        lambda m, x: m.fc(  # type: ignore[operator]
            torch.relu(m.token(x.reshape(-1, 3, 2, 8).permute(0, 2, 3, 1).reshape(-1, 4, 3)))  # type: ignore[operator]
            .reshape(-1, 16, 4).mean(1)
        ),
        token=nn.Linear(3, 4), fc=nn.Linear(4, 3),
    )  # fmt: skip


def sequence_first() -> nn.Module:
    return Forward(
        lambda m, x: m.fc(torch.relu(m.token(x.flatten(2).permute(2, 0, 1)) + 1).mean(0)),  # type: ignore[operator]
        token=nn.Linear(3, 4), fc=nn.Linear(4, 3),
    )  # fmt: skip


def positions() -> nn.Module:
    return Forward(
        lambda m, x: m.fc((m.token(x.flatten(2).transpose(1, 2)) + m.position).mean(1)),  # type: ignore[operator]
        token=nn.Linear(3, 4), position=torch.randn(1, 16, 4), fc=nn.Linear(4, 3),
    )  # fmt: skip


def self_attention() -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return m.fc(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean(1))  # type: ignore[no-any-return,operator]

    return Forward(forward, fc=nn.Linear(3, 3))


def chosen() -> nn.Module:
    return Forward(
        lambda m, x: m.fc(torch.where(m.mask, x, m.other).flatten(1)),  # type: ignore[operator,call-overload]
        mask=torch.randn(4, 4) > 0, other=torch.randn(1, 3, 1, 1), fc=nn.Linear(48, 3),
    )  # fmt: skip


@pytest.mark.parametrize("make", [encoder, windows, sequence_first, positions, self_attention, chosen])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("composite", ["EpsilonPlus", "EpsilonPlusFlat"])
def test_the_ledger_closes_for_every_sample(
    make: Callable[[], nn.Module], batch: int, composite: str
) -> None:
    closes(make(), torch.randn(batch, 3, 4, 4, dtype=F64), composite=composite)


@pytest.mark.parametrize("composite", ["EpsilonPlusFlat", "EpsilonGammaBox"])
def test_padding_with_a_value_in_front_of_the_first_layer(composite: str) -> None:
    module = nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    closes(module, torch.randn(2, 3, 4, 4, dtype=F64), composite=composite)


def test_a_bias_that_a_convolution_and_a_linear_layer_share() -> None:
    module = Forward(
        lambda m, x: nn.functional.linear(
            torch.relu(nn.functional.conv2d(x, m.w, m.b)).mean((2, 3)), m.v, m.b  # type: ignore[arg-type]
        ),
        w=nn.Parameter(torch.randn(4, 3, 3, 3)), v=nn.Parameter(torch.randn(4, 4)), b=nn.Parameter(torch.randn(4)),
    )  # fmt: skip
    for rule in (lrp.Epsilon(), lrp.Epsilon(bias="omit"), lrp.AlphaBeta()):
        closes(module, torch.randn(2, 3, 4, 4, dtype=F64), composite="EpsilonPlus", rules={"*": rule})


def test_explaining_ignores_autocast_and_inference_mode() -> None:
    module, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)).eval(),
        torch.randn(2, 3, 4, 4),
    )
    with torch.inference_mode():
        explainer = lrp.Explainer(module, example=x, device="cpu")
    expected = explainer.explain(x, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = explainer.explain(x, 1)
    assert answer.output.dtype == torch.float32
    torch.testing.assert_close(answer.relevance, expected.relevance)
