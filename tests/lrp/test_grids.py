"""Where tokens and windows stand in the image: against the pixels that they depend on, where nothing mixes places."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.models.deit
import timm.models.eva
import timm.models.swin_transformer
import timm.models.vision_transformer
import torch
import torchvision
from torch import Tensor, fx, nn

import fusion
import lrp
from fusion.errors import BadLayer
from fusion.network import Network, op_name
from lrp.grids import Grid, Grids
from lrp.inner import samples_first
from lrp.surrogate import sample_places
from tests.nets import bottleneck

SMALL = {"num_classes": 5, "depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}


def vit(**options: object) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(img_size=(32, 48), **SMALL, **options)


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=5)


def deit() -> nn.Module:
    return timm.models.deit.VisionTransformerDistilled(img_size=(32, 48), **SMALL)


def eva() -> nn.Module:
    return timm.models.eva.Eva(img_size=(32, 48), use_rot_pos_emb=True, num_reg_tokens=3, **SMALL)


def torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=5)


def timm_swin() -> nn.Module:
    return timm.models.swin_transformer.SwinTransformer(
        img_size=(32, 64),
        patch_size=4,
        num_classes=5,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=4,
    )


# A network, the image that it takes, the grid of its last tokens, and how many of these stand outside.
NETWORKS = {
    "vit": (vit, (32, 48), (4, 6), 1),
    "vit with registers": (lambda: vit(reg_tokens=4), (32, 48), (4, 6), 5),
    "vit without a class token": (lambda: vit(class_token=False, global_pool="avg"), (32, 48), (4, 6), 0),
    "torchvision vit": (torchvision_vit, (32, 32), (4, 4), 1),
    "deit": (deit, (32, 48), (4, 6), 2),
    "eva": (eva, (32, 48), (4, 6), 4),
    "torchvision swin": (torchvision_swin, (32, 64), (4, 8), 0),
    "torchvision swin that pads": (torchvision_swin, (24, 40), (3, 5), 0),
    "timm swin": (timm_swin, (32, 64), (4, 8), 0),
}


def apart(module: nn.Module) -> nn.Module:
    """The module with nothing let through behind attention, so that every place depends on its own pixels alone."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(("attn.proj", "out_proj")):
                layer.weight.zero_()
                layer.bias.zero_()
    return module.eval()


def captured(module: nn.Module, size: tuple[int, int]) -> Network:
    return fusion.fuse(fusion.capture(module, (torch.randn(1, 3, *size),))).network


def mixing(network: Network) -> set[fx.Node]:
    """What attention makes, up to the layer that lets nothing through."""
    found: set[fx.Node] = set()
    for node in network.calls():
        weight = network.constant(node.args[1]) if op_name(node) == "linear" else None
        closed = weight is not None and not bool(weight.any())
        mixes = op_name(node) in ("scaled_dot_product_attention", "matmul")
        if not closed and (mixes or any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


class Values(fx.Interpreter):
    """A run that keeps every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.kept[n.name] = value
        return value


def depends_on(values: Tensor, chosen: Tensor, x: Tensor) -> Tensor:
    """Which pixels [H, W] the chosen values depend on."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)) * chosen
    (gradient,) = torch.autograd.grad((values * weights).sum(), x, retain_graph=True)
    return gradient[0].abs().sum(0) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_place_depends_on_the_pixels_of_its_cell(name: str) -> None:
    build, size, last, outside = NETWORKS[name]
    network = captured(apart(build()), size)
    grids, places = Grids(network), sample_places(network)
    x = torch.randn(1, 3, *size, requires_grad=True)
    run = Values(network.module)
    run.run(x)
    mixed, checked = mixing(network), []
    telling = ("conv2d", "linear", "layer_norm", "rms_norm", "add", "roll", "reshape")
    for node in network.calls():
        grid = grids.of(node.name)
        if grid is None or node in mixed or op_name(node) not in telling or not run.kept[node.name].any():
            continue  # also where nothing comes from, behind attention
        if op_name(node).endswith("norm") and grid.cells.shape[-1] > 1:
            continue  # of places that are being merged: the divisor, which is held constant, depends on all of them
        axis, outer = places[node]
        values = samples_first(run.kept[node.name], axis, outer, node.meta["example"][axis] // 2)[0]
        cells = grid.cells.expand(values.shape)
        height, width = size[0] // grid.rows, size[1] // grid.columns
        for cell in {0, grid.columns - 1, grid.columns, grid.rows * grid.columns - 1}:
            row, column = divmod(cell, grid.columns)
            want = torch.zeros(size, dtype=torch.bool)
            want[row * height : (row + 1) * height, column * width : (column + 1) * width] = True
            assert torch.equal(depends_on(values, cells == cell, x), want), (node.name, grid.rows, cell)
        if bool((cells < 0).any()):
            assert not bool(depends_on(values, cells < 0, x).any()), node.name
        checked.append((grid.rows, grid.columns))
    assert last in checked
    assert len(checked) > 15
    sums = [g for n in network.calls() if op_name(n) == "add" and (g := grids.of(n.name))]
    assert int((sums[-1].cells < 0).sum()) == outside


@pytest.mark.parametrize("name", NETWORKS)
def test_what_attends_keeps_its_places(name: str) -> None:
    """Behind attention every place depends on every pixel, and still is where it was."""
    build, size, last, _ = NETWORKS[name]
    torch.manual_seed(0)
    grids = Grids(network := captured(build().eval(), size))
    for node in network.calls():
        grid = grids.of(node.name)
        if op_name(node) in ("linear", "layer_norm", "rms_norm") and len(node.meta["shape"]) > 2:
            assert grid is not None, node.name
            assert (grid.rows, grid.columns) in (last, (2 * last[0], 2 * last[1]))
        if len(node.meta["shape"]) == 2 and node.meta["example"][0] == 2:
            assert grid is None, node.name  # pooled, or a class token alone


def test_a_trained_transformer_from_an_onnx_file(shared: Path) -> None:
    """Exported with attention and token shuffling spelled out: 2 x 2 patches and a class token."""
    explainer = lrp.Explainer(shared / "networks" / "vit_bn_cifar10.onnx")
    layers = {e.name: e for e in explainer.inner_layers() if e.op == "linear" and e.shape[1:2] == (5,)}
    assert len(layers) > 5
    for layer in layers.values():
        assert layer.grid is not None, layer.name
        assert (layer.grid.rows, layer.grid.columns) == (2, 2)
        assert layer.grid.cells.flatten().tolist() == [-1, 0, 1, 2, 3]
    cam = explainer.attribute(torch.randn(2, 3, 32, 32), 1, "GradCAM")
    assert cam.relevance.shape == (2, 1, 32, 32)


class TestRelevance:
    def test_a_convolution_s_places_are_its_own(self) -> None:
        network = fusion.capture(bottleneck(), (torch.randn(1, 3, 16, 16),))
        explainer, x = lrp.Explainer(network), torch.randn(3, 3, 16, 16)
        inner = explainer.explain(x, 1, at=["conv2", "conv3", "fc"]).inner
        for name in ("conv2", "conv3"):
            torch.testing.assert_close(inner[name].on_image(), inner[name].map())
            assert not bool(inner[name].outside().any())
        assert inner["fc"].grid is None
        with pytest.raises(BadLayer, match="no rows and columns"):
            inner["fc"].on_image()

    @pytest.mark.parametrize("name", ["vit with registers", "torchvision swin", "timm swin"])
    def test_the_map_and_what_is_outside_add_up(self, name: str) -> None:
        build, size, _, outside = NETWORKS[name]
        torch.manual_seed(0)
        explainer = lrp.Explainer(fusion.capture(build().eval(), (torch.randn(1, 3, *size),)))
        names = [e.name for e in explainer.inner_layers() if e.grid is not None and e.op in ("linear", "add")]
        assert len(names) > 5
        whole = explainer.explain(torch.randn(2, 3, *size), [[1, 2]] * 2, at=names).inner
        for inner in whole.values():
            assert inner.grid is not None
            assert inner.on_image().shape == (2, 2, inner.grid.rows, inner.grid.columns)
            torch.testing.assert_close(
                inner.on_image().sum((2, 3)) + inner.outside(), inner.by_channel.sum(-1), rtol=1e-4, atol=1e-5
            )
        assert any(bool(inner.outside().any()) for inner in whole.values()) == bool(outside)

    def test_windows_are_put_back(self) -> None:
        """The relevance in windows and behind their way back is the same, place by place."""
        network = fusion.capture(apart(torchvision_swin()), (torch.randn(1, 3, 32, 64),))
        explainer = lrp.Explainer(network)
        layers = {e.name: e for e in explainer.inner_layers() if e.op == "reshape" and e.grid is not None}
        windows = [name for name, e in layers.items() if e.parts > 1]
        assert windows
        answer = explainer.explain(torch.randn(1, 3, 32, 64), 1, at=[*layers])
        for name in windows:
            inner = answer.inner[name]
            want = torch.zeros_like(inner.on_image())
            assert inner.grid is not None
            cells = inner.grid.cells.expand(inner.values.shape[1:])
            for row in range(inner.grid.rows):
                for column in range(inner.grid.columns):
                    here = cells == row * inner.grid.columns + column
                    want[0, row, column] = inner.values[0][here].sum()
            torch.testing.assert_close(inner.on_image(), want, rtol=1e-4, atol=1e-6)


class Mixing(nn.Module):
    """Attention spelled out in two ways, tokens mixed by a layer of their own, and a mean token in front."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.patches, self.head = way, nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)
        self.qkv, self.mix = nn.Linear(6, 18), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patches(x).flatten(2).transpose(1, 2)
        if self.way == "mean token":
            t = torch.cat([t.mean(1, keepdim=True), t], 1)
        if self.way == "mixer":
            t = t + self.mix(t.transpose(1, 2)).transpose(1, 2)
        else:
            q, k, v = self.qkv(t).chunk(3, -1)
            if self.way == "einsum":
                weights = torch.einsum("bic,bjc->bij", q, k).softmax(-1)
                t = t + torch.einsum("bij,bjc->bic", weights, v)
            else:
                t = t + (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.head(torch.relu(t)).mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("way", "outside"), [("matmul", 0), ("einsum", 0), ("mixer", 0), ("mean token", 1)])
def test_other_ways_to_mix_tokens(way: str, outside: int) -> None:
    network = captured(Mixing(way).eval(), (12, 16))
    grids = Grids(network)
    (head,) = [n for n in network.calls() if n.meta["layer"] == "head"]
    grid = grids.of(head.name)
    assert isinstance(grid, Grid)
    assert (grid.rows, grid.columns) == (3, 4)
    cells = grid.cells.flatten().tolist()
    assert cells == [-1] * outside + list(range(12))
    if way == "mixer":
        (mix,) = [n for n in network.calls() if n.meta["layer"] == "mix" and op_name(n) == "linear"]
        assert grids.of(mix.name) is None, "what mixes all tokens stands nowhere in particular"
