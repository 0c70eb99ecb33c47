"""Capture networks as one graph, fold their normalizations into the layers around them, prove it, store it."""

from fusion.artefact import load, load_manifest, save
from fusion.capture import capture, from_exported
from fusion.export import save_exported, to_exported, to_onnx
from fusion.fuse import Fused, fuse
from fusion.network import LayerInfo, Network, TensorSpec
from fusion.report import Certificate, Report, Row, certify

__all__ = [
    "Certificate",
    "Fused",
    "LayerInfo",
    "Network",
    "Report",
    "Row",
    "TensorSpec",
    "capture",
    "certify",
    "from_exported",
    "fuse",
    "load",
    "load_manifest",
    "save",
    "save_exported",
    "to_exported",
    "to_onnx",
]
