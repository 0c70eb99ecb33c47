"""Relevance as colours: symmetric around zero, the same colours as the server's."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray


def _stops(colors: str) -> NDArray[np.float64]:
    rows = [[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in colors.split()]
    return np.array(rows, dtype=np.float64)


# Evenly spaced colours, from the most negative relevance to the most positive.
COLORMAPS: Mapping[str, NDArray[np.float64]] = MappingProxyType(
    {
        "bwr": _stops("0000ff ffffff ff0000"),
        "seismic": _stops("00004d 0000ff ffffff ff0000 800000"),
        "coldnhot": _stops("00ffff 0000ff 000000 ff0000 ffff00"),
        "hot": _stops("000000 000000 000000 ff0000 ffff00 ffffff ffffff"),
        "gray": _stops("000000 7f7f7f ffffff"),
        "wred": _stops("ffffff ffffff ff0000"),
        "france": _stops("0000ff ffffff ff0000"),
        "puor": _stops("7f3b08 f1a340 f7f7f7 998ec3 2d004b"),
    }
)


def colorize(heatmap: NDArray[np.float32], cmap: str = "bwr", clip: float = 99.5) -> NDArray[np.uint8]:
    """[H, W] relevance to [H, W, 3] colours; the `clip` percentile of |relevance| gets the full colour."""
    if cmap not in COLORMAPS:
        raise ValueError(f"there is no colour map {cmap!r}: choose one of {', '.join(COLORMAPS)}")
    stops = COLORMAPS[cmap]
    limit = float(np.percentile(np.abs(heatmap), clip)) or float(np.abs(heatmap).max()) or 1.0
    place = (np.clip(heatmap / limit, -1, 1) + 1) / 2
    at = np.linspace(0, 1, len(stops))
    colored = np.stack([np.interp(place, at, stops[:, channel]) for channel in range(3)], axis=-1)
    return np.asarray(np.rint(colored), dtype=np.uint8)


def blend(image: NDArray[np.uint8], colored: NDArray[np.uint8], opacity: float) -> NDArray[np.uint8]:
    """Colours over an image of the same size, which is shown in gray, so that only relevance has colour."""
    gray = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return np.asarray(np.rint((1 - opacity) * gray[..., None] + opacity * colored), dtype=np.uint8)
