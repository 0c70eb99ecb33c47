"""LRP by other libraries on the networks of a benchmark: zennit and captum, each as its documentation has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Explain = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A library: which composite it is given for a network, and how it explains the best class of every image.

    prepared: the network (its own copy, in-place activations made plain, since hooks cannot see through them) ->
    (the composite's name, x [N, C, H, W] -> relevance of the same shape, its sum the score where nothing is lost).
    """

    name: str
    prepared: Callable[[nn.Module], tuple[str, Explain]]


def explainer(peer: Peer, module: nn.Module) -> tuple[str, Explain]:
    """The peer on a copy of the network."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]
    return peer.prepared(module)


def scores_of(module: nn.Module, x: Tensor) -> Tensor:
    """The class scores [N, K], also of a network with several outputs."""
    found = module(x)
    return found if isinstance(found, Tensor) else found[0]  # type: ignore[no-any-return]


class _FirstOutput(nn.Module):
    """A network of several outputs as one of class scores."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return scores_of(self.module, x)


def _zennit(module: nn.Module) -> tuple[str, Explain]:
    """EpsilonPlusFlat, batch norms merged by the canonizer that zennit has for the architecture, or by its general one.
    Biases are left out of denominators, so that a method that conserves gives back the whole score."""
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import EpsilonPlusFlat
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    special = {"ResNet": ResNetCanonizer, "VGG": VGGCanonizer}
    from_torchvision = type(module).__module__.startswith("torchvision.")
    canonizer = special.get(type(module).__name__) if from_torchvision else None
    composite = EpsilonPlusFlat(canonizers=[(canonizer or SequentialMergeBatchNorm)()], zero_params="bias")

    def explain(x: Tensor) -> Tensor:
        with composite.context(module) as hooked:
            leaf = x.clone().requires_grad_()
            scores = scores_of(hooked, leaf)
            best, classes = scores.detach().max(1, keepdim=True)
            (relevance,) = torch.autograd.grad(
                scores, leaf, torch.zeros_like(scores).scatter_(1, classes, best)
            )
        return relevance

    return f"EpsilonPlusFlat + {canonizer.__name__ if canonizer else 'SequentialMergeBatchNorm'}", explain


def _captum(module: nn.Module) -> tuple[str, Explain]:
    """captum's LRP with its default rules; it has no fusion and keeps biases in its denominators."""
    from captum.attr import LRP

    network = _FirstOutput(module)

    def explain(x: Tensor) -> Tensor:
        with torch.no_grad():
            classes = network(x).argmax(1)
        found: Any = LRP(network).attribute(x.clone(), target=classes)
        return found.detach()  # type: ignore[no-any-return]

    return "default rules", explain


PEERS = (Peer("zennit", _zennit), Peer("captum", _captum))
