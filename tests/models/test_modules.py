"""Modules as users have them: scripted, quantized, half written over their image, under autocast, or not to be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fusion
import lrp
import models
from fusion.errors import BadInput, CaptureError, UnsupportedOperator
from tests.models.nets import small

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = (16, 16)


class Around(nn.Module):
    """Something around a network: `before` on the image, the network, `behind` on its answers."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] | None = None,
        behind: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.before, self.behind = small(), before, behind

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x if self.before is None else self.before(x))
        return y if self.behind is None else self.behind(y)  # type: ignore[no-any-return]


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def explained(opened: models.Opened) -> lrp.Explanation:
    answer = lrp.Explainer(fusion.fuse(opened.network).network, composite="auto").explain(images())
    assert answer.ledger is not None
    assert float(answer.ledger.error.max()) < 1e-5
    return answer


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, images(1))])
def test_a_script_in_memory_is_read_as_its_file(make: Callable[[nn.Module], torch.jit.ScriptModule]) -> None:
    module = small().eval()
    opened = models.open(make(module), size=SIZE)
    assert opened.format == "torchscript"
    with torch.no_grad():
        torch.testing.assert_close(opened.network(images()), module(images()))
    explained(opened)


def test_a_network_that_was_quantized_as_a_module() -> None:
    def fixed() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
            )
            prepared = prepare_fx(module.eval(), get_default_qconfig_mapping("x86"), (images(),))
            prepared(images())
            return convert_fx(prepared)  # type: ignore[no-any-return]

    for module in (quantize_dynamic(small().eval(), {nn.Linear}), fixed()):
        opened = models.open(module, size=SIZE)
        assert opened.quantized
        assert fusion.certify(opened.original, opened.network, [images()]).max_relative < 0.05
        explained(opened)


def written_over(x: Tensor) -> Tensor:
    x[:, 0] = 0
    x[:, 1].fill_(0.5)
    return x.sub_(0.1).div_(0.2)


def test_a_network_that_writes_over_its_image() -> None:
    module = Around(written_over, lambda y: y.add_(1)).eval()
    opened = models.open(module, size=SIZE)
    x = images()
    for answers in (opened.original(x), opened.network(x)):
        assert bool((x == images()).all())  # the user's image is as it was
        with torch.no_grad():
            torch.testing.assert_close(answers, module(images()))
    relevance = explained(opened).relevance
    assert float(relevance[:, :2].abs().max()) == 0  # what is written over says nothing


def test_what_autocast_computes_in_half_precision_is_computed_in_the_networks_own() -> None:
    class Halved(Around):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    torch.manual_seed(0)
    module = Halved().eval()
    opened = models.open(module, size=SIZE)
    with torch.no_grad():
        torch.testing.assert_close(opened.network(images()), module.network(images()))
    assert fusion.certify(opened.original, opened.network, [images()]).max_relative < 0.02
    explained(opened)


def test_an_operator_on_complex_numbers_is_refused_by_name() -> None:
    """Its numbers are no indices, through which no relevance would have to flow."""
    opened = models.open(Around(lambda x: x + torch.fft.ifft2(torch.fft.fft2(x) * 0.5).real), size=SIZE)
    with pytest.raises(UnsupportedOperator, match="fft"):
        lrp.Explainer(opened.network)


def test_a_decision_on_values_is_refused_with_the_way_out() -> None:
    with pytest.raises(CaptureError, match=r"torch\.where"):
        models.open(Around(lambda x: x * 2 if x.sum() > 0 else x), size=SIZE)


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(BadInput, match="Load them first"):
        models.open(small().to("meta"), size=SIZE)
