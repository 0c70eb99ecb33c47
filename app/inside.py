"""What a request asks about a network's inside, and the answer: relevance at a layer, and through chosen channels."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import lrp
from fusion.errors import BadLayer


@dataclass(frozen=True)
class Inner:
    """The relevance at a layer for one image: `values` in the layer's layout, `axis` that of its channels; `on_image`
    by the rows and columns of the image that the values stand for, None where they stand for none."""

    layer: str
    values: NDArray[np.float32]
    axis: int
    on_image: NDArray[np.float32] | None

    @property
    def map(self) -> NDArray[np.float32]:
        """The relevance by rows and columns, or of every place, summed over the channels, where there are none."""
        if self.on_image is not None:
            return self.on_image
        return np.ascontiguousarray(self.values.sum(axis=self.axis))

    def picture(self, height: int, width: int) -> NDArray[np.float32]:
        """The map in the size of the image, every place a rectangle of it. Raises BadLayer where places are no grid."""
        places = self.on_image
        if places is None:
            raise BadLayer(
                f"'{self.layer}' has no places in rows and columns of the image (its relevance has shape "
                f"{list(self.values.shape)}), so there is no picture of it: ask for JSON or NPY."
            )
        rows, columns = (
            np.arange(n) * size // n for n, size in zip((height, width), places.shape, strict=True)
        )
        return np.ascontiguousarray(places[rows[:, None], columns[None, :]])


def described(relevance: lrp.InnerRelevance, top: int) -> tuple[Inner, dict[str, Any]]:
    """The relevance at a layer for the first image, as an array and in words."""
    values = _array(relevance.values[0])
    channels, amounts = (t[0].tolist() for t in relevance.top(top))
    on_image = None if relevance.grid is None else _array(relevance.on_image()[0])
    inner = Inner(relevance.layer, values, relevance.axis - 1, on_image)
    return inner, {
        "layer": inner.layer,
        "shape": list(values.shape),
        "axis": inner.axis,
        "channels": int(values.shape[inner.axis]),
        "sum": float(values.sum(dtype=np.float64)),
        "grid": None if on_image is None else list(on_image.shape),
        "outside": None if on_image is None else float(relevance.outside()[0]),
        "top": [{"channel": c, "relevance": r} for c, r in zip(channels, amounts, strict=True)],
    }


def _array(t: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(t.detach().float().cpu().numpy())


def channels_by_layer(text: str) -> dict[str, list[int]]:
    """`{"conv3": [3, 5], "conv2": 1}` as a mapping. Raises ValueError that says what is wrong."""
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("this must be JSON: an object of layers with their channels") from error
    if not isinstance(document, dict) or not document:
        raise ValueError("this must be an object of layers with their channels")
    found = {}
    for layer, value in document.items():
        channels = value if isinstance(value, list) else [value]
        if not all(isinstance(c, int) and not isinstance(c, bool) for c in channels):
            raise ValueError(f"the channels of {layer[:80]!r} must be a list of whole numbers")
        found[layer] = channels
    return found
