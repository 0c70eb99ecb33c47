"""What files say of their images, in the words of those who write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from models.metadata import read_metadata

STATED: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ultralytics": ({"author": "Ultralytics", "imgsz": "[64, 64]"}, {"mean": (0.0,), "std": (1.0,)}),
    "transformers": (
        {"image_mean": [0.5, 0.4, 0.3], "image_std": "[0.2, 0.2, 0.2]", "rescale_factor": 1 / 127.5},
        {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "scale": 1 / 127.5},
    ),
    "onnx": ({"Image.NominalPixelRange": "Normalized_1_1"}, {"mean": (0.5,), "std": (0.5,)}),
    "numbers before words": (
        {"author": "Ultralytics", "mean": "0.1", "std": "0.9"},
        {"mean": (0.1,), "std": (0.9,)},
    ),
    "somebody else": ({"author": "Someone"}, {}),
}


@pytest.mark.parametrize("name", STATED)
def test_what_is_stated_is_read(name: str) -> None:
    metadata, fields = STATED[name]
    assert read_metadata(metadata) == fields
