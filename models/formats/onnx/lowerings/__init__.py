"""All lowerings: importing this package registers them."""

from models.formats.onnx.lowerings import blocked, fused, quantized

__all__ = ["blocked", "fused", "quantized"]
