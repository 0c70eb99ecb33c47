"""From whatever a person has to a network: modules and programs here, files and names through plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fusion import Network, capture, from_exported
from fusion.errors import BadFile, BadInput

Source: TypeAlias = Network | nn.Module | ExportedProgram | str | Path

# Packages that open files and names register a function (source, size=(height, width) or None) here, as models does:
# lrp itself reads no file format, and so does not depend on them.
ENTRY_POINTS = "clearfold.sources"


@dataclass(frozen=True)
class OpenedSource:
    """A captured network, how to prepare images for it (None: tensors only), labels, and notes for people."""

    network: Network
    prepare: Callable[[Any], Tensor] | None = None
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def open_source(source: Source, example: Tensor | None = None) -> OpenedSource:
    """Capture a source. `example` [N, C, H, W] gives the input's shape where the source does not know it."""
    if isinstance(source, Network):
        return OpenedSource(source)
    if isinstance(source, ExportedProgram):
        return OpenedSource(from_exported(source))
    if isinstance(source, nn.Module) and example is not None:
        dtype = next((p.dtype for p in source.parameters() if p.is_floating_point()), torch.float32)
        device = next((p.device for p in source.parameters()), torch.device("cpu"))
        return OpenedSource(capture(source, (example.to(device=device, dtype=dtype),)))
    if not isinstance(source, nn.Module | str | Path):
        raise BadInput(
            f"A {type(source).__name__} is no network: give an nn.Module, a file, a zoo name or a Network."
        )
    for entry in entry_points(group=ENTRY_POINTS):
        size = None if example is None or example.ndim < 4 else (example.shape[-2], example.shape[-1])
        opened = entry.load()(source, size=size)
        return OpenedSource(opened.network, opened.prepare, opened.labels, opened.notes)
    if isinstance(source, nn.Module):
        raise BadInput("Give an example input as well: Explainer(module, example=tensor).")
    raise BadFile(f"Nothing installed can open '{source}'. Install clearfold with its 'models' package.")
