"""All lowerings: importing this package registers them."""

from models.formats.onnx.lowerings import attention, blocked, fused, quantized

__all__ = ["attention", "blocked", "fused", "quantized"]
