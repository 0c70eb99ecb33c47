"""Images of every kind become the input that the network was trained on, or a clear refusal."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fusion.errors import BadInput
from models.preprocess import InputSpec, bounds, decode, displayed, prepare

SPEC = InputSpec(size=(8, 12))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_normalizes_by_scale_mean_and_std() -> None:
    pixel = np.full((8, 12, 3), (255, 0, 51), np.uint8)
    x = prepare(pixel, InputSpec(size=(8, 12), mean=(0.5, 0.25, 0.1), std=(0.5, 0.5, 0.1)))
    assert x.shape == (1, 3, 8, 12)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([1.0, -0.5, 1.0]))


def test_bgr_networks_get_their_channels_in_that_order() -> None:
    pixel = np.full((2, 2, 3), (10, 20, 30), np.uint8)
    spec = InputSpec(size=(2, 2), mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0), scale=1.0, order="BGR")
    assert prepare(pixel, spec)[0, :, 0, 0].tolist() == [29.0, 18.0, 7.0]
    assert displayed(pixel, spec)[0, 0].tolist() == [10, 20, 30]


def test_one_channel_means_luminance() -> None:
    spec = InputSpec(size=(4, 4), channels=1)
    assert spec.order == "L"
    assert (spec.mean, spec.std) == ((0.5,), (0.5,))
    assert prepare(gradient(), spec).shape == (1, 1, 4, 4)
    assert displayed(gradient(), spec).shape == (4, 4, 3)


def test_displayed_is_what_the_network_saw() -> None:
    spec = InputSpec(size=(16, 16), mean=(0.0,), std=(1.0,))
    seen = torch.from_numpy(displayed(gradient(), spec)).permute(2, 0, 1) / 255
    torch.testing.assert_close(prepare(gradient(), spec)[0], seen, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (33, 900), (256, 256), (57, 61)])
def test_crop_gives_the_pixels_of_torchvisions_transforms(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision").transforms
    reference = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])
    spec = InputSpec(size=(32, 32), resize="crop", crop_fraction=32 / 37)
    image = gradient(*size)
    difference = np.abs(displayed(image, spec).astype(int) - np.asarray(reference(image)).astype(int))
    assert difference.max() <= 1


def test_an_extreme_aspect_ratio_allocates_nothing_large() -> None:
    image = Image.new("RGB", (4_000_000, 2))
    assert prepare(image, InputSpec(size=(224, 224), resize="crop")).shape == (1, 3, 224, 224)


def test_bounds_are_the_inputs_of_black_and_white() -> None:
    low, high = bounds(SPEC)
    assert low.shape == (1, 3, 1, 1)
    black, white = (prepare(np.full((8, 12, 3), v, np.uint8), SPEC) for v in (0, 255))
    torch.testing.assert_close(low.expand_as(black), black)
    torch.testing.assert_close(high.expand_as(white), white)


def test_json_round_trip() -> None:
    spec = InputSpec(size=(8, 12), order="BGR", resize="crop", crop_fraction=0.9, interpolation="bicubic")
    assert InputSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"size": [0, 8]}, "size"),
        ({"size": [8, 8], "std": [0, 1, 1]}, "std"),
        ({"size": [8, 8], "mean": [1, 2]}, "mean"),
        ({"size": [8, 8], "order": "XYZ"}, "order"),
        ({"size": [8, 8], "channels": 4}, "channels"),
        ({"size": [8, 8], "scale": float("nan")}, "scale"),
        ({"size": "big"}, "wrong"),
        ({"size": [8, 8], "colour": "red"}, "colour"),
        ({}, "size"),
    ],
)
def test_a_wrong_description_is_refused_by_name(fields: dict[str, object], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        InputSpec.from_json(fields)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_pixel_format_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 6), 65535 // 2, np.uint16))
    else:
        image = Image.new("RGB", (6, 5), (200, 200, 200)).convert(mode)
    decoded = decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert decoded.mode == "RGB"
    level = {"I;16": 127, "1": 255}.get(mode, 200)
    assert abs(int(np.asarray(decoded)[2, 2, 0]) - level) <= 5


def test_transparency_is_shown_on_white() -> None:
    assert decode(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_rotated_photographs_stand_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(gradient(40, 30), "JPEG", exif=exif)).size == (30, 40)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encoded(gradient(200, 200), kind)
    with pytest.raises(BadInput, match="truncated"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%PDF-1.7", "PDF"),
        (encoded(gradient(), "TIFF"), "not an image of a known format"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        decode(data)


def test_a_giant_image_is_refused_by_its_header_alone() -> None:
    with pytest.raises(BadInput, match="megapixels"):
        decode(png_header(60_000, 60_000))
    with pytest.raises(BadInput, match="megapixels"):
        decode(png_header(8_000, 8_000))


def test_arrays_must_be_uint8_pixels() -> None:
    assert prepare(np.zeros((5, 5), np.uint8), SPEC).shape == (1, 3, 8, 12)
    assert prepare(np.zeros((5, 5, 4), np.uint8), SPEC).shape == (1, 3, 8, 12)
    for bad in (np.zeros((5, 5)), np.zeros((3, 5, 5), np.uint8), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(BadInput):
            prepare(bad, SPEC)


def test_a_missing_image_file_is_named(tmp_path: object) -> None:
    with pytest.raises(BadInput, match=r"nowhere\.png"):
        prepare(f"{tmp_path}/nowhere.png", SPEC)
