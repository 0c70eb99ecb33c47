"""What every reader asks of a module: are its weights finite, and on what image does it run?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion import network
from fusion.errors import BadInput, ClearfoldError
from fusion.outputs import follows

DEFAULT_SIZE = (224, 224)
MAX_CHANNELS = 64
_BATCHES = (2, 1, 3, 4, 8, 16)


def check_finite(module: nn.Module) -> None:
    """Raises NonFiniteWeights naming the parameters and buffers that hold NaN or infinity, BadInput where the weights
    are nowhere (the "meta" device)."""
    nowhere = [
        name for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor) and tensor.is_meta
    ]
    if nowhere:
        raise BadInput(
            f"The network has no weights yet: {nowhere[0]} is on the device 'meta'. Load them first."
        )
    network.check_finite({**dict(module.named_parameters()), **dict(module.named_buffers())})


def find_example(
    module: nn.Module,
    size: tuple[int, int] | None,
    notes: list[str],
    failure: type[ClearfoldError],
    channels: int | None = None,
) -> tuple[Tensor, bool]:
    """A batch of random images [N, C, H, W] on which the module runs, typed and placed like its weights; images
    [N, H, W, C], and true, where it runs on these only. N is 2, or what else a trace is for that took the number of
    its images for a constant.

    The channels are those of the first convolution that takes them. Where `size` is left open, 224x224 is
    tried and a note says so. Raises `failure` where no image runs; Clearfold's own errors pass through.
    """
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    device = next((t.device for t in tensors), torch.device("cpu"))
    height, width = size or DEFAULT_SIZE
    problem: Exception | None = None
    mixed: tuple[Tensor, bool] | None = None
    counts = [channels] if channels is not None else _likely_channels(tensors)
    for batch, last, count in itertools.product(_BATCHES, (False, True), counts):
        generator = torch.Generator().manual_seed(0)
        shape = (height, width, count) if last else (count, height, width)
        example = torch.randn(batch, *shape, generator=generator).to(device, dtype)
        try:
            with torch.no_grad():
                answers = module(example)
        except ClearfoldError:
            raise
        except Exception as error:  # whatever the module raises for a shape that does not fit
            problem = problem or error
            continue
        if size is None and mixed is None:
            notes.append(
                f"Nothing says what size of image the network takes; {height}x{width} is assumed. "
                "Pass size=HxW if it is another."
            )
        if follows(answers, batch):
            return example, last
        mixed = mixed or (example, last)
    if mixed is not None:  # whoever captures it says what is wrong
        return mixed
    raise failure(
        f"The network does not run on images of {height}x{width} pixels ({first_line(problem)}). "
        "Pass the size it was made for: size=HxW, for example size=32x32."
    ) from problem


def _likely_channels(tensors: Sequence[Tensor]) -> list[int]:
    kernels = [t.shape for t in tensors if t.ndim == 4 and t.is_floating_point()]
    # A depthwise first convolution has as many channels as outputs.
    likely = [kernels[0][1], 3, 1, kernels[0][0]] if kernels else [3, 1]
    return [count for count in dict.fromkeys(likely) if count <= MAX_CHANNELS]


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to the floating-point tensors of a nested output; tuples become lists."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_tensors(item, function) for item in value]
    return value


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message that says something, without the full stop."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
