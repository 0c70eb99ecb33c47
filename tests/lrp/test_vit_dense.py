"""CP-LRP and AttnLRP on a small vision transformer of torchvision's, relevance in hand layer by layer: no gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import lrp
from lrp.composites import AttentionRule

PATCH, HEADS, WIDTH = 4, 2, 8
TARGET = 1


def vit() -> VisionTransformer:
    """Two blocks over nine patches; nothing is zero or one."""
    net = VisionTransformer(12, PATCH, 2, HEADS, WIDTH, 16, num_classes=3).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return net


def linear(a: Tensor, weight: Tensor, bias: Tensor, r: Tensor) -> Tensor:
    """The 0-rule; the bias keeps its part (Achtibat et al. 2024, eq. 8)."""
    return a * (r / (a @ weight.T + bias) @ weight)


def layer_norm(a: Tensor, norm: nn.LayerNorm, r: Tensor) -> Tensor:
    """The shift keeps its part, division is constant, centering is linear (Ali et al. 2022, LN-rule)."""
    y = norm(a)
    r = r * (y - norm.bias) / y
    s = r / (a - a.mean(-1, keepdim=True))
    return a * (s - s.mean(-1, keepdim=True))


def attention(a: Tensor, layer: nn.MultiheadAttention, way: AttentionRule, r: Tensor) -> Tensor:
    """Attention weights constant (CP-LRP), or Achtibat et al. 2024, prop. 3.1 and 3.3, head by head."""
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    size = WIDTH // HEADS
    q, k, v = ([*part.split(size, -1)] for part in (a @ weight.T + bias).chunk(3, -1))
    scores = [q[h] @ k[h].T / size**0.5 for h in range(HEADS)]
    weights = [s.softmax(-1) for s in scores]
    out = [w @ u for w, u in zip(weights, v, strict=True)]
    r_out = linear(torch.cat(out, -1), layer.out_proj.weight, layer.out_proj.bias, r).split(size, -1)
    parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for h in range(HEADS):
        s = r_out[h] / out[h]
        if way == "values":
            r_weights = torch.zeros_like(weights[h])
        else:
            s = s / 2
            r_weights = weights[h] * (s @ v[h].T)
        parts["v"].append(v[h] * (weights[h].T @ s))
        r_scores = scores[h] * (r_weights - weights[h] * r_weights.sum(-1, keepdim=True))
        s = r_scores / (2 * scores[h])
        parts["q"].append(q[h] * (s @ k[h]) / size**0.5)
        parts["k"].append(k[h] * (s.T @ q[h]) / size**0.5)
    return linear(a, weight, bias, torch.cat([t for part in parts.values() for t in part], -1))


def block(a: Tensor, layer: Any, way: AttentionRule, r: Tensor) -> Tensor:
    """x + attention(norm(x)), then y + mlp(norm(y)): a sum hands every term its own part."""
    first = layer.ln_1(a)
    attended = layer.self_attention(first[None], first[None], first[None])[0][0]
    y = a + attended
    second = layer.ln_2(y)
    hidden = layer.mlp[0](second)
    answer = layer.mlp(second)
    r_hidden = linear(layer.mlp[1](hidden), layer.mlp[3].weight, layer.mlp[3].bias, r * answer / (y + answer))
    r_second = linear(second, layer.mlp[0].weight, layer.mlp[0].bias, r_hidden)  # GELU passes it unchanged
    r_y = r * y / (y + answer) + layer_norm(y, layer.ln_2, r_second)
    r_first = attention(first, layer.self_attention, way, r_y * attended / y)
    return r_y * a / y + layer_norm(a, layer.ln_1, r_first)


@torch.no_grad()
def by_hand(net: VisionTransformer, image: Tensor, way: AttentionRule) -> Tensor:
    """The relevance of one image [C, H, W]."""
    patches = nn.functional.unfold(image[None], PATCH, stride=PATCH)[0].T
    kernel = net.conv_proj.weight.flatten(1)
    tokens = torch.cat([net.class_token[0], patches @ kernel.T + net.conv_proj.bias])
    values = [tokens + net.encoder.pos_embedding[0]]
    for layer in net.encoder.layers:
        values.append(layer(values[-1][None])[0])
    last = net.encoder.ln(values[-1])
    head = net.heads.head
    seed = nn.functional.one_hot(torch.tensor(TARGET), 3) * head(last[0])
    r = torch.zeros_like(last)
    r[0] = linear(last[0], head.weight, head.bias, seed)
    r = layer_norm(values[-1], net.encoder.ln, r)
    for layer, a in zip(reversed(net.encoder.layers), reversed(values[:-1]), strict=True):
        r = block(a, layer, way, r)
    r = (r * tokens / values[0])[1:]  # position embeddings and the class token keep theirs
    r_patches = linear(patches, kernel, net.conv_proj.bias, r)
    return nn.functional.fold(r_patches.T[None], image.shape[1:], PATCH, stride=PATCH)[0]


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
@pytest.mark.parametrize("way", ["values", "attnlrp"])
def test_a_vision_transformer_by_hand(way: AttentionRule, fold: bool) -> None:
    net, x = vit(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    composite = replace(lrp.build("AttnLRP", epsilon=0.0, stabilizer=0.0), attention=way)
    explainer = lrp.Explainer(net, composite=composite, dtype=torch.float64, example=x, fold=fold)
    answer = explainer.explain(x, TARGET)
    expected = torch.stack([by_hand(net, image, way) for image in x])
    torch.testing.assert_close(answer.relevance, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
