"""Layers as maps: a layer with a grid goes through its maps unchanged, and GradCAM at tokens is its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion
import lrp
from fusion.errors import BadLayer
from fusion.network import op_name
from lrp.grids import Grids
from lrp.maps import mapped
from tests.lrp.test_grids import NETWORKS, Values, captured, torchvision_swin, torchvision_vit, vit


@pytest.mark.parametrize("name", ["vit with registers", "torchvision swin that pads", "timm swin"])
def test_a_layer_goes_through_its_maps_unchanged(name: str) -> None:
    build, size, last, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = captured(build().eval(), size)
    grids, x = Grids(network), torch.randn(3, 3, *size)
    run = Values(network.module)
    with torch.no_grad():
        run.run(x)
    found = mapped(network, grids, {n.name for n in network.calls()})
    assert len(found) > 30
    assert {"rms_norm", "linear", "add", "reshape"} <= {op_name(m.node) for m in found}
    assert len({m.name for m in found}) == len(found)
    seen: list[Tensor] = []
    for m in found:
        t, grid = run.kept[m.node.name], grids.of(m.node.name)
        assert grid is not None
        seen.clear()
        m.as_maps.maps.register_forward_hook(lambda _, __, maps: seen.append(maps))
        assert torch.equal(m.as_maps(t), t), m.node.name
        (maps,) = seen
        assert maps.shape[0] == 3
        assert tuple(maps.shape[2:]) == (grid.rows, grid.columns)
        inner = lrp.InnerLayer(m.name, m.node.name, "", 0, m.node.meta["example"], m.as_maps.place, grids)
        want, _ = grid.sums(inner.by_sample(t))  # one place in every cell, so the sum over all channels
        torch.testing.assert_close(maps.sum(1), want, rtol=1e-4, atol=1e-4)
    assert any(m.as_maps.parts > 1 for m in found) == ("swin" in name)
    assert last in {m.as_maps.size for m in found}


def plain(module: nn.Module) -> nn.Module:
    """In float64, with norms whose affine part is none: fusion folds it, and the maps have none of it."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3)
    return module.double().eval()


def by_hand(
    module: nn.Module, layer: nn.Module, x: Tensor, target: int, as_maps: Callable[[Tensor], Tensor]
) -> Tensor:
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    score = module(x)[:, target].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[-1])
    maps, slopes = as_maps(kept[-1]), as_maps(gradient)
    cam = torch.relu((slopes.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
    return F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False).detach()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], str, Callable[[Tensor], Tensor]]] = {
    "vit": (vit, (32, 48), "blocks.1.norm1", lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (4, 6))),
    "vit with registers": (
        lambda: vit(reg_tokens=4),
        (32, 48),
        "blocks.1.norm1",
        lambda t: t[:, 5:].transpose(1, 2).unflatten(2, (4, 6)),
    ),
    "torchvision vit": (
        torchvision_vit,
        (32, 32),
        "encoder.layers.encoder_layer_1.ln_1",
        lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (4, 4)),
    ),
    "torchvision swin": (torchvision_swin, (32, 64), "norm", lambda t: t.permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_grad_cam_of_tokens(name: str) -> None:
    """By default at the last norm that the score depends on at the patches."""
    build, size, layer, as_maps = CASES[name]
    module, x = plain(build()), torch.randn(2, 3, *size, dtype=torch.float64)
    explainer = lrp.Explainer(fusion.capture(module, (x,)), dtype=torch.float64)
    assert explainer.cam_layer == layer
    want = by_hand(module, module.get_submodule(layer), x, 2, as_maps)
    assert float(want.max()) > 0
    for options in ({}, {"layer": layer}):
        found = explainer.attribute(x, 2, "GradCAM", **options).relevance
        assert found.shape == (2, 1, *size)
        torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-10 * float(want.max()))


def test_places_that_the_score_does_not_depend_on_are_refused() -> None:
    """Behind its last attention a network that answers by its class token reads no patch."""
    x = torch.randn(1, 3, 32, 48)
    explainer = lrp.Explainer(fusion.capture(vit().eval(), (x,)))
    with pytest.raises(BadLayer, match=r"blocks\.1\.norm2.*depend on.*blocks\.1\.norm1"):
        explainer.attribute(x, 2, "GradCAM", layer="blocks.1.norm2")


class Stem(nn.Module):
    """Convolutions, and then attention alone, without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)
        self.qkv = nn.ModuleList(nn.Linear(6, 18) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        t = self.stem(x).flatten(2).transpose(1, 2)
        for layer in self.qkv:
            q, k, v = layer(t).chunk(3, -1)
            t = t + F.scaled_dot_product_attention(q, k, v)
        return self.head(t.mean(1))  # type: ignore[no-any-return]


def test_a_stem_is_not_the_last_layer() -> None:
    x = torch.randn(1, 3, 12, 16)
    explainer = lrp.Explainer(fusion.capture(Stem().eval(), (x,)))
    sums = [layer.node for layer in explainer.network.layers() if layer.op == "add"]
    assert explainer.cam_layer == sums[-1]
    assert explainer.attribute(x, 1, "GradCAM").relevance.shape == (1, 1, 12, 16)
    stem = explainer.attribute(x, 1, "GradCAM", layer="stem").relevance
    assert not torch.equal(stem, explainer.attribute(x, 1, "GradCAM").relevance)


def test_a_network_without_maps_is_refused() -> None:
    x = torch.randn(1, 3, 8, 8)
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 3))
    explainer = lrp.Explainer(fusion.capture(module, (x,)))
    with pytest.raises(BadLayer, match="no maps to weigh"):
        explainer.attribute(x, 1, "GradCAM")
