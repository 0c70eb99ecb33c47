"""Textures and colours: what covers a shape. Nothing here knows the class of the shape."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from models.zoo.objects.geometry import Canvas, Field, Patch

Colours = NDArray[np.float32]  # 3, or N x 3; in 0..1
Texture = Callable[[np.random.Generator, int, int], Field]  # (rng, height, width) -> field in 0..1

RELIEF = 2.2  # strength of the lit and shaded edges
RELIEF_BLUR = 1.6  # width of those edges in pixels
LUMA = np.array([0.30, 0.59, 0.11], dtype=np.float32)
EVENLY = np.full(3, 1 / 3, dtype=np.float32)
WHEEL_OFFSETS = np.array([0.0, 4.0, 2.0])  # of red, green and blue on a hue circle of length 6


def _grid(rng: np.random.Generator, height: int, width: int) -> tuple[Field, Field]:
    """Coordinates in pixels, turned by a random angle and shifted by a random phase."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    phase = rng.uniform(0.0, 64.0, 2).astype(np.float32)
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    return x * cos + y * sin + phase[0], y * cos - x * sin + phase[1]


def _soft_step(wave: Field, pitch: float) -> Field:
    """A wave in -1..1 as two flat levels with an edge about one pixel wide."""
    level: Field = np.clip(wave * np.float32(pitch / 6.0) + np.float32(0.5), 0.0, 1.0)
    return level


def plain(rng: np.random.Generator, height: int, width: int) -> Field:
    return np.full((height, width), rng.uniform(0.0, 1.0), dtype=np.float32)


def stripes(rng: np.random.Generator, height: int, width: int) -> Field:
    pitch = rng.uniform(5.0, 12.0)
    along, _ = _grid(rng, height, width)
    return _soft_step(np.sin(along * np.float32(2.0 * np.pi / pitch)), pitch)


def waves(rng: np.random.Generator, height: int, width: int) -> Field:
    pitch = rng.uniform(6.0, 12.0)
    along, across = _grid(rng, height, width)
    bend = np.float32(rng.uniform(1.0, 2.5)) * np.sin(across * np.float32(2.0 * np.pi / (2.5 * pitch)))
    return _soft_step(np.sin((along + bend) * np.float32(2.0 * np.pi / pitch)), pitch)


def checks(rng: np.random.Generator, height: int, width: int) -> Field:
    pitch = rng.uniform(8.0, 16.0)
    along, across = _grid(rng, height, width)
    scale = np.float32(2.0 * np.pi / pitch)
    return _soft_step(np.sin(along * scale) * np.sin(across * scale), 2.0 * pitch)


def dots(rng: np.random.Generator, height: int, width: int) -> Field:
    pitch = rng.uniform(6.0, 11.0)
    along, across = _grid(rng, height, width)
    scale = np.float32(2.0 * np.pi / pitch)
    wave = (np.cos(along * scale) + np.cos(across * scale)) * np.float32(0.5)
    return _soft_step(wave - np.float32(rng.uniform(0.1, 0.4)), pitch)


def gradient(rng: np.random.Generator, height: int, width: int) -> Field:
    along, _ = _grid(rng, height, width)
    low, high = along.min(), along.max()
    ramp: Field = (along - low) / (high - low)
    return ramp


def noise(rng: np.random.Generator, height: int, width: int) -> Field:
    """Two scales of smooth noise."""
    cell = rng.uniform(3.0, 7.0)
    coarse = smooth_noise(rng, height, width, cell * 2.0)
    fine = smooth_noise(rng, height, width, cell * 0.8)
    return np.clip(np.float32(0.65) * coarse + np.float32(0.35) * fine, 0.0, 1.0)


TEXTURES: Mapping[str, Texture] = MappingProxyType(
    {
        "checks": checks,
        "dots": dots,
        "gradient": gradient,
        "noise": noise,
        "plain": plain,
        "stripes": stripes,
        "waves": waves,
    }
)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Field:
    """Random values on a coarse lattice, interpolated; `cell` is the lattice constant in pixels."""
    rows, columns = max(2, round(height / cell)), max(2, round(width / cell))
    lattice = rng.random((rows, columns), dtype=np.float32)
    plate = Image.fromarray(lattice).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(plate, dtype=np.float32)


def any_texture(rng: np.random.Generator, height: int, width: int) -> Field:
    names = tuple(TEXTURES)
    return TEXTURES[names[int(rng.integers(len(names)))]](rng, height, width)


def colours(
    rng: np.random.Generator, count: int, saturation: tuple[float, float], value: tuple[float, float]
) -> Colours:
    """Random hues with saturation and value in the given ranges (the HSV hexcone), one per row."""
    hue, grey, bright = rng.random((3, count, 1))
    wheel = np.clip(np.abs((hue * 6.0 + WHEEL_OFFSETS) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    tint = 1.0 - (saturation[0] + grey * (saturation[1] - saturation[0])) * (1.0 - wheel)
    return np.asarray(tint * (value[0] + bright * (value[1] - value[0])), dtype=np.float32)


def per_pixel(tone: Colours) -> Colours:
    """A single colour, shaped to broadcast over a canvas."""
    return tone[:, None, None]


def palette(rng: np.random.Generator, behind: Colours, candidates: int = 6) -> tuple[Colours, Colours]:
    """Two colours that stand out from what lies behind: the best of a few random pairs."""
    first = colours(rng, candidates, (0.45, 1.0), (0.55, 1.0))
    second = colours(rng, candidates, (0.2, 0.9), (0.3, 1.0))
    best = int(np.minimum(_distance(first, behind), _distance(second, behind)).argmax())
    return first[best], second[best]


def _distance(tones: Colours, other: Colours) -> Colours:
    """Differences roughly as the eye weighs them: brightness counts more than hue."""
    step = tones - other
    return np.asarray(np.abs(step) @ EVENLY + np.float32(1.5) * np.abs(step @ LUMA), dtype=np.float32)


def relief(coverage: Field, light: float) -> Field:
    """Lit edges towards the light and shaded ones away from it, as on a slightly raised piece."""
    plate = Image.fromarray(np.asarray(coverage * 255, dtype=np.uint8))
    soft = np.asarray(plate.filter(ImageFilter.GaussianBlur(RELIEF_BLUR)), dtype=np.float32) / np.float32(255)
    lit = np.zeros_like(soft)
    lit[:, 1:-1] += np.float32(np.cos(light) * 0.5) * (soft[:, :-2] - soft[:, 2:])
    lit[1:-1, :] += np.float32(np.sin(light) * 0.5) * (soft[:-2, :] - soft[2:, :])
    return np.asarray(lit * np.float32(-RELIEF), dtype=np.float32)


def painted(canvas: Canvas, patch: Patch, rng: np.random.Generator, light: float) -> Canvas:
    """The part of the canvas in the patch's window, with a textured, slightly raised piece on it.

    Only covered pixels change: there is no shadow, so nothing outside of an object's mask tells of it.
    """
    rows, columns = patch.window
    below = canvas[:, rows, columns]
    height, width = patch.coverage.shape
    first, second = palette(rng, below.reshape(3, -1).mean(axis=1))
    blend = any_texture(rng, height, width)
    surface = per_pixel(first) + per_pixel(second - first) * blend + relief(patch.coverage, light)
    return below + (np.clip(surface, 0.0, 1.0) - below) * patch.coverage


def paint_over(canvas: Canvas, patches: Iterable[Patch], rng: np.random.Generator, light: float) -> Canvas:
    """A copy of the canvas with the pieces painted over it in the given order."""
    result = canvas.copy()
    for patch in patches:
        rows, columns = patch.window
        result[:, rows, columns] = painted(result, patch, rng, light)
    return result
