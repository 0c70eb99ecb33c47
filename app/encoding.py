"""An explanation in each of the formats on offer."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.explaining import Answer, Pixels
from lrp import heatmap

JSON, PNG, NPY, NPZ = "application/json", "image/png", "application/x-npy", "application/x-npz"


@dataclass(frozen=True)
class Look:
    """How a picture of the relevance is drawn."""

    view: Literal["heatmap", "overlay"] = "heatmap"
    cmap: str = "bwr"
    opacity: float = 0.6
    clip: float = 99.5
    gain: float = 1.0
    pool: bool = False


def as_png(answer: Answer, look: Look) -> bytes:
    """The heatmap: of the layer that was asked for, where one was."""
    height, width = answer.image.shape[:2]
    inner = answer.inner
    pooled = heatmap.pool(answer.relevance) if inner is None else inner.picture(height, width)
    if look.view == "overlay":
        pixels = heatmap.overlay(
            answer.image, pooled, opacity=look.opacity, cmap=look.cmap, clip=look.clip, gain=look.gain
        )
    else:
        pixels = heatmap.colorize(pooled, cmap=look.cmap, clip=look.clip, gain=look.gain)
    target = answer.summary["target"]
    return png(
        pixels,
        {
            "Software": "Clearfold",
            "Model": answer.summary["model"],
            "Method": answer.summary["method"],
            **_composite(answer.summary, "Composite", "Picked"),
            "Target": target["explained"] if target["index"] is None else str(target["index"]),
            "Label": target["label"] or "",
            "Score": repr(target["score"]),
            **({} if answer.inner is None else {"Layer": answer.inner.layer}),
        },
    )


def as_npy(answer: Answer, look: Look) -> bytes:
    if answer.inner is not None:
        array = answer.inner.map if look.pool else answer.inner.values
    else:
        array = answer.relevance.sum(axis=0) if look.pool else answer.relevance
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def as_npz(answer: Answer, look: Look) -> bytes:
    """Everything: `relevance`, `image` (as the network saw it), `summary` (the bytes of the JSON), and of the layer
    that was asked for its relevance, `inner`, and `inner_map`, by rows and columns of the image where it has any."""
    buffer = io.BytesIO()
    summary = np.frombuffer(as_json(answer, look), dtype=np.uint8)
    arrays: dict[str, Any] = {"relevance": answer.relevance, "image": answer.image, "summary": summary}
    if answer.inner is not None:
        arrays["inner"] = answer.inner.values
        if answer.inner.on_image is not None:
            arrays["inner_map"] = answer.inner.on_image
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def as_json(answer: Answer, look: Look) -> bytes:
    return json.dumps(answer.summary, allow_nan=False).encode()


ENCODERS: dict[str, Callable[[Answer, Look], bytes]] = {PNG: as_png, NPY: as_npy, NPZ: as_npz, JSON: as_json}


def headers(summary: dict[str, Any]) -> dict[str, str]:
    """The answer in short, for formats that hold no words."""
    target = summary["target"]
    found = {
        "X-Clearfold-Method": summary["method"],
        **({} if target["index"] is None else {"X-Clearfold-Target": str(target["index"])}),
        "X-Clearfold-Explained": quote(target["explained"], safe=" "),
        "X-Clearfold-Label": quote(target["label"] or "", safe=""),
        "X-Clearfold-Score": repr(target["score"]),
        "X-Clearfold-Sum": repr(summary["sum"]),
        **_composite(summary, "X-Clearfold-Composite", "X-Clearfold-Picked"),
    }
    if summary["balanced"] is not None:
        found["X-Clearfold-Balanced"] = "true" if summary["balanced"] else "false"
    return found


def _composite(summary: dict[str, Any], asked: str, picked: str) -> dict[str, str]:
    """The composite that was asked for and the one that was used, under these names; nothing for a method that has
    none."""
    if summary["composite"] is None:
        return {}
    return {asked: summary["composite"], picked: summary["picked"]}


def png(pixels: Pixels | NDArray[np.uint8], text: dict[str, str] | None = None) -> bytes:
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
