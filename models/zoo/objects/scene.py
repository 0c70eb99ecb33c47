"""Cluttered backgrounds: colour gradients, noise at several scales, patches, lines, blobs, distractors."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from models.zoo.objects.geometry import Canvas, Outline, Patch, Pose, fit, place, rasterize
from models.zoo.objects.shapes import DISTRACTORS
from models.zoo.objects.surfaces import any_texture, colours, per_pixel, smooth_noise

DISTRACTOR_RADIUS = (5.0, 13.0)  # pixels: well below the smallest object
DISTRACTOR_COUNT = (3, 8)
CLUTTER_OVERSAMPLING = 2
NOISE_CELLS = (32.0, 12.0, 5.0, 2.0)  # pixels

Stroke = Callable[[np.random.Generator, ImageDraw.ImageDraw, int, tuple[int, int, int, int]], None]


def background(rng: np.random.Generator, size: int) -> Canvas:
    """A base of colours with noise, faint textured patches and clutter; no distractors yet."""
    canvas = _patches(rng, _noise(rng, _base(rng, size)))
    return _clutter(rng, canvas)


def distractors(rng: np.random.Generator, size: int) -> tuple[Patch, ...]:
    """Small pieces that belong to no class."""
    names = tuple(DISTRACTORS)
    count = int(rng.integers(DISTRACTOR_COUNT[0], DISTRACTOR_COUNT[1] + 1))
    shapes = (DISTRACTORS[names[choice]] for choice in rng.integers(len(names), size=count))
    return tuple(
        rasterize(place(fit(shape(rng)), _anywhere(rng, size, DISTRACTOR_RADIUS)), size) for shape in shapes
    )


def _anywhere(rng: np.random.Generator, size: int, radius: tuple[float, float]) -> Pose:
    x, y = rng.uniform(0.0, size, 2).tolist()
    angle = rng.uniform(0.0, 2.0 * np.pi)
    return Pose(x, y, rng.uniform(*radius), angle, rng.uniform(0.8, 1.25))


def _base(rng: np.random.Generator, size: int) -> Canvas:
    """Smooth colour gradients between a few corner colours of one overall brightness."""
    value = rng.uniform(0.2, 0.85)
    near = (max(0.05, value - 0.2), min(1.0, value + 0.15))
    cells = int(rng.integers(2, 4))
    tones = colours(rng, cells * cells, (0.05, 0.6), near)
    plate = Image.fromarray(np.asarray(tones.reshape(cells, cells, 3) * 255, dtype=np.uint8))
    return _planes(plate.resize((size, size), Image.Resampling.BICUBIC))


def _planes(plate: Image.Image) -> Canvas:
    return np.ascontiguousarray(np.asarray(plate).transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def _noise(rng: np.random.Generator, canvas: Canvas) -> Canvas:
    size = canvas.shape[1]
    strength = rng.uniform(0.1, 0.35)
    total = sum(
        (smooth_noise(rng, size, size, cell) - np.float32(0.5)) * np.float32(strength * weight)
        for cell, weight in zip(NOISE_CELLS, rng.uniform(0.2, 1.0, len(NOISE_CELLS)), strict=True)
    )
    # A slight tint per image keeps the noise from being grey everywhere.
    tint = rng.uniform(0.7, 1.3, 3).astype(np.float32)
    return np.clip(canvas + np.asarray(total) * per_pixel(tint), 0.0, 1.0)


def _patches(rng: np.random.Generator, canvas: Canvas) -> Canvas:
    """Large faint textured quadrilaterals."""
    size = canvas.shape[1]
    result = canvas.copy()
    for _ in range(int(rng.integers(1, 4))):
        angles = np.sort(rng.uniform(0.0, 2.0 * np.pi, 4))
        spread = rng.uniform(0.6, 1.0, 4)
        quad = Outline((np.stack([np.cos(angles) * spread, np.sin(angles) * spread], axis=1),))
        patch = rasterize(place(quad, _anywhere(rng, size, (20.0, 55.0))), size)
        rows, columns = patch.window
        field = any_texture(rng, *patch.coverage.shape)
        step = colours(rng, 1, (0.2, 0.8), (0.3, 1.0))[0] - np.float32(0.5)
        change = np.float32(rng.uniform(0.15, 0.4)) * field * patch.coverage
        result[:, rows, columns] += change * per_pixel(step)
    return np.clip(result, 0.0, 1.0)


def _line(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, ink: tuple[int, int, int, int]
) -> None:
    x0, y0, x1, y1 = rng.uniform(-0.1, 1.1, 4) * side
    draw.line((x0, y0, x1, y1), fill=ink, width=int(rng.integers(2, 6)))


def _bent_line(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, ink: tuple[int, int, int, int]
) -> None:
    start = rng.uniform(0.0, 1.0, 2)
    steps = rng.normal(0.0, 0.16, (3, 2))
    route = (np.concatenate([start[None], start + np.cumsum(steps, axis=0)]) * side).ravel().tolist()
    draw.line(route, fill=ink, width=int(rng.integers(2, 5)), joint="curve")


def _blob(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, ink: tuple[int, int, int, int]
) -> None:
    x, y = rng.uniform(0.0, side, 2)
    a, b = rng.uniform(0.015, 0.05, 2) * side
    draw.ellipse((x - a, y - b, x + a, y + b), fill=ink)


STROKES: tuple[Stroke, ...] = (_line, _bent_line, _blob)


def _clutter(rng: np.random.Generator, canvas: Canvas) -> Canvas:
    """Thin lines and small blobs.

    They are drawn opaque on a black plate whose fourth channel is coverage, so the average over
    sub-pixels is a colour already multiplied by its own coverage. The mode is RGBX because Pillow
    undoes that product for RGBA.
    """
    size = canvas.shape[1]
    side = size * CLUTTER_OVERSAMPLING
    plate = Image.new("RGBX", (side, side))
    draw = ImageDraw.Draw(plate)
    inks = (colours(rng, int(rng.integers(3, 11)), (0.1, 0.8), (0.1, 1.0)) * 255).astype(int).tolist()
    for red, green, blue in inks:
        STROKES[int(rng.integers(len(STROKES)))](rng, draw, side, (red, green, blue, 255))
    layer = _planes(plate.reduce(CLUTTER_OVERSAMPLING))
    opacity = np.float32(rng.uniform(0.35, 0.8))
    cluttered: Canvas = canvas + opacity * (layer[:3] - canvas * layer[3])
    return cluttered
