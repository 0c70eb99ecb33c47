"""Pictures: zero has the colour map's middle, and no sign or scale is invented."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusion.errors import BadInput
from lrp.heatmap import COLORMAPS, colorize, overlay, pool


def test_pooling_sums_over_channels() -> None:
    relevance = torch.randn(3, 4, 5)
    np.testing.assert_allclose(pool(relevance), relevance.sum(0).numpy())


def test_signs_have_their_colours() -> None:
    heat = np.array([[-2.0, 0.0, 2.0]])
    assert colorize(heat, "bwr", clip=100).tolist() == [[[0, 0, 255], [255, 255, 255], [255, 0, 0]]]


@pytest.mark.parametrize("cmap", COLORMAPS)
def test_zero_is_the_middle_whatever_the_range(cmap: str) -> None:
    heat = np.array([[-1.0, 0.0, 100.0]])
    stops = COLORMAPS[cmap]
    assert colorize(heat, cmap)[0, 1].tolist() == list(stops[len(stops) // 2])


def test_a_map_of_zeros_is_the_middle_colour() -> None:
    assert (colorize(np.zeros((4, 4))) == 255).all()


def test_clipping_keeps_one_pixel_from_hiding_the_rest() -> None:
    heat = np.full((10, 10), 1.0)
    heat[0, 0] = 1000.0
    assert colorize(heat, "bwr", clip=90)[5, 5].tolist() == [255, 0, 0]
    assert colorize(heat, "bwr", clip=100)[5, 5].tolist() == [255, 255, 255]


def test_an_overlay_without_opacity_is_the_gray_image() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    assert (overlay(image, np.ones((2, 2)), opacity=0.0) == 100).all()


@pytest.mark.parametrize("call", [
    lambda: colorize(np.zeros((2, 2)), "rainbow"),
    lambda: colorize(np.zeros((2, 2)), clip=0),
    lambda: overlay(np.zeros((3, 2, 3), np.uint8), np.zeros((2, 2))),
    lambda: overlay(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2)), opacity=2.0),
    lambda: pool(torch.zeros(2, 2)),
])  # fmt: skip
def test_wrong_arguments_are_named(call: object) -> None:
    with pytest.raises(BadInput):
        call()  # type: ignore[operator]
