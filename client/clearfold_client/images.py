"""What a caller may give as an image, as the bytes to send."""

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ImageLike = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.generic]


def encode(image: ImageLike) -> bytes:
    """A path and bytes go as they are; a PIL image or uint8 array [H, W], [H, W, 3] goes as PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, Image.Image):
        return _png(image)
    return _png(Image.fromarray(_pixels(np.asarray(image))))


def _pixels(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"an array of {array.dtype} with shape {array.shape} is no image: give uint8 [H, W, 3]"
        )
    return np.ascontiguousarray(array, dtype=np.uint8)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
