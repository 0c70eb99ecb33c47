"""The certificate of one fold: small for folds, and large for everything that is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fusion
from fusion.affine import affine_node
from fusion.network import op_name
from fusion.passes import Plan, carry_out_certified, plan_backward, plan_centering, plan_forward
from tests.fusion.test_centering import Stream, Transformer
from tests.nets import Bottleneck, calibrated


def captured(module: nn.Module, *shape: int) -> fusion.Network:
    return fusion.capture(module.double().eval(), (torch.randn(1, *shape, dtype=torch.float64),))


def plan_for(network: fusion.Network, op: str, way: str) -> Plan:
    node = next(n for n in network.calls() if op_name(n) == op)
    if way == "centering":
        return plan_centering(network, node)
    found = affine_node(network, node)
    assert found is not None
    return (plan_backward if way == "backward" else plan_forward)(network, found)


def padded() -> fusion.Network:
    """BN, ReLU, then a zero-padded convolution, which gets a bias map."""
    return captured(
        calibrated(
            nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(1)), (3, 5, 5)
        ),
        3, 5, 5,
    )  # fmt: skip


CASES = {
    "backward": (
        lambda: captured(calibrated(Bottleneck(), (3, 16, 16)), 3, 16, 16),
        "batch_norm",
        "backward",
    ),
    "forward, with thresholds and a bias map": (padded, "batch_norm", "forward"),
    "centering": (lambda: captured(Stream("plain"), 3, 4), "layer_norm", "centering"),
    "forward, out of a norm": (lambda: captured(Transformer(6), 3, 8, 8), "layer_norm", "forward"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fold_changes_nothing_that_it_promises_to_leave(case: str) -> None:
    make, op, way = CASES[case]
    network = make()
    plan = plan_for(network, op, way)
    assert carry_out_certified(network, plan) <= 1e-13
    network.graph.lint()


@pytest.mark.parametrize("case", CASES)
def test_a_fold_that_leaves_one_edit_out_is_found_out(case: str) -> None:
    make, op, way = CASES[case]
    for left_out in range(len(plan_for(network := make(), op, way).edits)):
        network = make()
        plan = plan_for(network, op, way)
        edits = plan.edits[:left_out] + plan.edits[left_out + 1 :]
        if way == "centering" and left_out >= len(edits) + 1 - len(plan.folded):
            continue  # a layer norm that is left centres by itself: no error
        assert carry_out_certified(network, replace(plan, edits=edits)) > 1e-3


class Everything(nn.Module):
    """Two normalizations that go different ways, one of them twice, and one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.kept, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.two(self.one(self.conv(x))))
        return self.fc(torch.nn.functional.gelu(self.kept(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_every_fold_has_its_certificate_in_the_report(dtype: torch.dtype, bound: float) -> None:
    network = captured(calibrated(Everything(), (3, 6, 6)), 3, 6, 6).to(dtype=dtype)
    report = fusion.fuse(network, certified=True).report
    folded = {row.layer: row.certificate for row in report.rows}
    assert folded["kept"] is None
    values = [value for value in folded.values() if value is not None]
    assert len(values) == 2
    assert report.certificate == max(values)
    assert 0 < report.certificate <= bound
    assert report.to_json()["certificate"] == report.certificate
    plain = fusion.fuse(network).report
    assert plain.certificate is None
    assert {row.certificate for row in plain.rows} == {None}
