"""From relevance to pictures: pooling over channels, colour maps centred on zero, overlays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fusion.errors import BadInput

Floats = npt.NDArray[np.floating]
Pixels = npt.NDArray[np.uint8]

# Colour stops from the most negative over zero to the most positive value, evenly spaced, RGB from 0 to 255.
COLORMAPS: dict[str, Sequence[tuple[int, int, int]]] = {
    "bwr": ((0, 0, 255), (255, 255, 255), (255, 0, 0)),
    "seismic": ((0, 0, 77), (0, 0, 255), (255, 255, 255), (255, 0, 0), (128, 0, 0)),
    "coldnhot": ((0, 255, 255), (0, 0, 255), (0, 0, 0), (255, 0, 0), (255, 255, 0)),
    "hot": ((0, 0, 0), (0, 0, 0), (0, 0, 0), (255, 0, 0), (255, 255, 0), (255, 255, 255), (255, 255, 255)),
    "gray": ((0, 0, 0), (127, 127, 127), (255, 255, 255)),
    "wred": ((255, 255, 255), (255, 255, 255), (255, 0, 0)),
    "france": ((0, 0, 255), (255, 255, 255), (255, 0, 0)),
    "puor": ((127, 59, 8), (241, 163, 64), (247, 247, 247), (153, 142, 195), (45, 0, 75)),
}


def pool(relevance: Tensor | Floats) -> Floats:
    """Relevance per pixel: [C, H, W] summed over channels to [H, W]."""
    array = (
        relevance.detach().float().cpu().numpy() if isinstance(relevance, Tensor) else np.asarray(relevance)
    )
    if array.ndim != 3:
        raise BadInput(f"Relevance of one image is [C, H, W], not {list(array.shape)}.")
    return np.asarray(array.sum(0))


def scale_of(heat: Floats, clip: float = 99.5) -> float:
    """The value shown in full colour: the `clip`-th percentile of the absolute values, or their maximum where that
    percentile is 0; 1 for a map of zeros."""
    if not 0 < clip <= 100:
        raise BadInput(f"clip is a percentile between 0 and 100, not {clip}.")
    magnitudes = np.abs(heat)
    return float(np.percentile(magnitudes, clip)) or float(magnitudes.max()) or 1.0


def colorize(heat: Floats, cmap: str = "bwr", clip: float = 99.5, gain: float = 1.0) -> Pixels:
    """A map [H, W] as RGB [H, W, 3], symmetric around zero: the middle of the colour map is exactly 0.

    clip: the percentile of absolute values that is shown in full colour. gain: multiplies values before colouring.
    """
    if cmap not in COLORMAPS:
        raise BadInput(f"There is no colour map '{cmap}'. The colour maps are: {', '.join(COLORMAPS)}.")
    stops = np.asarray(COLORMAPS[cmap], dtype=np.float64)
    position = (np.clip(np.asarray(heat, dtype=np.float64) * gain / scale_of(heat, clip), -1, 1) + 1) / 2
    x = np.linspace(0, 1, len(stops))
    channels = [np.interp(position, x, stops[:, i]) for i in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def overlay(
    image: Pixels,
    heat: Floats,
    opacity: float = 0.6,
    cmap: str = "bwr",
    clip: float = 99.5,
    gain: float = 1.0,
) -> Pixels:
    """The coloured map over an image [H, W, 3] of the same size; the image is shown in gray so that only relevance
    has colour."""
    if image.shape[:2] != heat.shape:
        raise BadInput(
            f"The image is {image.shape[:2]}, the map {heat.shape}; give the image that the network saw."
        )
    if not 0 <= opacity <= 1:
        raise BadInput(f"opacity is between 0 and 1, not {opacity}.")
    gray = image.astype(np.float64) @ np.asarray([0.299, 0.587, 0.114])
    blended = (1 - opacity) * gray[..., None] + opacity * colorize(heat, cmap, clip, gain)
    return np.asarray(np.rint(blended), dtype=np.uint8)
