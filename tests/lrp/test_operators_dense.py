"""Operators of whole architectures against their formulas, written out: products, choices, gates, LSTMs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp
from lrp.composites import Composite

LRP0 = Composite("LRP0", convolution=lrp.LRP0(), linear=lrp.LRP0())
SIZE = 6


class Between(nn.Module):
    """A linear layer without bias, the function under test, and another one: x -> W2 f(W1 x)."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Linear(SIZE, width, bias=False)
        with torch.no_grad():
            answers = function(torch.randn(2, width)).shape[1]
        self.last = nn.Linear(answers, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))  # type: ignore[no-any-return]


def explained(
    function: Callable[[Tensor], Tensor], linearized: Callable[[Tensor], Tensor], width: int = 12
) -> lrp.Explanation:
    """The explanation of `Between` under LRP-0, after its map has been checked: it is x times the gradient of the same
    network with the function replaced by one whose gradient is the rule's multiplier."""
    torch.manual_seed(3)
    module = Between(function, width).double()
    x = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    explainer = lrp.Explainer(
        module, composite=LRP0, device="cpu", dtype=torch.float64, example=x.detach(), strict=True
    )
    found = explainer.explain(x.detach(), 1)
    torch.testing.assert_close(found.output, module(x).detach())
    value = linearized(module.first(x))
    torch.testing.assert_close(value, function(module.first(x)))  # the oracle computes the same values
    (gradient,) = torch.autograd.grad(module.last(value)[:, 1].sum(), x)
    torch.testing.assert_close(found.relevance, (x * gradient).detach(), rtol=1e-9, atol=1e-12)
    assert found.ledger is not None
    assert float(found.ledger.error.max()) < 1e-9
    return found


def linear_in(x: Tensor, value: Tensor) -> Tensor:
    """A function of x with this value and the multiplier value / x."""
    return x * (value / x).detach()


def halves(t: Tensor) -> tuple[Tensor, Tensor]:
    a, b = t.chunk(2, 1)
    return a, b


def test_einsum_of_two_signals_gives_half_to_each() -> None:
    def product(t: Tensor) -> Tensor:
        return torch.einsum("nij,njk->nik", t[:, :6].reshape(-1, 2, 3), t[:, 6:].reshape(-1, 3, 2)).flatten(1)

    def oracle(t: Tensor) -> Tensor:
        value = product(t)
        return value / 2 + value.detach() / 2

    found = explained(product, oracle)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_einsum_of_attention_weights_gives_all_to_the_values() -> None:
    def attend(t: Tensor, weights: Callable[[Tensor], Tensor]) -> Tensor:
        a, b = t[:, :6].reshape(-1, 3, 2), t[:, 6:].reshape(-1, 3, 2)
        attention = weights(torch.einsum("nid,njd->nij", a, a)).softmax(-1)
        return torch.einsum("nij,njd->nid", attention, b).flatten(1)

    found = explained(lambda t: attend(t, lambda w: w), lambda t: attend(t, lambda w: w.detach()))
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_three_factors_get_a_third_each() -> None:
    def product(t: Tensor) -> Tensor:
        a, b, c = t.chunk(3, 1)
        return torch.einsum("ni,nj,nk->nijk", a, b, c).flatten(1)

    def oracle(t: Tensor) -> Tensor:
        value = product(t)
        return value / 3 + value.detach() * 2 / 3

    found = explained(product, oracle)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_glu_gives_all_to_the_signal() -> None:
    def oracle(t: Tensor) -> Tensor:
        a, b = halves(t)
        return a * b.detach().sigmoid()

    explained(lambda t: F.glu(t, 1), oracle)


@pytest.mark.parametrize("value", [1.0, -0.5])
def test_addcmul_is_a_sum_and_a_product(value: float) -> None:
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def function(t: Tensor) -> Tensor:
        a, b = halves(t)
        return torch.addcmul(shift.to(t.dtype), a, b, value=value)

    def oracle(t: Tensor) -> Tensor:
        a, b = halves(t)
        product = a * b
        return shift + value * (product / 2 + product.detach() / 2)

    found = explained(function, oracle)
    kept = found.ledger.kept_by() if found.ledger else {}
    assert float(kept["linear"].abs().max()) > 0.01  # the shift is the bias of the layer behind


def test_addcdiv_holds_the_divisor() -> None:
    def parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = halves(t)
        return a[:, :3], a[:, 3:], 1 + b[:, :3].square()

    def oracle(t: Tensor) -> Tensor:
        a, b, c = parts(t)
        return a + b / c.detach()

    explained(lambda t: torch.addcdiv(*parts(t)), oracle)


def test_baddbmm_adds_a_product_of_matrices() -> None:
    def parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = halves(t)
        return a[:, :4].reshape(-1, 2, 2), a.reshape(-1, 2, 3), b.reshape(-1, 3, 2)

    def function(t: Tensor) -> Tensor:
        return torch.baddbmm(*parts(t), beta=0.5, alpha=2.0).flatten(1)

    def oracle(t: Tensor) -> Tensor:
        s, a, b = parts(t)
        product = a @ b
        return (0.5 * s + product + product.detach()).flatten(1)

    found = explained(function, oracle)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_masked_fill_keeps_what_was_filled_in() -> None:
    mask = torch.arange(12) % 3 == 0

    def oracle(t: Tensor) -> Tensor:
        return torch.where(mask, torch.full_like(t, 2.0), t)

    found = explained(lambda t: t.masked_fill(mask, 2.0), oracle)
    assert found.ledger is not None
    assert float(found.ledger.kept_by()["masked_fill"].abs().max()) > 0.01


def test_padding_with_infinity_in_front_of_a_maximum_is_no_number_anywhere() -> None:
    def function(t: Tensor) -> Tensor:
        return F.max_pool1d(F.pad(t[:, None], (1, 1), value=-torch.inf), 3, 2).flatten(1)

    found = explained(function, function)
    assert bool(torch.isfinite(found.relevance).all())
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_masking_with_infinity_in_front_of_a_maximum() -> None:
    mask = torch.arange(12) % 3 == 0

    def function(t: Tensor) -> Tensor:
        return F.max_pool1d(t.masked_fill(mask, -torch.inf)[:, None], 4).flatten(1)

    found = explained(function, function)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


@pytest.mark.parametrize("choose", [
    lambda t: t.reshape(-1, 3, 4).max(2).values,
    lambda t: t.reshape(-1, 3, 4).min(2).values,
    lambda t: t.topk(4, 1).values,
    lambda t: t.gather(1, t.topk(3, 1).indices),
])  # fmt: skip
def test_the_winner_takes_all(choose: Callable[[Tensor], Tensor]) -> None:
    found = explained(choose, choose)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_norm_is_homogeneous_and_its_gradient_is_the_rule(order: int) -> None:
    def norm(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t.reshape(-1, 3, 4), order, dim=2)

    found = explained(norm, norm)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_a_norm_that_divides_is_held() -> None:
    def function(t: Tensor) -> Tensor:
        return F.normalize(t, dim=1)

    found = explained(function, lambda t: t / t.detach().norm(dim=1, keepdim=True))
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_global_response_normalization_is_a_gate() -> None:
    def grn(t: Tensor, held: bool) -> Tensor:
        x = t.reshape(-1, 3, 4)
        size = x.norm(dim=2, keepdim=True)
        response = size / (size.mean(1, keepdim=True) + 1e-6)
        return (x * (response.detach() if held else response) + x).flatten(1)

    found = explained(lambda t: grn(t, False), lambda t: grn(t, True))
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_variance_is_homogeneous_of_degree_two() -> None:
    def variance(t: Tensor) -> Tensor:
        return t.reshape(-1, 3, 4).var(2)

    def oracle(t: Tensor) -> Tensor:
        value = variance(t)
        return value / 2 + value.detach() / 2

    found = explained(variance, oracle)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_the_entropy_of_log_sum_exp_keeps_its_part() -> None:
    def function(t: Tensor) -> Tensor:
        return t.reshape(-1, 3, 4).logsumexp(2)

    found = explained(function, function)
    torch.manual_seed(3)
    module = Between(function).double()
    x = torch.randn(3, SIZE, dtype=torch.float64)
    s = module.first(x).reshape(-1, 3, 4).softmax(2)
    entropy = -(s * s.log()).sum(2)
    assert found.ledger is not None
    torch.testing.assert_close(
        found.ledger.kept_by()["logsumexp"], (entropy * module.last.weight[1]).sum(1).detach()
    )


@pytest.mark.parametrize("statistic", [torch.reciprocal, torch.rsqrt], ids=["reciprocal", "rsqrt"])
def test_an_inverse_in_the_place_of_a_signal_keeps_all(statistic: Callable[[Tensor], Tensor]) -> None:
    def function(t: Tensor) -> Tensor:
        a, b = halves(t)
        return torch.cat([a, statistic(1 + b.square())], 1)

    def oracle(t: Tensor) -> Tensor:
        a, b = halves(t)
        return torch.cat([a, statistic(1 + b.square()).detach()], 1)

    explained(function, oracle)


def test_softmax_spelled_out_is_attention() -> None:
    def attend(t: Tensor, held: bool) -> Tensor:
        a, b = t[:, :6].reshape(-1, 3, 2), t[:, 6:].reshape(-1, 3, 2)
        weights = (a @ a.transpose(1, 2)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return ((weights.detach() if held else weights) @ b).flatten(1)

    explained(lambda t: attend(t, False), lambda t: attend(t, True))


def test_attention_heads_that_talk_are_attention() -> None:
    torch.manual_seed(5)
    mix = nn.Linear(2, 2).double().requires_grad_(False)

    def attend(t: Tensor, held: bool) -> Tensor:
        heads = t[:, :12].reshape(-1, 2, 3, 2)
        logits = heads @ heads.transpose(2, 3)
        weights = F.linear(logits.softmax(-1).permute(0, 2, 3, 1), mix.weight.to(t.dtype)).permute(0, 3, 1, 2)
        values = t[:, 12:].reshape(-1, 2, 3, 2)
        return ((weights.detach() if held else weights) @ values).flatten(1)

    explained(lambda t: attend(t, False), lambda t: attend(t, True), width=24)


@pytest.mark.parametrize("hard_sigmoid", [
    lambda b: F.relu6(b + 3) / 6,
    lambda b: (b / 6 + torch.tensor(0.5, dtype=b.dtype)).clamp(0, 1),
    lambda b: 1 - F.hardsigmoid(b),
])  # fmt: skip
def test_a_hard_sigmoid_spelled_out_is_a_gate(hard_sigmoid: Callable[[Tensor], Tensor]) -> None:
    def function(t: Tensor, held: bool) -> Tensor:
        a, b = halves(t)
        gate = hard_sigmoid(b)
        return a * (gate.detach() if held else gate)

    explained(lambda t: function(t, False), lambda t: function(t, True))


def test_a_ReLU_that_is_cut_off_is_no_gate() -> None:
    def function(t: Tensor) -> Tensor:
        a, b = halves(t)
        return a * F.relu6(b)

    def oracle(t: Tensor) -> Tensor:
        a, b = halves(t)
        product = a * linear_in(b, F.relu6(b))
        return product / 2 + product.detach() / 2

    explained(function, oracle)


def test_expand_as_takes_a_shape_and_no_values() -> None:
    def function(t: Tensor) -> Tensor:
        a, b = t[:, :6].reshape(-1, 2, 3), t[:, 6:8].reshape(-1, 2, 1)
        return (a + b.expand_as(a)).flatten(1)

    found = explained(function, function)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_a_mask_made_from_the_image_is_held() -> None:
    def function(t: Tensor) -> Tensor:
        return t * (t > 0.1).to(t.dtype)

    explained(function, lambda t: t * (t.detach() > 0.1).to(t.dtype))


def test_a_sign_chooses_like_a_mask() -> None:
    """Signed square roots, as behind bilinear pooling."""

    def function(t: Tensor) -> Tensor:
        return t.sign() * t.abs().sqrt()

    found = explained(function, lambda t: t.detach().sign() * linear_in(t.abs(), t.abs().sqrt()))
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_power_average_pooling_is_homogeneous() -> None:
    """torch writes it with the sign of a sum of squares."""

    def function(t: Tensor) -> Tensor:
        return F.lp_pool1d(t[:, None], 2, 3).flatten(1)

    found = explained(function, function)
    torch.testing.assert_close(found.relevance.sum(1), found.score)


def test_a_count_made_from_the_image_keeps_what_it_receives() -> None:
    def function(t: Tensor) -> Tensor:
        return torch.cat([t, (t > 0.1).to(t.dtype)], 1)

    found = explained(function, function)
    assert found.ledger is not None
    assert float(found.ledger.kept.abs().max()) > 0.01


# --- LSTM ---
def lstm_by_hand(lstm: nn.LSTM, x: Tensor) -> Tensor:
    """The outputs [N, T, D H], gates held constant and tanh as a multiplier, step by step from the equations."""
    for layer in range(lstm.num_layers):
        directions = []
        for suffix in ("", "_reverse")[: 1 + lstm.bidirectional]:
            parameters = {n: p for n, p in lstm.named_parameters() if n.endswith(f"l{layer}{suffix}")}
            w = parameters[f"weight_ih_l{layer}{suffix}"]
            u = parameters[f"weight_hh_l{layer}{suffix}"]
            b = parameters.get(f"bias_ih_l{layer}{suffix}", torch.zeros(len(w), dtype=x.dtype))
            b = b + parameters.get(f"bias_hh_l{layer}{suffix}", torch.zeros(len(w), dtype=x.dtype))
            h = c = x.new_zeros(len(x), lstm.hidden_size)
            steps = range(x.shape[1])
            outputs = {}
            for t in reversed(steps) if suffix else steps:
                total = x[:, t] @ w.T + h @ u.T + b
                i, f, z, o = total.chunk(4, 1)
                i, f, o = (torch.sigmoid(g).detach() for g in (i, f, o))
                c = f * c + i * linear_in(z, z.tanh())
                h = o * linear_in(c, c.tanh())
                outputs[t] = h
            directions.append(torch.stack([outputs[t] for t in steps], 1))
        x = torch.cat(directions, 2)
    return x


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_lstm_hands_everything_to_the_signal(options: dict[str, bool], batch_first: bool) -> None:
    torch.manual_seed(4)
    lstm = nn.LSTM(3, 5, batch_first=batch_first, **options).double().eval()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = lstm, nn.Linear(4 * 5 * (2 if lstm.bidirectional else 1), 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            t = x.reshape(-1, 4, 3)
            t = t if batch_first else t.transpose(0, 1)
            y = self.lstm(t)[0]
            return self.head((y if batch_first else y.transpose(0, 1)).flatten(1))  # type: ignore[no-any-return]

    net = Net().double()
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    explainer = lrp.Explainer(net, composite=LRP0, device="cpu", dtype=torch.float64, example=x.detach())
    found = explainer.explain(x.detach(), 0)
    torch.testing.assert_close(found.output, net(x).detach())
    y = lstm_by_hand(lstm, x.reshape(2, 4, 3))
    (gradient,) = torch.autograd.grad(net.head(y.flatten(1))[:, 0].sum(), x)
    torch.testing.assert_close(found.relevance, (x * gradient).detach(), rtol=1e-9, atol=1e-12)
    assert found.ledger is not None
    assert float(found.ledger.error.max()) < 1e-9
    kept = found.ledger.kept_by().get("lstm", torch.zeros(2))
    # Without biases nothing but rounding stays in an LSTM.
    assert (float(kept.abs().max()) < 1e-12) == (not lstm.bias)
