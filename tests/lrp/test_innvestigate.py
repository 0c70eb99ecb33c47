"""Relevance that iNNvestigate 2.1.2 stored for six one-layer networks, against the same networks here in float64.

Each file holds one method: eight inputs 10x10x3 in NHWC, the weights of every layer, outputs and attributions. Each
explains the largest output. All of it was computed in float32, which is where the bound comes from: 1e-6 of the largest
attribution is some 16 roundings. The rules deviate by 2.3e-7 at most, means over 64 gradients by 8.9e-7. Every stored
bias is zero, so the files pin the rules, the seed and the layout, but not what becomes of a bias. Deconvnet has no
counterpart here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import lrp
from lrp.composites import Composite
from lrp.rules import AnyRule

Floats = npt.NDArray[np.float64]
BOUND = 1e-6
KERNELS = ("Dense", "Dense_relu", "Conv2D", "Conv2D_relu")
POOLS = ("AveragePooling2D", "MaxPooling2D")

# iNNvestigate's Z, alpha-beta, w2, flat and bounded rules have no stabilizer except where a denominator is 0.
BARE: dict[str, Any] = {"epsilon": 0.0}
RULES: dict[str, AnyRule] = {
    "LRPZ": lrp.LRP0(),
    "LRPZIgnoreBias": lrp.LRP0(bias="omit"),
    "LRPEpsilon": lrp.Epsilon(1e-7),
    "LRPEpsilonIgnoreBias": lrp.Epsilon(1e-7, bias="omit"),
    "LRPWSquare": lrp.WSquare(**BARE),
    "LRPFlat": lrp.Flat(**BARE),
    "LRPAlpha1Beta0": lrp.AlphaBeta(1.0, 0.0, **BARE),
    "LRPAlpha1Beta0IgnoreBias": lrp.AlphaBeta(1.0, 0.0, bias="omit", **BARE),
    "LRPAlpha2Beta1": lrp.AlphaBeta(2.0, 1.0, **BARE),
    "LRPAlpha2Beta1IgnoreBias": lrp.AlphaBeta(2.0, 1.0, bias="omit", **BARE),
    "LRPZPlus": lrp.ZPlus(bias="omit", **BARE),
    "LRPZPlusFast": lrp.ZPlus(bias="omit", **BARE),
    "LRPZ_Flat_input_layer_rule": lrp.Flat(**BARE),
    "LRPZ_boxed_input_layer_rule": lrp.ZBox(-10.0, 10.0, **BARE),
    "DeepTaylor": lrp.ZPlus(bias="omit", **BARE),
    "BoundedDeepTaylor": lrp.ZBox(-128.0, 128.0, **BARE),
}
# The presets: (convolution, linear, first).
PRESETS: dict[str, tuple[Any, Any, AnyRule | None]] = {
    "LRPSequentialPresetA": (lrp.AlphaBeta(1.0, 0.0, **BARE), lrp.Epsilon(0.1), None),
    "LRPSequentialPresetB": (lrp.AlphaBeta(2.0, 1.0, **BARE), lrp.Epsilon(0.1), None),
    "LRPSequentialPresetAFlat": (lrp.AlphaBeta(1.0, 0.0, **BARE), lrp.Epsilon(0.1), lrp.Flat(**BARE)),
    "LRPSequentialPresetBFlat": (lrp.AlphaBeta(2.0, 1.0, **BARE), lrp.Epsilon(0.1), lrp.Flat(**BARE)),
}
# Deep Taylor hands relevance through average pools by their gradient, R_i = sum_k w_ik R_k; here it is shared by
# contribution, R_i = sum_k a_i w_ik / z_k R_k, as in iNNvestigate's own LRP.
POOLS_BY_GRADIENT = ("DeepTaylor", "BoundedDeepTaylor")


class Network(nn.Module):
    """One layer on images [N, 10, 10, 3], its outputs flattened in that order."""

    def __init__(self, layer: nn.Module, channels_last: bool, relu: bool) -> None:
        super().__init__()
        self.layer, self.channels_last, self.relu = layer, channels_last, relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) if self.channels_last else self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (torch.relu(y) if self.relu else y).flatten(1)


class Stored:
    """One layer of one file."""

    def __init__(self, folder: Path, method: str, kind: str) -> None:
        with h5py.File(folder / f"{method}.hdf5") as file:
            self.x = torch.from_numpy(file["input"][:]).float().double()  # Keras computes with float32
            group = file[kind]
            weights = [torch.from_numpy(group["weights"][name][:]).double() for name in group["weights"]]
            self.output: Floats = group["output"][:].astype(np.float64)
            self.attribution: Floats = group["attribution"][:].astype(np.float64)
        self.bias = weights[1] if weights else torch.zeros(1)
        self.network = Network(layer(kind, weights), kind.startswith("Dense"), kind.endswith("relu")).double()

    def explained(self, composite: Composite) -> Floats:
        explainer = lrp.Explainer(
            self.network, composite=composite, dtype=torch.float64, device="cpu", example=self.x
        )
        return explainer.explain(self.x).relevance.numpy()

    def attributed(self, method: str, **options: Any) -> Floats:
        explainer = lrp.Explainer(self.network, dtype=torch.float64, device="cpu", example=self.x)
        return explainer.attribute(self.x, None, method, **options).relevance.numpy()

    @property
    def score(self) -> Floats:
        """The largest output of every input, to be multiplied with attributions."""
        with torch.no_grad():
            return self.network(self.x).amax(1).reshape(-1, 1, 1, 1).numpy()


def layer(kind: str, weights: list[Tensor]) -> nn.Module:
    if kind in POOLS:
        return nn.AvgPool2d(2) if kind == "AveragePooling2D" else nn.MaxPool2d(2)
    made = nn.Linear(3, 5) if kind.startswith("Dense") else nn.Conv2d(3, 5, 3)
    w, b = weights
    made.weight = nn.Parameter(w.T.contiguous() if w.ndim == 2 else w.permute(3, 2, 0, 1).contiguous())
    made.bias = nn.Parameter(b)
    return made


@pytest.fixture
def folder(shared: Path) -> Path:
    path = shared / "data" / "innvestigate"
    if not path.is_dir():
        pytest.skip("no reference relevances of iNNvestigate")
    return path


def everywhere(rule: AnyRule) -> Composite:
    return Composite("test", convolution=lrp.LRP0(), linear=lrp.LRP0(), overrides=(("layer", rule),))


PLAIN = Composite("test", convolution=lrp.LRP0(), linear=lrp.LRP0())


def assert_close(got: Floats, expected: Floats) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= BOUND * np.abs(expected).max()


@pytest.mark.parametrize("kind", [*KERNELS, *POOLS])
def test_the_network_answers_as_in_keras_and_has_no_bias(folder: Path, kind: str) -> None:
    for file in folder.glob("*.hdf5"):
        case = Stored(folder, file.stem, kind)
        assert_close(case.network(case.x).detach().numpy(), case.output)
        assert not case.bias.any()


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("method", RULES)
def test_a_rule_is_iNNvestigates(folder: Path, method: str, kind: str) -> None:
    case = Stored(folder, method, kind)
    assert_close(case.explained(everywhere(RULES[method])), case.attribution)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("method", PRESETS)
def test_a_preset_is_iNNvestigates(folder: Path, method: str, kind: str) -> None:
    case = Stored(folder, method, kind)
    convolution, linear, first = PRESETS[method]
    ours = Composite("test", convolution=convolution, linear=linear, first=first)
    assert_close(case.explained(ours), case.attribution)


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("method", [*RULES, *PRESETS])
def test_pools_are_iNNvestigates(folder: Path, method: str, kind: str) -> None:
    case = Stored(folder, method, kind)
    ours = case.explained(PLAIN)
    if kind == "AveragePooling2D" and method in POOLS_BY_GRADIENT:
        a, size = case.x.numpy(), 4
        best = case.output.reshape(8, -1).argmax(1)
        reached = np.zeros_like(a)
        for n, (row, column, channel) in enumerate(zip(*np.unravel_index(best, (5, 5, 3)), strict=True)):
            reached[n, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2, channel] = 1 / size
        assert_close(case.score * reached, case.attribution)
        assert_close(ours, a * reached)
    else:
        assert_close(ours, case.attribution)


@pytest.mark.parametrize("kind", [*KERNELS, *POOLS])
def test_input_times_gradient_and_gradient(folder: Path, kind: str) -> None:
    case = Stored(folder, "InputTimesGradient", kind)
    assert_close(case.attributed("InputXGradient"), case.attribution)
    case = Stored(folder, "Gradient", kind)
    assert_close(case.attributed("InputXGradient") / case.x.numpy(), case.attribution)  # no input is 0


@pytest.mark.parametrize("kind", ["Dense", "Conv2D", "AveragePooling2D"])
def test_smooth_grad_is_the_gradient_where_noise_changes_none(folder: Path, kind: str) -> None:
    case = Stored(folder, "SmoothGrad", kind)
    assert_close(case.attributed("SmoothGrad", samples=2), case.attribution)


@pytest.mark.parametrize("kind", ["Dense_relu", "Conv2D_relu"])
def test_guided_backprop_starts_at_the_score_in_iNNvestigate_and_at_one_here(folder: Path, kind: str) -> None:
    case = Stored(folder, "GuidedBackprop", kind)
    assert_close(case.score * case.attributed("GuidedBackprop"), case.attribution)


@pytest.mark.parametrize("kind", [*KERNELS, *POOLS])
def test_integrated_gradients_are_a_sum_of_64_steps_from_zero_on_in_iNNvestigate(
    folder: Path, kind: str
) -> None:
    # The path is x * s / 64 for s = 0 to 63. These networks are homogeneous, so the gradient is the same on all of it
    # but at s = 0, where a ReLU has none and the first value of a max pool's window wins the tie.
    case = Stored(folder, "IntegratedGradients", kind)
    ours = case.attributed("IntegratedGradients")
    if kind.endswith("relu"):
        at_zero = 0 * ours
    elif kind == "MaxPooling2D":
        first = np.eye(1, 4).reshape(1, 1, 2, 1, 2, 1)
        reached = ours.reshape(8, 5, 2, 5, 2, 3).any((2, 4), keepdims=True) * first
        at_zero = case.x.numpy() * reached.reshape(ours.shape)
    else:
        at_zero = ours
    assert_close(63 / 64 * ours + 1 / 64 * at_zero, case.attribution)
