"""All operators: importing this package fills the registry."""

from models.formats.onnx.operators import (
    activation,
    arithmetic,
    attention,
    constant,
    convolution,
    counting,
    indexing,
    linear,
    normalization,
    numbers,
    pooling,
    recurrent,
    reduction,
    resize,
    sampling,
    shape,
)

__all__ = [
    "activation",
    "arithmetic",
    "attention",
    "constant",
    "convolution",
    "counting",
    "indexing",
    "linear",
    "normalization",
    "numbers",
    "pooling",
    "recurrent",
    "reduction",
    "resize",
    "sampling",
    "shape",
]
