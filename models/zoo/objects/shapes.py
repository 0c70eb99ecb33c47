"""Outlines of the object classes, and of the class-less pieces used as distractors."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from models.zoo.objects.geometry import Outline, arc, circle, points

ShapeFunction = Callable[[np.random.Generator], Outline]


def star(rng: np.random.Generator) -> Outline:
    """Five spikes."""
    inner = rng.uniform(0.36, 0.46)
    angle = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, inner)
    return Outline((np.stack([np.sin(angle) * radius, -np.cos(angle) * radius], axis=1),))


def ring(rng: np.random.Generator) -> Outline:
    """A circle with a wide circular hole."""
    return Outline((circle(1.0, 64),), (circle(rng.uniform(0.5, 0.68), 48),))


def cross(rng: np.random.Generator) -> Outline:
    """Two bars of equal length at a right angle."""
    half = rng.uniform(0.2, 0.3)
    quarter = points([(half, -half), (half, -1.0), (-half, -1.0)])
    turns = [np.array([[0.0, 1.0], [-1.0, 0.0]]) for _ in range(4)]
    return Outline((np.concatenate([quarter @ np.linalg.matrix_power(t, -k) for k, t in enumerate(turns)]),))


def crescent(rng: np.random.Generator) -> Outline:
    """A disc with another disc bitten out of its side."""
    shift = rng.uniform(0.38, 0.55)
    bite = rng.uniform(0.76, 0.86)
    # Both circles meet at this x; the tips lie there.
    x = (1.0 - bite**2 + shift**2) / (2.0 * shift)
    y = np.sqrt(1.0 - x**2)
    outer = np.arctan2(y, x)
    inner = np.arctan2(y, x - shift)
    back = arc(1.0, outer, 2.0 * np.pi - outer, 48)
    front = arc(bite, 2.0 * np.pi - inner, inner, 40, (shift, 0.0))
    return Outline((np.concatenate([back, front]),))


def arrow(rng: np.random.Generator) -> Outline:
    """A shaft that ends in a triangular head."""
    shaft = rng.uniform(0.13, 0.22)
    head = rng.uniform(0.55, 0.7)
    neck = rng.uniform(-0.05, 0.2)
    upper = [(1.0, 0.0), (neck, -head), (neck, -shaft), (-1.0, -shaft)]
    lower = [(x, -y) for x, y in reversed(upper[1:])]
    return Outline((points(upper + lower),))


def heart(rng: np.random.Generator) -> Outline:
    """Two lobes over one tip."""
    angle = np.linspace(0.0, 2.0 * np.pi, 64, endpoint=False)
    x = 16.0 * np.sin(angle) ** 3
    notch = rng.uniform(4.5, 6.0)
    y = 13.0 * np.cos(angle) - notch * np.cos(2 * angle) - 2.0 * np.cos(3 * angle) - np.cos(4 * angle)
    return Outline((np.stack([x, -y], axis=1),))


def gear(rng: np.random.Generator) -> Outline:
    """A toothed wheel with a small bore."""
    teeth = int(rng.integers(8, 11))
    root = rng.uniform(0.72, 0.78)
    # One tooth: up the flank, along the tip, down the flank, along the root.
    phase = np.array([-0.27, -0.16, 0.16, 0.27])
    angle = (np.arange(teeth)[:, None] + phase).ravel() * 2.0 * np.pi / teeth
    radius = np.tile(np.array([root, 1.0, 1.0, root]), teeth)
    rim = np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)
    return Outline((rim,), (circle(rng.uniform(0.22, 0.32), 32),))


def bolt(rng: np.random.Generator) -> Outline:
    """A flash of lightning: two slanted wedges, offset at the middle."""
    step = rng.uniform(0.08, 0.16)
    width = rng.uniform(1.05, 1.3)
    upper = [(0.5, -1.0), (-0.05, -1.0), (-0.5, 0.15), (-0.08, step)]
    lower = [(-0.3, 1.0), (0.52, -0.28), (0.1, -step - 0.08)]
    return Outline((points([(x * width, y) for x, y in upper + lower]),))


def leaf(rng: np.random.Generator) -> Outline:
    """A pointed oval on a stem, with an open midrib."""
    half_width = rng.uniform(0.4, 0.5)
    along = np.linspace(0.0, 1.0, 40)
    side = half_width * np.sin(np.pi * along**0.85)
    y = 0.55 - 1.55 * along
    stem = rng.uniform(0.05, 0.07)
    right = np.stack([side, y], axis=1)[2:-1]
    left = right[::-1] * np.array([-1.0, 1.0])
    base = points([(-stem, 0.5), (-stem, 1.0), (stem, 1.0), (stem, 0.5)])
    rib = points([(0.0, -0.66), (0.06, 0.3), (-0.06, 0.3)])
    return Outline((np.concatenate([right, points([(0.0, -1.0)]), left, base]),), (rib,))


def spiral(rng: np.random.Generator) -> Outline:
    """A band that winds outwards around its own centre."""
    turns = rng.uniform(1.9, 2.3)
    half_band = rng.uniform(0.1, 0.125)
    angle = np.linspace(0.15, 1.0, 96) * turns * 2.0 * np.pi
    radius = (1.0 - half_band) * angle / angle[-1]
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # The band tapers at both ends, as a drawn stroke does.
    half = half_band * np.minimum(1.0, np.minimum(np.arange(96) + 3.0, 98.0 - np.arange(96)) / 8.0)
    outside = direction * (radius + half)[:, None]
    inside = direction * (radius - half)[:, None]
    return Outline((np.concatenate([outside, inside[::-1]]),))


OBJECTS: Mapping[str, ShapeFunction] = MappingProxyType(
    {
        "arrow": arrow,
        "bolt": bolt,
        "crescent": crescent,
        "cross": cross,
        "gear": gear,
        "heart": heart,
        "leaf": leaf,
        "ring": ring,
        "spiral": spiral,
        "star": star,
    }
)


def rectangle(rng: np.random.Generator) -> Outline:
    half = rng.uniform(0.35, 0.75)
    return Outline((points([(-1.0, -half), (1.0, -half), (1.0, half), (-1.0, half)]),))


def bar(rng: np.random.Generator) -> Outline:
    half = rng.uniform(0.1, 0.2)
    return Outline((points([(-1.0, -half), (1.0, -half), (1.0, half), (-1.0, half)]),))


def disc(rng: np.random.Generator) -> Outline:
    return Outline((circle(1.0, 40),))


def half_disc(rng: np.random.Generator) -> Outline:
    return Outline((arc(1.0, 0.0, np.pi, 24),))


def triangle(rng: np.random.Generator) -> Outline:
    lean = rng.uniform(-0.6, 0.6)
    return Outline((points([(-0.9, 0.7), (0.9, 0.7), (lean, -0.9)]),))


def trapezoid(rng: np.random.Generator) -> Outline:
    top = rng.uniform(0.3, 0.6)
    return Outline((points([(-1.0, 0.5), (1.0, 0.5), (top, -0.5), (-top, -0.5)]),))


def polygon(rng: np.random.Generator) -> Outline:
    return Outline((circle(1.0, int(rng.integers(5, 8))),))


def corner(rng: np.random.Generator) -> Outline:
    arm = rng.uniform(0.4, 0.7)
    inner = arm - 1.0
    pairs = [(-1.0, -1.0), (1.0, -1.0), (1.0, inner), (inner, inner), (inner, 1.0), (-1.0, 1.0)]
    return Outline((points(pairs),))


def pebble(rng: np.random.Generator) -> Outline:
    """An irregular rounded blob."""
    angle = np.linspace(0.0, 2.0 * np.pi, 40, endpoint=False)
    shifts = rng.uniform(0.0, 2.0 * np.pi, 2)
    radius = 1.0 + 0.16 * np.cos(2 * angle + shifts[0]) + 0.1 * np.cos(3 * angle + shifts[1])
    return Outline((np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1),))


DISTRACTORS: Mapping[str, ShapeFunction] = MappingProxyType(
    {
        "bar": bar,
        "corner": corner,
        "disc": disc,
        "half_disc": half_disc,
        "pebble": pebble,
        "polygon": polygon,
        "rectangle": rectangle,
        "trapezoid": trapezoid,
        "triangle": triangle,
    }
)
