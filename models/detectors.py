"""Detectors up to the raw outputs of their heads: how much non-maximum suppression lets through depends on the image,
so nothing behind it is one graph; what it chooses from is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusion.errors import CaptureError


class RawHeads(nn.Module):
    """A one-stage detector of torchvision (RetinaNet, SSD, FCOS) on images [N, C, H, W] that are scaled and normalized
    already: its heads' answers by name, as `cls_logits` [N, anchors, classes] and `bbox_regression` [N, anchors, 4]."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = detector.backbone
        self.head: Any = detector.head

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        return self.head([features] if isinstance(features, Tensor) else list(features.values()))


def is_detector(module: nn.Module) -> bool:
    """Whether a module is one of torchvision's detectors, by its parts: a transform, a backbone, what comes after."""
    parts = dict(module.named_children())
    return "transform" in parts and "backbone" in parts and hasattr(parts["transform"], "image_mean")


def raw_heads(detector: nn.Module) -> RawHeads:
    """The detector without what follows on its heads. Raises CaptureError where it has no heads of its own."""
    if "head" not in dict(detector.named_children()):
        raise CaptureError(
            f"{type(detector).__name__} chooses regions by non-maximum suppression before it looks at them, so it is "
            "no single graph: give the part of it that proposes regions, as a module that returns "
            "net.rpn.head(list(net.backbone(x).values()))."
        )
    return RawHeads(detector)
