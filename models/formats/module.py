"""nn.Modules in: the module is read through a twin that shares its weights, and is never changed itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusion.capture import evaluation_twin
from fusion.errors import BadInput
from models.formats.probing import check_finite, find_example, map_tensors
from models.opened import Source


def read(module: nn.Module, *, size: tuple[int, int] | None = None, channels: int | None = None) -> Source:
    """A module as a source. `size` is (height, width), 224x224 where it is left open.

    Raises NonFiniteWeights, and BadInput where the module does not run on such an image.
    """
    check_finite(module)
    notes: list[str] = []
    twin = evaluation_twin(module)
    example = find_example(twin, size, notes, BadInput, channels)
    return Source(example, _runner(twin, example), module=twin, notes=tuple(notes))


def _runner(twin: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """The module's own forward in evaluation mode, where and as its weights are; answers as it was asked."""

    def run(x: Tensor) -> Any:
        with torch.no_grad():
            output = twin(x.detach().to(example.device, example.dtype))
        return map_tensors(output, lambda t: t.to(x.device, x.dtype))

    return run
