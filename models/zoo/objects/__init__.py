"""Synthetic images with ground truth: one textured object of a known class, and the mask of its pixels.

Every image is a pure function of `(seed, index)`, so a data set needs no files and no download, and
a heatmap can be scored against the pixels that really are the object.
"""

from models.zoo.objects.sample import CLASSES, SIZE, Sample, batch, generate

__all__ = ["CLASSES", "SIZE", "Sample", "batch", "generate"]
