"""Where networks come from: file formats, the zoo, and how an image becomes their input."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.opened import Opened
    from models.preprocess import InputSpec

__all__ = ["InputSpec", "Opened", "open"]

_LAZY = {"InputSpec": "models.preprocess", "Opened": "models.opened"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'models' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def open(source: Any, *, size: tuple[int, int] | None = None, input: InputSpec | None = None) -> Opened:
    """Opens a network and captures it: a file (ONNX, with its data files in the same folder; TorchScript, .pt2), a zoo
    name ("builtin", "torchvision:resnet50", "timm:convnext_tiny"), an nn.Module, a ScriptModule or an ExportedProgram.

    `size` is (height, width) where the source does not say it; `input` describes the input where the source
    does not, or wrongly. A .pt2 file must come from a source you trust: reading it may run code from it.
    Raises the errors of `fusion.errors` (BadFile, UnsupportedOperator, NonFiniteWeights,
    NothingToExplain, CaptureError, BadInput) and of `models.zoo.loader` (UnknownNetwork, ZooUnavailable).
    """
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from fusion.errors import BadFile
    from models import formats
    from models.opened import assemble
    from models.preprocess import InputSpec
    from models.zoo import loader

    wanted = size or (input.size if input is not None else None)
    if wanted is not None:
        InputSpec(size=wanted)  # refuses sizes that no image has, before anything of that size is made
    if isinstance(source, torch.jit.ScriptModule):
        return assemble(formats.read_script(source, size=wanted), "torchscript", input)
    if isinstance(source, nn.Module):
        from models.formats import module

        channels = input.channels if input is not None else None
        return assemble(module.read(source, size=wanted, channels=channels), "module", input)
    if isinstance(source, ExportedProgram):
        from models.formats import exported

        return assemble(exported.from_program(source, size=wanted), "export", input)
    if not isinstance(source, str | Path):
        raise BadFile(
            f"{type(source).__name__} is no network. Pass a file's path, a zoo name, an nn.Module or an "
            "ExportedProgram."
        )
    if isinstance(source, str) and loader.is_zoo_name(source):
        return assemble(loader.load(source, size=wanted), source.partition(":")[0], input)
    path = Path(source)
    if (path / "saved_model.pb").is_file():
        path /= "saved_model.pb"
    if not path.is_file():
        what = "a folder" if path.is_dir() else "neither a file nor a known network"
        raise loader.UnknownNetwork(
            f"'{source}' is {what}. Pass {loader.NAMES}, or the path of a file. {formats.ACCEPTED}"
        )
    format = formats.detect(path)
    return assemble(format.read(path, size=wanted), format.name, input)
