"""Other attributions through captum: against captum run on the user's own module, and against their formulas."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import fusion
import lrp
from fusion.errors import BadComposite, BadInput, BadLayer, BadTarget
from lrp.attributions import METHODS, footprint, windows
from tests.nets import calibrated

SIDE, CLASSES = 12, 5


class Rectified(nn.Module):
    """Every kind of fold around ReLUs that are modules, each called once, as captum's hooks need them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.before, self.relu2 = nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu3 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.after, self.fc = nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.before(x))
        x = self.relu3(x + self.bn2(self.conv2(y)))
        return self.fc(self.after(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(3)
    built = calibrated(Rectified(), (3, SIDE, SIDE))
    with torch.no_grad():
        for norm in (built.before, built.bn1, built.after):
            norm.weight[::3] *= -1  # type: ignore[union-attr,index,operator]
    return built.double()


@pytest.fixture(scope="module")
def explainer(module: nn.Module) -> lrp.Explainer:
    network = fusion.capture(module, (torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64),))
    return lrp.Explainer(network, dtype=torch.float64)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def same(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want.detach(), rtol=0, atol=1e-9 * float(want.detach().abs().max()))


class TestAgainstCaptumOnTheModule:
    """What captum gives for the user's module, it gives for the fused graph."""

    def test_input_x_gradient(self, explainer: lrp.Explainer, module: nn.Module, x: Tensor) -> None:
        want = captum.attr.InputXGradient(module).attribute(x.clone(), target=2)
        same(explainer.attribute(x, 2, "InputXGradient").relevance, want)

    def test_integrated_gradients(self, explainer: lrp.Explainer, module: nn.Module, x: Tensor) -> None:
        want = captum.attr.IntegratedGradients(module).attribute(x, baselines=0.3, target=2, n_steps=20)
        found = explainer.attribute(x, 2, "IntegratedGradients", baseline=0.3, n_steps=20, batch=4)
        same(found.relevance, want)

    def test_smooth_grad(self, explainer: lrp.Explainer, module: nn.Module, x: Tensor) -> None:
        image, noise = x[:1], 0.2 * float(x[:1].max() - x[:1].min())
        tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(module))
        torch.manual_seed(7)
        want = tunnel.attribute(
            image.clone(), nt_samples=6, nt_samples_batch_size=6, stdevs=noise, target=2, abs=False
        )
        same(explainer.attribute(image, 2, "SmoothGrad", samples=6, noise=0.2, seed=7).relevance, want)

    @pytest.mark.filterwarnings("ignore:Setting backward hooks")
    def test_guided_backprop(self, explainer: lrp.Explainer, module: nn.Module, x: Tensor) -> None:
        ops = {layer.op for layer in explainer.network.layers()}
        assert ops & {"maximum", "minimum"}, "no ReLU has another threshold: this tests too little"
        want = captum.attr.GuidedBackprop(module).attribute(x.clone(), target=2)
        plain = captum.attr.Saliency(module).attribute(x.clone(), target=2, abs=False)
        assert float((want - plain).abs().max()) > 0.1 * float(plain.abs().max())
        same(explainer.attribute(x, 2, "GuidedBackprop").relevance, want)

    def test_occlusion(self, explainer: lrp.Explainer, module: nn.Module, x: Tensor) -> None:
        want = captum.attr.Occlusion(module).attribute(
            x, (3, 4, 3), strides=(3, 2, 3), baselines=0.1, target=2
        )
        found = explainer.attribute(x, 2, "Occlusion", window=(4, 3), stride=(2, 3), baseline=0.1)
        assert want.dtype == torch.float32  # captum's own, also in float64
        same(found.relevance, want.double())

    def test_grad_cam(self, explainer: lrp.Explainer, module: nn.Module, x: Tensor) -> None:
        """At bn1's output, which fusion made the first convolution's."""
        cam = captum.attr.LayerGradCam(module, module.bn1)  # type: ignore[arg-type]
        want = cam.attribute(x.clone(), target=2, relu_attributions=True)
        found = explainer.attribute(x, 2, "GradCAM", layer="conv1").relevance
        assert found.shape == (3, 1, SIDE, SIDE)
        assert bool((want > 0).any())
        same(found, want)


class TestAgainstTheFormulas:
    def test_integrated_gradients_are_complete(
        self, explainer: lrp.Explainer, module: nn.Module, x: Tensor
    ) -> None:
        found = explainer.attribute(x, 2, "IntegratedGradients", n_steps=500)
        gap = module(x)[:, 2] - module(torch.zeros_like(x))[:, 2]
        torch.testing.assert_close(found.relevance.sum((1, 2, 3)), gap.detach(), rtol=1e-3, atol=1e-3)

    def test_occlusion_by_hand(self, explainer: lrp.Explainer, module: nn.Module, x: Tensor) -> None:
        want = torch.zeros_like(x)
        for row in range(0, SIDE, 4):
            for column in range(0, SIDE, 4):
                covered = x.clone()
                covered[:, :, row : row + 4, column : column + 4] = 0
                fall = (module(x) - module(covered))[:, 2].detach()
                want[:, :, row : row + 4, column : column + 4] = fall[:, None, None, None]
        found = explainer.attribute(x, 2, "Occlusion", window=4, stride=4).relevance
        same(found, want.float().double())  # captum rounds once, to float32

    def test_grad_cam_by_hand(self) -> None:
        """The default layer is the last convolution; the map is enlarged bilinearly."""
        torch.manual_seed(0)
        conv, fc = nn.Conv2d(3, 4, 3, stride=2, padding=1).double(), nn.Linear(4, 3).double()
        net = nn.Sequential(
            nn.Conv2d(3, 3, 1).double(), nn.ReLU(), conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc
        )
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        found = (
            lrp.Explainer(fusion.capture(net, (x,)), dtype=torch.float64).attribute(x, 1, "GradCAM").relevance
        )
        maps = net[:3](x)
        gradient = (maps > 0) * fc.weight[1][:, None, None] / maps[0, 0].numel()
        cam = torch.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
        want = nn.functional.interpolate(cam, (8, 8), mode="bilinear", align_corners=False)
        assert float(want.detach().abs().max()) > 0
        same(found, want)

    def test_smooth_grad_without_noise_is_the_gradient(
        self, explainer: lrp.Explainer, module: nn.Module, x: Tensor
    ) -> None:
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(module(leaf)[:, 2].sum(), leaf)
        same(explainer.attribute(x, 2, "SmoothGrad", samples=2, noise=0.0).relevance, want)


class TestSmoothGrad:
    def test_a_seed_gives_a_map(self, explainer: lrp.Explainer, x: Tensor) -> None:
        """Whatever the batch and the neighbours are, and whoever else draws."""

        def found(images: Tensor, **options: int) -> Tensor:
            return explainer.attribute(images, 2, "SmoothGrad", samples=5, **options).relevance

        whole = found(x)
        torch.rand(3)
        same(found(x[1:2], batch=2), whole[1:2])
        other = found(x, seed=1)
        assert float((other - whole).abs().max()) > 1e-3 * float(whole.abs().max())

    def test_nobody_else_s_numbers_change(self, explainer: lrp.Explainer, x: Tensor) -> None:
        before = torch.random.get_rng_state()
        explainer.attribute(x[:1], 2, "SmoothGrad", samples=3)
        assert torch.equal(torch.random.get_rng_state(), before)


class TestProgress:
    @pytest.mark.parametrize(
        ("method", "options", "images"),
        [
            ("IntegratedGradients", {"n_steps": 7, "batch": 3}, 7),
            ("SmoothGrad", {"samples": 7, "batch": 3}, 7),
            ("InputXGradient", {}, 1),
            ("Occlusion", {"window": 5, "stride": 3, "batch": 4}, 1 + 16),  # and once uncovered
            ("GradCAM", {}, 1),
        ],
    )
    def test_every_run_is_told_before_it_starts(
        self, explainer: lrp.Explainer, x: Tensor, method: str, options: dict[str, int], images: int
    ) -> None:
        told: list[int] = []
        call: Callable[..., object] = explainer.attribute
        call(x[:1], 2, method, progress=told.append, **options)
        assert sum(told) == images
        assert max(told) <= options.get("batch", 1)

    def test_what_it_raises_ends_the_attribution(self, explainer: lrp.Explainer, x: Tensor) -> None:
        runs = 0

        def stop(images: int) -> None:
            nonlocal runs
            runs += 1
            if runs == 3:
                raise TimeoutError

        with pytest.raises(TimeoutError):
            explainer.attribute(x, 2, "Occlusion", batch=1, progress=stop)
        assert runs == 3


@pytest.mark.parametrize(
    ("image", "window", "stride", "want"),
    [
        ((12, 12), 5, 3, ((5, 5), (3, 3), 16)),
        ((12, 12), 4, 4, ((4, 4), (4, 4), 9)),
        ((12, 9), (12, 2), (1, 2), ((12, 2), (1, 2), 5)),
        ((224, 224), None, None, ((28, 28), (14, 14), 225)),
        ((3, 3), None, None, ((1, 1), (1, 1), 9)),
    ],
)
def test_windows(image: tuple[int, int], window: object, stride: object, want: object) -> None:
    assert windows(image, window, stride) == want  # type: ignore[arg-type]


class TestTargets:
    def test_the_result_is_an_explanation(
        self, explainer: lrp.Explainer, module: nn.Module, x: Tensor
    ) -> None:
        found = explainer.attribute(x)
        assert found.composite == "IntegratedGradients"
        assert found.ledger is None
        assert found.target is not None
        assert torch.equal(found.target, module(x).argmax(1))
        torch.testing.assert_close(found.output, module(x).detach())
        torch.testing.assert_close(found.score, module(x).amax(1).detach())
        assert found.heatmap().shape == (3, SIDE, SIDE)

    def test_several_a_contrast_and_a_function(self, explainer: lrp.Explainer, x: Tensor) -> None:
        def found(target: object) -> lrp.Explanation:
            return explainer.attribute(x, target, "InputXGradient")  # type: ignore[arg-type]

        both = found([[1, 4]] * 3)
        assert both.relevance.shape == (3, 2, 3, SIDE, SIDE)
        same(both.relevance[:, 0], found(1).relevance)
        same(found(lrp.Contrast(1, 4)).relevance, both.relevance[:, 0] - both.relevance[:, 1])
        squared = found(lambda scores: scores[:, 1] ** 2)
        same(squared.relevance, 2 * found(1).score[:, None, None, None] * found(1).relevance)
        torch.testing.assert_close(squared.score, found(1).score ** 2)

    def test_a_function_is_not_linearized(
        self, explainer: lrp.Explainer, module: nn.Module, x: Tensor
    ) -> None:
        found = explainer.attribute(
            x, lambda scores: scores[:, 1] ** 2, "Occlusion", window=SIDE, stride=SIDE
        )
        want = module(x)[:, 1] ** 2 - module(torch.zeros_like(x))[:, 1] ** 2
        torch.testing.assert_close(found.relevance[:, 0, 0, 0], want.detach().float().double())

    def test_neurons_of_a_layer(self, explainer: lrp.Explainer, module: nn.Module, x: Tensor) -> None:
        leaf = x.clone().requires_grad_()
        answer = module.bn1(module.conv1(leaf))[:, [2, 3]].sum()  # type: ignore[operator,index]
        (want,) = torch.autograd.grad(answer, leaf)
        same(explainer.attribute(x, lrp.Neurons("conv1", [2, 3]), "InputXGradient").relevance, want * x)

    def test_an_image_s_map_does_not_depend_on_its_neighbours(
        self, explainer: lrp.Explainer, x: Tensor
    ) -> None:
        for method in ("IntegratedGradients", "Occlusion", "GradCAM", "GuidedBackprop"):
            whole = explainer.attribute(x, [1, 2, 3], method).relevance
            alone = explainer.attribute(x[1:2], 2, method).relevance
            same(whole[1:2], alone)

    def test_nothing_is_left_behind(self, explainer: lrp.Explainer, x: Tensor) -> None:
        before = explainer.explain(x, 1).relevance
        with torch.inference_mode():
            maps = [explainer.attribute(x, 1, method).relevance for method in METHODS]
        assert not any(t.requires_grad for t in maps)
        assert torch.equal(explainer.explain(x, 1).relevance, before)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"method": "Magic"}, BadComposite, "IntegratedGradients"),
            ({"method": "Occlusion", "windw": 3}, BadComposite, "it takes window"),
            ({"method": "InputXGradient", "n_steps": 3}, BadComposite, "it takes none"),
            ({"method": "Occlusion", "window": 99}, BadComposite, "does not cover"),
            ({"method": "Occlusion", "window": 2, "stride": 3}, BadComposite, "does not cover"),
            ({"method": "IntegratedGradients", "baseline": torch.zeros(7)}, BadInput, "does not fit"),
            ({"method": "GradCAM", "layer": "nowhere"}, BadLayer, "nowhere"),
            ({"method": "GradCAM", "layer": "fc"}, BadLayer, "maps"),
            ({"method": "GradCAM", "target": 5}, BadTarget, "0 to 4"),
        ],
    )
    def test_what_is_wrong_is_named(
        self,
        explainer: lrp.Explainer,
        x: Tensor,
        options: dict[str, object],
        error: type[Exception],
        words: str,
    ) -> None:
        call: Callable[..., object] = explainer.attribute
        with pytest.raises(error, match=words):
            call(x, **options)

    def test_guided_backprop_without_a_relu(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        explainer = lrp.Explainer(fusion.capture(net, (torch.randn(1, 3, 8, 8),)))
        with pytest.raises(BadComposite, match="has none"):
            explainer.attribute(torch.randn(1, 3, 8, 8), 1, "GuidedBackprop")


def test_importing_the_library_does_not_import_captum() -> None:
    code = "import sys, lrp, lrp.attributions; print(any(name.startswith('captum') for name in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


def test_the_footprint_counts_what_lies_between_the_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    network = fusion.capture(net, (torch.randn(1, 3, 8, 8),))
    assert footprint(network) == 4 * (3 * 4 * 36 + 5)
