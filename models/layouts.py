"""Networks that take their images channels last [N, H, W, C], as TensorFlow's do, and pixels that nobody normalized.

A network is read and captured as its file has it. Then its graph gets images [N, C, H, W] like all others, and answers
maps [N, C, H, W]: what the two are apart is one permutation at the border, which moves relevance and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fusion.errors import BadInput
from fusion.network import Network, annotate, op_name
from models.preprocess import InputSpec

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
# Numbers of channels that an image has (a fourth says how opaque it is).
CHANNELS = (1, 3, 4)
# How far from a whole number a pixel may be, by rounding in the description's mean, std and scale.
_ROUNDING = 1e-3


def is_channels_last(sides: Sequence[Any]) -> bool:
    """Whether the sizes of one image, those of them that are known, are (height, width, channels)."""
    return sides[0] not in CHANNELS and sides[2] in CHANNELS


def channels_first(network: Network) -> Network:
    """The network for images [N, C, H, W] in place of [N, H, W, C], with maps in the same order."""
    turned = network.copy()
    (image,) = turned.input_nodes
    with turned.graph.inserting_after(image):
        last = _permuted(turned, image, _TO_LAST)
    image.replace_all_uses_with(last, delete_user_cb=lambda user: user is not last)
    image.meta |= {
        key: _order(image.meta[key], _TO_FIRST) for key in ("shape", "example") if key in image.meta
    }
    for user in list(last.users):
        if op_name(user) == "permute" and _positive(user.args[1]) == _TO_FIRST:  # type: ignore[arg-type]
            user.replace_all_uses_with(image)
    answers = []
    for node in turned.output_values:
        answer = node
        if len(node.meta["shape"] or ()) == len(_TO_FIRST):
            with turned.graph.inserting_before(turned.output_node):
                answer = _permuted(turned, node, _TO_FIRST)
        answers.append(answer)
    turned.output_node.args = (answers[0] if len(answers) == 1 else tuple(answers),)
    turned.graph.eliminate_dead_code()
    turned.graph.lint()
    return annotate(Network(turned.graph, turned.constants))


def asked_channels_first(original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same of a format's own runtime."""

    def first(answer: Any) -> Any:
        if isinstance(answer, Tensor):
            return answer.permute(_TO_FIRST) if answer.ndim == len(_TO_FIRST) else answer
        if isinstance(answer, Mapping):
            return {key: first(value) for key, value in answer.items()}
        return [first(value) for value in answer] if isinstance(answer, list | tuple) else answer

    def run(x: Tensor) -> Any:
        return first(original(x.permute(_TO_LAST)))

    return run


def asked_pixels(original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The runtime of a network that takes whole numbers, asked with pixels that are such up to rounding."""

    def run(x: Tensor) -> Any:
        whole = x.round()
        if float((x - whole).abs().max()) > _ROUNDING or float(x.min()) < -0.5 or float(x.max()) > 255.5:
            raise not_pixels()
        return original(whole)

    return run


def check_pixels(spec: InputSpec) -> None:
    """Raises BadInput where a description would change the pixels of a network that takes them as they are."""
    if spec.scale != 1 or any(spec.mean) or any(value != 1 for value in spec.std):
        raise not_pixels()


def not_pixels() -> BadInput:
    return BadInput(
        "The network takes pixels as they are, whole numbers from 0 to 255, and normalizes them itself. Describe the "
        "input with scale 1, mean 0 and std 1, or leave these out."
    )


def _permuted(network: Network, source: fx.Node, order: Sequence[int]) -> fx.Node:
    node = network.graph.call_function(torch.ops.aten.permute.default, (source, list(order)))
    node.meta = {**source.meta}
    return node


def _order(values: Sequence[Any], order: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[axis] for axis in order)


def _positive(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis % len(order) for axis in order)
