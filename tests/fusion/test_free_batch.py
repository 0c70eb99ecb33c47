"""Programs that were exported for one batch size run with any, and compute what the network computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fusion
import lrp
import models
from fusion.errors import CaptureError
from fusion.free_batch import keeps_apart
from fusion.targets import expanded, reshaped

F64 = torch.float64


class Tokens(nn.Module):
    """A vision transformer's parts: a class token, positions, attention with as many heads as there are images."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], 1) + self.places
        z = self.norm(y)
        return self.head((y + self.attention(z, z, z)[0])[:, 0])  # type: ignore[no-any-return]


class Windows(nn.Module):
    """Attention within windows, as Swin has it: windows and images share an axis; a bias by window."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.head = nn.Conv2d(3, 6, 3, 1, 1), nn.Linear(6, 18), nn.Linear(6, 5)
        self.bias = nn.Parameter(torch.randn(9, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        y = y.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)).view(b, 9, 2, 16, 16) + self.bias
        y = (scores.view(-1, 2, 16, 16).softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class Shuffle(nn.Module):
    """Channels that change places, tensors that are made by size, a mask that holds something for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Linear(6 * 25 + 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        y = self.norm(self.conv(x))
        y = y.reshape(b, 2, 3, 10, 10).transpose(1, 2).reshape(b, 6, 10, 10)
        y = torch.where(torch.ones(b, 1, 1, 1, dtype=torch.bool), y, -y).relu()
        y = nn.functional.avg_pool2d(y, 2).flatten(1)
        return self.head(torch.cat([y.new_full((b, 3), 0.5), torch.zeros(b, 1, dtype=y.dtype), y], 1))  # type: ignore[no-any-return]


class Sequences(nn.Module):
    """The batch as the second axis, as older attention and recurrent layers have it, joined with the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).permute(2, 0, 1)
        steps, b, c = y.shape
        z = self.inner(y.reshape(steps * b, c)).relu().view(steps, b, 2, 3)
        y = y + z.transpose(2, 3).reshape(steps, b, c)
        return self.head(y.mean(0))  # type: ignore[no-any-return]


class Heads(nn.Module):
    """Targets whose batch could be in several places, if there is one image: only what follows tells where. Heads that
    share the axis of the images (SAM), an axis of one that is expanded (BoTNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.qkv, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 18), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2)
        b, n, c = y.shape
        q, k, v = self.qkv(y).reshape(b, n, 3, 2, 3).permute(2, 0, 3, 1, 4).reshape(3, b * 2, n, 3).unbind(0)
        scores = (q @ k.transpose(-2, -1)).reshape(b * 2, 3, 1, 3, n)
        bias = (q.reshape(b * 2, 3, 3, 3) @ self.head.weight.T[:3, :3]).reshape(b * 2, 3, 1, 3, 3)
        bias = bias.expand(-1, -1, 3, -1, -1).permute(0, 1, 3, 2, 4).reshape(b * 2, 3, 1, 3, n)
        y = ((scores + bias).reshape(b * 2, n, n).softmax(-1) @ v).reshape(b, 2, n, 3)
        return self.head(y.transpose(1, 2).reshape(b, n, c).mean(1))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tokens": Tokens,
    "windows": Windows,
    "shuffle": Shuffle,
    "sequences": Sequences,
    "heads": Heads,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double().eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 12, 12, dtype=F64, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_answers_for_any_number_of_images(name: str, batch: int, strict: bool) -> None:
    module = made(name)
    network = fusion.from_exported(torch.export.export(module, (images(batch),), strict=strict))
    assert network.outputs[0].shape == (None, 5)
    for count in (1, 2, 5):
        with torch.no_grad():
            torch.testing.assert_close(network(images(count)), module(images(count)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_its_heatmaps_are_those_of_the_network(name: str, batch: int) -> None:
    module, x = made(name), images(3)
    program = torch.export.export(module, (images(batch),))
    want, got = (
        lrp.Explainer(fusion.fuse(network).network, composite="auto", dtype=F64).explain(x, 1)
        for network in (fusion.capture(module, (x,)), fusion.from_exported(program))
    )
    torch.testing.assert_close(got.relevance, want.relevance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_file_is_held_against_itself_image_by_image(batch: int, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(made("tokens").float(), (images(batch).float(),)), path)
    opened = models.open(path)
    assert fusion.certify(opened.original, opened.network, [images(3).float()]).max_relative < 1e-5


def test_a_place_for_the_batch_that_fits_and_is_wrong_is_refused() -> None:
    class Hidden(nn.Module):
        """Traced for one image: [5, images, 1] might as well become [5 * images] as [images * 5]."""

        def forward(self, x: Tensor) -> Tensor:
            y = x.mean((2, 3)).reshape(x.shape[0], 3, 1).permute(1, 0, 2).reshape(1, 3 * x.shape[0])
            return y.reshape(x.shape[0], 3).flip(1).cumsum(1)

    with pytest.raises(CaptureError, match="batch of 1"):
        fusion.from_exported(torch.export.export(Hidden(), (images(1),)))


def test_images_that_are_mixed_up_are_noticed() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).roll(1, 0) + x.flatten(1)

    assert keeps_apart(fusion.capture(made("tokens"), (images(2),)))
    assert not keeps_apart(fusion.capture(Mixing(), (images(2),)))


def test_what_picks_images_is_refused() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:1].mean((2, 3))

    with pytest.raises(CaptureError, match="does not follow the batch size"):
        fusion.from_exported(torch.export.export(First(), (images(2),)))


def test_a_constant_that_differs_from_image_to_image_is_refused() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("numbers", torch.arange(2.0, dtype=F64)[:, None])

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) + self.numbers

    with pytest.raises(CaptureError, match="one size only"):
        fusion.from_exported(torch.export.export(Numbered(), (images(2),)))


@st.composite
def regrouped(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], int]:
    """Sizes of which one (0) is the batch, grouped in two ways into axes."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=0, max_size=5))
    sizes.insert(draw(st.integers(0, len(sizes))), 0)

    def grouped() -> list[list[int]]:
        groups: list[list[int]] = [[]]
        for size in sizes:
            if groups[-1] and draw(st.booleans()):
                groups.append([])
            groups[-1].append(size)
        return groups

    return grouped(), grouped(), next(i for i, size in enumerate(sizes) if size == 0)


def at(groups: list[list[int]], batch: int) -> list[int]:
    return [math.prod(size or batch for size in group) for group in groups]


@given(regrouped(), st.booleans())
def test_a_target_follows_the_batch_wherever_it_is(
    drawn: tuple[list[list[int]], list[list[int]], int], one_is_left_open: bool
) -> None:
    source, target, _ = drawn
    declared = 7  # a factor that no size has
    axis = next(i for i, group in enumerate(source) if 0 in group)
    where = next(i for i, group in enumerate(target) if 0 in group)
    inner = [size for size in source[axis] if size]
    if inner and source[axis][0] != 0 and source[axis][-1] != 0 and math.prod(inner) > 1:
        return  # images in the middle of an axis: nobody writes that
    wanted = at(target, declared)
    if one_is_left_open and len(wanted) > 1:
        wanted[(where + 1) % len(wanted)] = -1
    found = reshaped(wanted, at(source, 1), axis, declared)
    assert found is not None
    full, (place, *_) = found
    for batch in (1, 2, 7):
        now = [size // declared * batch if i == place else size for i, size in enumerate(full)]
        assert now == at(target, batch)


def test_a_target_that_leaves_the_batch_open_is_left_alone() -> None:
    assert reshaped([-1, 12], [3, 4], 0, 2) is None
    assert reshaped([0, 12], [1, 3, 4], 0, 2, zero_copies=True) is None
    assert expanded([-1, 5, 8], [1, 1, 8], 0, 2) is None
    assert expanded([2, 5, 8], [1, 1, 8], 0, 2) == 0


def test_one_image_keeps_its_axis_among_those_of_size_one(tmp_path: Path) -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).squeeze()

    module = Squeezed().double().eval()
    network = fusion.from_exported(torch.export.export(module, (images(1),)))
    with torch.no_grad():
        torch.testing.assert_close(network(images(1))[0], module(images(1)))
        torch.testing.assert_close(network(images(3)), module(images(3)))


def test_a_module_that_counts_its_images_is_captured() -> None:
    """`len(x)` is a number to the tracer."""

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x), 3, -1).mean(-1)

    network = fusion.capture(Counting(), (images(1),))
    torch.testing.assert_close(network(images(4)), Counting()(images(4)))


class Written(nn.Module):
    """A trace for `count` images, in which their number is written down."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.token = nn.Parameter(torch.randn(1, 1, 6, dtype=F64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(self.count, -1, 6)
        return torch.cat([self.token.expand(self.count, -1, -1), y], 1).softmax(1).mean(1)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_module_for_one_number_of_images_is_captured_for_any(count: int) -> None:
    network = fusion.capture(Written(count), (images(count),))
    for other in (1, 2, 3):
        torch.testing.assert_close(network(images(other)), Written(other)(images(other)))
