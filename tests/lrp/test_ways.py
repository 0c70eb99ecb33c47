"""What a composite can say beside rules for layers: attention, gates, sums, normalizations; and groups of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lrp
from fusion.errors import BadComposite
from lrp.composites import Composite
from lrp.graft import relative_ratio

PLAIN = Composite("plain", convolution=lrp.LRP0(), linear=lrp.LRP0())


class Attending(nn.Module):
    """Attention over the columns of an image, whole or spelled out."""

    def __init__(self, whole: bool, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole, self.qkv, self.head = whole, nn.Linear(8, 24, bias=False), nn.Linear(8, 3, bias=False)
        self.register_buffer("bias", torch.randn(5, 5) if masked else None)
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x[:, 0]).chunk(3, -1)
        if self.whole:
            t = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            scores = q @ k.transpose(1, 2) / 8**0.5
            t = (scores if self.bias is None else scores + self.bias).softmax(-1) @ v
        return self.head(t.mean(1))  # type: ignore[no-any-return]


def attention_by_hand(net: Attending, x: Tensor, target: int) -> Tensor:
    """AttnLRP's propositions step by step, with relevance in hand: no gradients."""
    q, k, v = (x[0, 0] @ net.qkv.weight.T).chunk(3, -1)
    logits = q @ k.T / 8**0.5
    scores = logits if net.bias is None else logits + net.bias
    weights = scores.softmax(-1)
    out = weights @ v
    r_out = out * net.head.weight[target] / len(out)
    s = r_out / (2 * out)
    r_weights, r_v = weights * (s @ v.T), v * (weights.T @ s)  # prop. 3.3
    r_scores = scores * (r_weights - weights * r_weights.sum(-1, keepdim=True))  # prop. 3.1
    s = r_scores / scores * logits / (2 * logits)  # the bias keeps its part
    r_q, r_k = q * (s @ k) / 8**0.5, k * (s.T @ q) / 8**0.5
    r_qkv = torch.cat([r_q, r_k, r_v], -1)
    return x[0, 0] * (r_qkv / (x[0, 0] @ net.qkv.weight.T) @ net.qkv.weight)


@pytest.mark.parametrize("masked", [False, True], ids=["free", "with a position bias"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "spelled out"])
def test_attnlrp_is_its_propositions(whole: bool, masked: bool) -> None:
    net, x = Attending(whole, masked).double(), torch.randn(2, 1, 5, 8, dtype=torch.float64)
    composite = replace(PLAIN, attention="attnlrp")
    answer = lrp.Explainer(net, composite=composite, dtype=torch.float64, example=x).explain(x, 2)
    with torch.no_grad():
        expected = torch.stack([attention_by_hand(net, image[None], 2) for image in x])
    torch.testing.assert_close(answer.relevance[:, 0], expected, rtol=1e-9, atol=1e-12)
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-9


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "spelled out"])
def test_attention_weights_are_constant_by_default(whole: bool) -> None:
    net, x = Attending(whole).double(), torch.randn(1, 1, 5, 8, dtype=torch.float64)
    answer = lrp.Explainer(net, composite=PLAIN, dtype=torch.float64, example=x).explain(x, 2)
    assert answer.relevance.sum() == pytest.approx(float(answer.score), rel=1e-9)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate = nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3))  # type: ignore[no-any-return]


def test_a_uniform_gate_takes_half() -> None:
    net, x = Gated().double(), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    maps = {}
    for gates in ("signal", "uniform"):
        composite = replace(PLAIN, gates=gates)
        answer = lrp.Explainer(net, composite=composite, dtype=torch.float64, example=x).explain(x, 1)
        maps[gates] = answer.relevance
        assert answer.relevance.sum() == pytest.approx(float(answer.score), rel=1e-9)  # nothing has a bias
    with torch.no_grad():
        y = net.conv(x)
        pooled = y.mean((2, 3), keepdim=True)
        score = (y * net.gate(pooled).sigmoid()).mean((2, 3))[0, 1]
        r_pooled = pooled * (score / 2 * net.gate.weight[1][None] / net.gate(pooled)[0, 1])
        r_y = maps_by_contribution(y, r_pooled)
    expected = torch.nn.grad.conv2d_input(x.shape, net.conv.weight, r_y / y) * x + maps["signal"] / 2
    torch.testing.assert_close(maps["uniform"], expected, rtol=1e-9, atol=1e-12)


def maps_by_contribution(y: Tensor, r_pooled: Tensor) -> Tensor:
    """A mean's relevance over what it averaged."""
    return y / y.sum((2, 3), keepdim=True) * r_pooled


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Linear(50, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x) + x).flatten(1))  # type: ignore[no-any-return]


def test_a_sum_by_ratio() -> None:
    net, x = Residual().double(), torch.randn(2, 2, 5, 5, dtype=torch.float64)
    composite = replace(PLAIN, sums="ratio")
    # Not folded: a convolution and what it reads would be one layer.
    explainer = lrp.Explainer(net, composite=composite, dtype=torch.float64, example=x, fold=False)
    answer = explainer.explain(x, 1)
    with torch.no_grad():
        f = net.conv(x)
        r = ((f + x).flatten(1) * net.head.weight[1]).reshape(f.shape)
        main = r * f.abs() / (f.abs() + x.abs())
        expected = r - main + x * torch.nn.grad.conv2d_input(x.shape, net.conv.weight, main / f, padding=1)
    torch.testing.assert_close(answer.relevance, expected, rtol=1e-9, atol=1e-12)
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-9


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(100, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).relu().flatten(1))  # type: ignore[no-any-return]


def test_identity_passes_a_normalization_unchanged() -> None:
    net, x = Normalized().double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    composite = replace(PLAIN, normalization="identity")
    answer = lrp.Explainer(net, composite=composite, dtype=torch.float64, example=x).explain(x, 1)
    with torch.no_grad():
        expected = (net.norm(x).relu().flatten(1) * net.head.weight[1]).reshape(x.shape)
    torch.testing.assert_close(answer.relevance, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["attention", "gates", "sums", "normalization"])
def test_a_way_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(BadComposite, match=f"no way 'none' for {name}"):
        replace(PLAIN, **{name: "none"})  # type: ignore[arg-type]


def test_groups_of_layers_take_overrides() -> None:
    convolutions = [nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()) for _ in range(6)]
    net = nn.Sequential(*convolutions, nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(50, 3))
    rules = {
        "@low": lrp.Gamma(1.0),
        "@mid": lrp.Gamma(2.0),
        "@high": lrp.Gamma(3.0),
        "@linear": lrp.Epsilon(0.5),
    }
    explainer = lrp.Explainer(
        net,
        composite=PLAIN,
        rules={**rules, "@first": lrp.Flat(), "3.0": lrp.ZPlus()},
        example=torch.randn(1, 2, 5, 5),
    )
    assert [rule for _, _, rule in explainer.table()] == [
        str(rule)
        for rule in (lrp.Flat(), lrp.Gamma(1.0), lrp.Gamma(2.0), lrp.ZPlus(), lrp.Gamma(3.0), lrp.Gamma(3.0),
                     lrp.LRP0(), lrp.Epsilon(0.5))
    ]  # fmt: skip
    with pytest.raises(BadComposite, match="@high, @last, @linear, @low, @mid"):
        lrp.Explainer(net, rules={"@conv_transpose": lrp.ZPlus()}, example=torch.randn(1, 2, 5, 5))


def cancelling(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Two branches whose sum is a millionth of either, behind z+, and a ReLU that lets it pass."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
            self.after, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).relu()
            return self.head(self.after((h + self.branch(h)).relu()).relu().mean((2, 3)))

    net = Net().to(dtype)
    with torch.no_grad():
        net.branch.weight.copy_((torch.eye(4) * torch.tensor([1.0, -1 + 1e-7, 1.0, 1.0]))[..., None, None])
    return net, torch.rand(2, 1, 6, 6, dtype=dtype)


def test_a_relative_stabilizer_at_sums_is_its_formula() -> None:
    """R_a = a s / stab(s) * g with g the gradient at s = a + b, epsilon being a share of the sample's spread."""
    net, x = cancelling()
    share = 0.05
    composite = replace(
        lrp.build("EpsilonPlus"),
        linear=lrp.LRP0(),
        convolution=lrp.LRP0(),
        norm_epsilon=share,
        norm_relative=True,
    )
    # Not folded: a convolution and what it reads would be one layer, in which nothing cancels.
    found = lrp.Explainer(net, composite=composite, dtype=torch.float64, example=x, fold=False).explain(x)

    def steady(total: Tensor) -> Tensor:
        fixed = total.detach()
        spread = share * fixed.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (fixed.ndim - 1))
        return fixed + fixed / (fixed + torch.where(fixed >= 0, spread, -spread)) * (total - fixed)

    leaf = x.clone().requires_grad_()
    h = net.stem(leaf).relu()
    pooled = net.after(steady(h + net.branch(h)).relu()).relu().mean((2, 3))
    best = net.head(steady(pooled)).amax(1).sum()
    (gradient,) = torch.autograd.grad(best, leaf)
    torch.testing.assert_close(found.relevance, gradient * x, rtol=1e-9, atol=1e-12)
    assert found.ledger is not None
    assert float(found.ledger.error.max()) < 1e-9
    assert float(found.ledger.kept_by()["add"].abs().min()) > 0


def test_a_relative_stabilizer_follows_the_scale_of_the_sums_even_where_squares_overflow() -> None:
    total = torch.randn(2, 3, 4, dtype=torch.float32)
    usual = relative_ratio(total, total, 0.01, total, (0, 1))
    torch.testing.assert_close(relative_ratio(total * 1e30, total * 1e30, 0.01, total, (0, 1)), usual)
