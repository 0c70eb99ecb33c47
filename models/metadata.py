"""What a file's author left in it about the images that the network takes and the classes that it knows."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from models.preprocess import MAX_SIZE


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        value = [part for part in value.strip("[]() ").replace(";", ",").split(",") if part.strip()]
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(float(part) for part in values)


def _order(value: Any) -> str:
    text = str(value).upper()
    return {"GRAY": "L", "GREY": "L", "GRAYSCALE": "L"}.get(text, text)


def _size(value: Any) -> tuple[int, int]:
    sides = [int(number) for number in _numbers(value)]
    height, width = (sides * 2)[-2:]
    if not (1 <= height <= MAX_SIZE and 1 <= width <= MAX_SIZE):
        raise ValueError("no image size")
    return height, width


# Names that files use for the fields of an InputSpec, and how to read them.
_FIELDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "size": ("size", _size),
    "input_size": ("size", _size),
    "mean": ("mean", _numbers),
    "std": ("std", _numbers),
    "scale": ("scale", float),
    "order": ("order", _order),
    "channel_order": ("order", _order),
    "resize": ("resize", str),
    "crop_fraction": ("crop_fraction", float),
    "crop_pct": ("crop_fraction", float),
    "interpolation": ("interpolation", str),
    # as processors of transformers have them
    "image_mean": ("mean", _numbers),
    "image_std": ("std", _numbers),
    "rescale_factor": ("scale", float),
}

# Whole statements in the words of others: (key, value) -> fields. The standard's own are in ONNX's MetadataProps.md.
_PLAIN: Mapping[str, Any] = {"mean": (0.0,), "std": (1.0,)}
_STATEMENTS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("Image.BitmapPixelFormat", "Gray8"): {"order": "L"},
    ("Image.BitmapPixelFormat", "Rgb8"): {"order": "RGB"},
    ("Image.BitmapPixelFormat", "Bgr8"): {"order": "BGR"},
    ("Image.NominalPixelRange", "NominalRange_0_255"): {**_PLAIN, "scale": 1.0},
    ("Image.NominalPixelRange", "Normalized_0_1"): _PLAIN,
    ("Image.NominalPixelRange", "Normalized_1_1"): {"mean": (0.5,), "std": (0.5,)},
    ("author", "Ultralytics"): _PLAIN,  # whose networks take pixels from 0 to 1
}


def read_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The InputSpec fields that a file's metadata states; what cannot be read is left out."""
    inner = metadata.get("input")
    merged = {**metadata, **inner} if isinstance(inner, Mapping) else metadata
    found: dict[str, Any] = {}
    for key, (name, read) in _FIELDS.items():
        if key in merged:
            try:
                found.setdefault(name, read(merged[key]))
            except (TypeError, ValueError):
                continue
    for (key, value), fields in _STATEMENTS.items():
        if merged.get(key) == value:
            found = {**fields, **found}
    return found


def read_labels(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names under `labels`, `classes` or `categories`: a list, a mapping from index, or lines."""
    for key in ("labels", "classes", "categories", "class_names", "names"):
        value = metadata.get(key)
        if isinstance(value, str):
            value = _parsed(value)
        if isinstance(value, Mapping):
            by_index = {str(index): label for index, label in value.items()}
            value = [by_index.get(str(index)) for index in range(len(by_index))]
        if isinstance(value, list | tuple) and len(value) >= 2 and None not in value:
            return tuple(str(label) for label in value)
    return None


def _parsed(text: str) -> Any:
    """A list or mapping written as JSON or as Python, else the lines or the comma-separated parts."""
    if text.lstrip().startswith(("[", "{")):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    parts = text.splitlines() if "\n" in text.strip() else text.split(",")
    return [part.strip() for part in parts if part.strip()]
