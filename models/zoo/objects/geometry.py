"""Outlines, poses, and their anti-aliased rendering into coverage patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Points = NDArray[np.float64]  # N x 2: x to the right, y down
Field = NDArray[np.float32]  # H x W
Canvas = NDArray[np.float32]  # 3 x H x W, in 0..1: colour first, so that a field broadcasts along rows

OVERSAMPLING = 4  # sub-pixels per pixel and axis: 17 levels of coverage along a straight edge
PATCH_BORDER = 2  # pixels of zero coverage around an object, so that its relief has an outside


@dataclass(frozen=True)
class Outline:
    """Filled rims minus holes, in a coordinate system where the shape fits into the unit circle."""

    rims: tuple[Points, ...]
    holes: tuple[Points, ...] = ()


@dataclass(frozen=True)
class Pose:
    """Where a unit outline goes: centre and radius in pixels, angle in radians, width over height."""

    x: float
    y: float
    radius: float
    angle: float
    aspect: float = 1.0


@dataclass(frozen=True)
class Patch:
    """Coverage (0..1 per pixel) of a shape, cut out of the image at `top`, `left`."""

    top: int
    left: int
    coverage: Field

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.coverage.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def points(pairs: Sequence[tuple[float, float]]) -> Points:
    return np.asarray(pairs, dtype=np.float64)


def arc(
    radius: float, start: float, stop: float, steps: int, centre: tuple[float, float] = (0.0, 0.0)
) -> Points:
    """Points on a circle, from angle `start` to `stop` (radians), both included."""
    angle = np.linspace(start, stop, steps)
    return np.stack([np.cos(angle) * radius + centre[0], np.sin(angle) * radius + centre[1]], axis=1)


def circle(radius: float, steps: int = 48, centre: tuple[float, float] = (0.0, 0.0)) -> Points:
    return arc(radius, 0.0, 2.0 * np.pi * (1.0 - 1.0 / steps), steps, centre)


def fit(outline: Outline) -> Outline:
    """Centre the outline and scale it so that its farthest point lies on the unit circle.

    Without this a class could be told by its size or by its offset from the centre of its pose.
    """
    corners = np.concatenate(outline.rims)
    centre = (corners.min(axis=0) + corners.max(axis=0)) / 2.0
    reach = float(np.sqrt(((corners - centre) ** 2).sum(axis=1)).max())
    return Outline(
        tuple((rim - centre) / reach for rim in outline.rims),
        tuple((hole - centre) / reach for hole in outline.holes),
    )


def place(outline: Outline, pose: Pose) -> Outline:
    """Move a unit outline into pixel coordinates. The aspect keeps the area."""
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    stretch = np.diag([np.sqrt(pose.aspect), 1.0 / np.sqrt(pose.aspect)])
    turn = np.array([[cos, sin], [-sin, cos]])
    matrix = pose.radius * (stretch @ turn)
    centre = np.array([pose.x, pose.y])
    return Outline(
        tuple(rim @ matrix + centre for rim in outline.rims),
        tuple(hole @ matrix + centre for hole in outline.holes),
    )


def rasterize(outline: Outline, size: int) -> Patch:
    """Render an outline in pixel coordinates as coverage, clipped to a `size` x `size` image."""
    corners = np.concatenate(outline.rims)
    low = np.clip(np.floor(corners.min(axis=0)) - PATCH_BORDER, 0, size - 1).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)) + PATCH_BORDER, low + 1, size).astype(int)
    width, height = (int(edge) for edge in high - low)
    plate = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING), 0)
    draw = ImageDraw.Draw(plate)
    for polygons, ink in ((outline.rims, 255), (outline.holes, 0)):
        for polygon in polygons:
            # Pillow addresses sub-pixel centres, hence the half.
            corner_list = (polygon - low) * OVERSAMPLING - 0.5
            draw.polygon(list(map(tuple, corner_list.tolist())), fill=ink)
    coverage = np.asarray(plate.reduce(OVERSAMPLING), dtype=np.float32) / np.float32(255)
    return Patch(top=int(low[1]), left=int(low[0]), coverage=coverage)
