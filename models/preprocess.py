"""From an image, in whatever shape it arrives, to the tensor that a network was trained on."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fusion.errors import BadInput

ImageLike: TypeAlias = "Image.Image | str | Path | bytes | bytearray | memoryview | NDArray[Any]"
Order: TypeAlias = Literal["RGB", "BGR", "L"]
Resize: TypeAlias = Literal["squash", "crop"]
Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 40_000_000
MAX_SIZE = 4096

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FILTERS: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the network's input: x = (pixel * scale - mean) / std, channels in `order`.

    `size` is (height, width). `resize` says what happens to another aspect ratio: "squash" stretches the
    image, "crop" resizes its short side to size / crop_fraction and cuts out the centre. `mean` and `std` are
    those of the scaled pixel, in the order of the network's channels. One channel means luminance.
    """

    size: tuple[int, int]
    channels: int = 3
    mean: tuple[float, ...] = field(default=())
    std: tuple[float, ...] = field(default=())
    scale: float = 1 / 255
    order: Order = "RGB"
    resize: Resize = "squash"
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        """Fills what was left open with the field's usual values and refuses what makes no sense."""
        fill = object.__setattr__
        if self.channels == 1:
            fill(self, "order", "L")
        mean, std = ((0.5,), (0.5,)) if self.channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
        fill(self, "mean", _per_channel(self.mean or mean, self.channels, "mean"))
        fill(self, "std", _per_channel(self.std or std, self.channels, "std"))
        fill(self, "size", tuple(int(side) for side in self.size))
        checks = {
            "size must be two numbers (height, width) from 1 to 4096": len(self.size) == 2
            and all(1 <= side <= MAX_SIZE for side in self.size),
            "channels must be 1 (gray) or 3 (colour)": self.channels in (1, 3),
            "order must be RGB, BGR or L, and L for one channel only": self.order in get_args(Order)
            and (self.order == "L") == (self.channels == 1),
            "resize must be squash or crop": self.resize in get_args(Resize),
            "crop_fraction must be above 0 and at most 1": 0 < self.crop_fraction <= 1,
            "interpolation must be nearest, bilinear, bicubic or lanczos": self.interpolation in _FILTERS,
            "std must be above 0": all(value > 0 for value in self.std),
            "mean, std and scale must be finite, and scale not 0": self.scale != 0
            and all(map(math.isfinite, (*self.mean, *self.std, self.scale))),
        }
        broken = [text for text, holds in checks.items() if not holds]
        if broken:
            raise BadInput(f"The input description is wrong: {'; '.join(broken)}.")

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        """The inverse of `to_json`; all but `size` may be missing. Raises BadInput."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(data) - known)
        if unknown or "size" not in data:
            problem = f"unknown fields {', '.join(unknown)}" if unknown else "no size"
            raise BadInput(f"The input description has {problem}. Its fields are {', '.join(sorted(known))}.")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise BadInput(f"The input description is wrong: {error}.") from error


def _per_channel(values: Sequence[float] | float, channels: int, name: str) -> tuple[float, ...]:
    given = (values,) if isinstance(values, int | float) else tuple(values)
    if len(given) not in (1, channels):
        raise BadInput(
            f"The input description is wrong: {name} has {len(given)} values for {channels} channels."
        )
    return tuple(float(value) for value in (given * channels if len(given) == 1 else given))


def decode(source: str | Path | bytes | bytearray | memoryview) -> Image.Image:
    """Decodes an image file or its bytes to RGB, upright (EXIF), first frame only.

    Takes PNG, JPEG, WEBP, BMP and GIF up to 40 megapixels; the size is checked before anything is allocated.
    Raises BadInput for everything else, truncated files included.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise BadInput(f"There is no image '{path}'. Give the path of an image file.")
        source = path.read_bytes()
    data = bytes(source)
    if not data:
        raise BadInput("The image is empty. Send the bytes of a PNG, JPEG, WEBP, BMP or GIF file.")
    try:
        with warnings.catch_warnings():
            # Pillow only warns of large images; the limit here is stricter and its own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(image)
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except BadInput:
        raise
    except Image.DecompressionBombError as error:
        limit = MAX_PIXELS // 1_000_000
        raise BadInput(f"The image has more than {limit} megapixels. Send a smaller one.") from error
    except UnidentifiedImageError as error:
        raise BadInput(f"{_kind(data)} Send a PNG, JPEG, WEBP, BMP or GIF file.") from error
    except Exception as error:  # decoders raise many types for damaged data
        raise BadInput(f"The image is damaged or truncated ({error}). Send it again.") from error


def _check_pixels(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadInput(
            f"The image has {width}x{height} pixels, more than {MAX_PIXELS // 1_000_000} megapixels. "
            "Send a smaller one."
        )


def _kind(data: bytes) -> str:
    start = data[:1024].lstrip().lower()
    if b"<svg" in start or start.startswith(b"<?xml"):
        return "SVG and other XML drawings are not accepted."
    if start.startswith(b"%pdf"):
        return "PDF files are not accepted."
    return "This is not an image of a known format."


def _rgb(image: Image.Image) -> Image.Image:
    """RGB; transparency over white, 16-bit gray to 8 bits (Pillow's own conversion would clip it)."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # PNG has 16 bits or fewer; float images are taken as 0..255.
        scaled = values if image.mode == "F" else values / 257.0
        return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise BadInput(f"An image array must be [H, W], [H, W, 3] or [H, W, 4], not {list(array.shape)}.")
    if 0 in array.shape:
        raise BadInput("The image array is empty.")
    if array.dtype != np.uint8:
        raise BadInput(
            f"An image array must hold uint8 pixels from 0 to 255, not {array.dtype}. "
            "Pass a prepared network input as a torch tensor instead."
        )
    return _rgb(Image.fromarray(np.ascontiguousarray(array)))


def _image(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        _check_pixels(image)
        return _rgb(ImageOps.exif_transpose(image))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, str | Path | bytes | bytearray | memoryview):
        return decode(image)
    raise BadInput(f"{type(image).__name__} is no image. Pass a PIL image, a path, bytes or a uint8 array.")


def _fitted(image: ImageLike, spec: InputSpec) -> Image.Image:
    """The pixels that the network gets: resized, cropped, RGB or gray."""
    picture = _image(image)
    height, width = spec.size
    sample = _FILTERS[spec.interpolation]
    if spec.channels == 1:
        picture = picture.convert("L")
    if spec.resize == "squash":
        return picture if picture.size == (width, height) else picture.resize((width, height), sample)
    return picture.resize((width, height), sample, box=_centre_box(picture.size, spec))


def _centre_box(size: tuple[int, int], spec: InputSpec) -> tuple[float, float, float, float]:
    """The part of the image that stays when its short side is resized and the centre cut out (the rounding is
    torchvision's and timm's). Resampling that part at once gives the same pixels, and an extreme aspect ratio
    allocates nothing large."""
    sides = [
        (side, target, math.floor(target / spec.crop_fraction + 1e-6))
        for side, target in zip(size, reversed(spec.size), strict=True)
    ]
    ratio = max(resized / side for side, _, resized in sides)
    spans = []
    for side, target, resized in sides:
        scaled = resized if ratio == resized / side else max(int(side * ratio), target)
        offset = round((scaled - target) / 2)
        spans.append((offset * side / scaled, (offset + target) * side / scaled))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def prepare(image: ImageLike, spec: InputSpec) -> Tensor:
    """The network's input, float32 [1, C, H, W]. Raises BadInput."""
    pixels = np.asarray(_fitted(image, spec), dtype=np.float32)
    if spec.channels == 1:
        pixels = pixels[:, :, None]
    if spec.order == "BGR":
        pixels = pixels[:, :, ::-1]
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    x = (pixels * np.float32(spec.scale) - mean) / std
    return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)[None]))


def displayed(image: ImageLike, spec: InputSpec) -> NDArray[np.uint8]:
    """What the network saw, as uint8 [H, W, 3] for people: RGB, gray repeated. Raises BadInput."""
    return np.array(_fitted(image, spec).convert("RGB"), dtype=np.uint8)


def bounds(spec: InputSpec) -> tuple[Tensor, Tensor]:
    """The input values of a black and of a white pixel, lowest and highest, each [1, C, 1, 1]."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (spec.mean, spec.std))
    ends = [(value * spec.scale - mean) / std for value in (0.0, 255.0)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    return low.float(), high.float()
