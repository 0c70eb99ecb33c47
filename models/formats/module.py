"""nn.Modules in: the module is read through a twin that shares its weights, and is never changed itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusion.capture import evaluation_twin
from fusion.errors import BadInput
from models import formats
from models.detectors import is_detector, raw_heads
from models.formats.portions import any_number
from models.formats.probing import DEFAULT_SIZE, check_finite, find_example, map_tensors
from models.opened import Source
from models.preprocess import InputSpec


def read(module: nn.Module, *, size: tuple[int, int] | None = None, channels: int | None = None) -> Source:
    """A module as a source. `size` is (height, width), 224x224 where it is left open.

    Detectors of torchvision are read up to their raw heads, behind their own preprocessing (`models.detectors`). Raises
    NonFiniteWeights, and BadInput where the module does not run on such an image.
    """
    check_finite(module)
    notes: list[str] = []
    spec = None
    twin = evaluation_twin(module)
    if is_detector(twin):
        notes.append(
            "A detector: the raw outputs of its heads are explained, before non-maximum suppression."
        )
        size, spec = size or DEFAULT_SIZE, _normalization(twin, size or DEFAULT_SIZE)
        twin = raw_heads(twin)
    example, last = find_example(twin, size, notes, BadInput, channels)
    if any(_is_packed(layer) for layer in twin.modules()):
        script = torch.jit.trace(twin, example, check_trace=False)  # type: ignore[no-untyped-call]
        return formats.read_script(script, size=(example.shape[2], example.shape[3]))
    embeds = getattr(module, "num_classes", None) == 0  # timm's word for a network without its classifier
    return Source(
        example,
        any_number(_runner(twin, example), len(example)),
        module=twin,
        notes=tuple(notes),
        input=spec,
        embeds=embeds,
        channels_last=last,
    )


def _is_packed(layer: nn.Module) -> bool:
    """Whether a layer of a quantized network holds its weights in a form of torch's own, which no graph shows but that
    of TorchScript."""
    return type(layer).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))


def _normalization(detector: Any, size: tuple[int, int]) -> InputSpec:
    """What a detector's own transform does to pixels."""
    transform = detector.transform
    return InputSpec(size=size, mean=tuple(transform.image_mean), std=tuple(transform.image_std))


def _runner(twin: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """The module's own forward in evaluation mode, where and as its weights are; answers as it was asked."""

    def run(x: Tensor) -> Any:
        with torch.no_grad():
            # A copy: some networks normalize the image in its place.
            output = twin(x.detach().to(example.device, example.dtype, copy=True))
        return map_tensors(output, lambda t: t.to(x.device, x.dtype))

    return run
