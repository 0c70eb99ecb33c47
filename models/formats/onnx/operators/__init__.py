"""All operators: importing this package fills the registry."""

from models.formats.onnx.operators import (
    activation,
    arithmetic,
    constant,
    convolution,
    counting,
    indexing,
    linear,
    normalization,
    numbers,
    pooling,
    reduction,
    resize,
    shape,
)

__all__ = [
    "activation",
    "arithmetic",
    "constant",
    "convolution",
    "counting",
    "indexing",
    "linear",
    "normalization",
    "numbers",
    "pooling",
    "reduction",
    "resize",
    "shape",
]
