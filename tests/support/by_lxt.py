"""Relevance by LXT 2.1, in a process of its own: `python -m tests.support.by_lxt WAY FILE` writes it as safetensors.

LXT rewrites classes of torch and torchvision for the whole process and has no way back. Its import asks for the
language models of Hugging Face; empty modules stand in for them, and LXT's own code does all of the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

SIZE = 224
TARGET = 3
GAMMA_CONVOLUTION, GAMMA_LINEAR = 0.25, 0.05  # of the grid in LXT's examples/vit_torch.py
LANGUAGE_MODELS = ("llama", "qwen2", "qwen3", "gemma3", "bert", "gpt2")


def vit() -> nn.Module:
    """ViT-B/16 in float64 with random weights, and random where torchvision starts with zeros and ones: at biases, the
    class token, the layer norms and the head."""
    torch.manual_seed(0)
    module = torchvision.models.vit_b_16(weights=None, image_size=SIZE, num_classes=10).double().eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith("bias") or name == "class_token":
            nn.init.normal_(parameter, 0.0, 0.2)
        elif parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name == "heads.head.weight":
            nn.init.normal_(parameter, 0.0, 0.1)
    return module


def image() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)


def patch_gelu(layer: type[nn.Module]) -> bool:
    """LXT's identity rule f(x) / (x + epsilon), its epsilon of 1e-10 out of the way: added whatever the sign of x, it
    moves the multiplier of an x near zero, and the map by 2e-6 of its maximum for these weights."""
    from lxt.efficient.patches import patch_method
    from lxt.efficient.rules import identity_rule_implicit_fn

    def forward(self: Any, x: Tensor) -> Tensor:
        return identity_rule_implicit_fn.apply(self.original_forward, x, 1e-30)  # type: ignore[no-any-return]

    return patch_method(forward, layer, keep_original=True)  # type: ignore[no-any-return]


def patch_cp_lrp() -> None:
    """CP-LRP, LXT's own choice for torchvision's vision transformers."""
    from lxt.efficient import monkey_patch
    from lxt.efficient.models.vit_torch import cp_LRP
    from torchvision.models import vision_transformer

    monkey_patch(vision_transformer, {**cp_LRP, nn.GELU: patch_gelu})


def patch_attnlrp() -> None:
    """AttnLRP. LXT 2.1 has it for language models alone: here its layer norm, its activation and its wrapper of
    attention functions are put where torchvision's network has these, through `monkey_patch`'s own map."""
    from lxt.efficient import monkey_patch
    from lxt.efficient.patches import layer_norm_forward, patch_method, wrap_attention_forward

    def patch_attention(functional: ModuleType) -> bool:
        plain = functional.scaled_dot_product_attention  # type: ignore[attr-defined]
        wrapped = wrap_attention_forward(lambda module, *args, **kwargs: plain(*args, **kwargs))
        functional.scaled_dot_product_attention = partial(wrapped, None)  # type: ignore[attr-defined]
        return True

    monkey_patch(
        nn,
        {
            nn.GELU: patch_gelu,
            nn.LayerNorm: partial(patch_method, layer_norm_forward),
            nn.functional: patch_attention,
        },
    )


def patch_cp_lrp_gamma() -> None:
    """CP-LRP with zennit's gamma rule, as in LXT's examples/vit_torch.py."""
    from lxt.efficient import monkey_patch_zennit

    patch_cp_lrp()
    monkey_patch_zennit()


@contextmanager
def gamma(module: nn.Module) -> Iterator[None]:
    """zennit's gamma rule at the convolution and the linear layers. The projections of attention are called past
    their modules, so no hook reaches them."""
    from zennit.composites import LayerMapComposite
    from zennit.rules import Gamma

    rules = [(nn.Conv2d, Gamma(GAMMA_CONVOLUTION)), (nn.Linear, Gamma(GAMMA_LINEAR))]
    with LayerMapComposite(rules).context(module):
        yield


WAYS: dict[str, tuple[Callable[[], None], Callable[[nn.Module], Any]]] = {
    "CP-LRP": (patch_cp_lrp, nullcontext),
    "AttnLRP": (patch_attnlrp, nullcontext),
    "CP-LRP gamma": (patch_cp_lrp_gamma, gamma),
}


def stand_in_for_language_models() -> None:
    for name in LANGUAGE_MODELS:
        module: Any = ModuleType(f"lxt.efficient.models.{name}")
        setattr(module, f"modeling_{name}", ModuleType(f"modeling_{name}"))
        module.attnLRP = {}
        sys.modules[module.__name__] = module


def relevance(way: str) -> dict[str, Tensor]:
    """LXT's answer: gradient times input of the target's score, in a process that is patched from then on."""
    stand_in_for_language_models()
    patch, rules = WAYS[way]
    patch()
    module, x = vit(), image().requires_grad_()
    with rules(module):
        scores = module(x)
        (gradient,) = torch.autograd.grad(scores[0, TARGET], x)
    return {"scores": scores.detach(), "relevance": (x * gradient).detach()}


if __name__ == "__main__":
    save_file(relevance(sys.argv[1]), Path(sys.argv[2]))
