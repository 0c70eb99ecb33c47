"""Bundled sample images with their masks, named after their class."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from models.zoo.objects import CLASSES, Sample

FOLDER = Path(__file__).parent
MASK_SUFFIX = ".mask.png"


@dataclass(frozen=True)
class SampleFile:
    """A bundled image on disk."""

    name: str  # the class of its object
    image: Path
    mask: Path


def sample_files(folder: Path = FOLDER) -> tuple[SampleFile, ...]:
    """The bundled images, in the order of their names."""
    masks = sorted(folder.glob(f"*{MASK_SUFFIX}"))
    names = [mask.name.removesuffix(MASK_SUFFIX) for mask in masks]
    return tuple(SampleFile(name, folder / f"{name}.png", folder / f"{name}{MASK_SUFFIX}") for name in names)


def read_sample(file: SampleFile) -> Sample:
    with Image.open(file.image) as image, Image.open(file.mask) as mask:
        pixels = np.array(image.convert("RGB"), dtype=np.uint8)  # a copy, since a view is read-only
        covered = np.asarray(mask.convert("L")) >= 128
    return Sample(image=pixels, label=CLASSES.index(file.name), mask=covered)


def write_sample(sample: Sample, folder: Path = FOLDER) -> SampleFile:
    """Save a sample and its mask (white: the object) under the name of its class."""
    name = CLASSES[sample.label]
    file = SampleFile(name, folder / f"{name}.png", folder / f"{name}{MASK_SUFFIX}")
    Image.fromarray(sample.image).save(file.image, optimize=True)
    Image.fromarray(sample.mask.astype(np.uint8) * np.uint8(255)).save(file.mask, optimize=True)
    return file
