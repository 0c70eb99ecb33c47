"""conv/linear -> BN becomes conv/linear: s (W x + b) + t = (s W) x + (s b + t)."""

from __future__ import annotations

from fusion.linear import Affine, broadcast_channels, linear_layer_ending_at
from fusion.network import Network
from fusion.passes.fold import Fold, bias_of, set_bias_map, update_layer, weight_of


def fold_into_linear_before(network: Network, bn: Affine) -> Fold:
    """Fold into the convolution, transposed convolution or linear layer that feeds the normalization."""
    layer = linear_layer_ending_at(network, bn.source)
    if layer is None:
        return Fold(reason=f"it follows {_what(bn)}, not a linear layer")
    if len(bn.source.users) > 1:
        return Fold(reason=f"'{layer.name}' before it has other readers, which would see scaled values")
    shape = bn.source.meta["shape"]
    if layer.kind == "linear" and len(shape) != 2:
        return Fold(
            reason=f"it normalizes axis 1 of {list(shape)}, which is not the axis that '{layer.name}' writes"
        )
    # W' = s W ; b' = s b + t
    bias = bias_of(network, layer)
    if layer.bias_map is None:
        shift = bn.shift if bias is None else bn.scale * bias + bn.shift
        update_layer(network, layer, layer.scale_outputs(weight_of(network, layer), bn.scale), shift)
    else:
        old = network.constants[str(layer.bias_map.target)].double()
        shaped = [broadcast_channels(v, shape) for v in (bn.scale, bn.shift)]
        update_layer(network, layer, layer.scale_outputs(weight_of(network, layer), bn.scale), None)
        set_bias_map(network, layer, shaped[0] * old + shaped[1])
    bn.node.replace_all_uses_with(layer.output)
    network.graph.erase_node(bn.node)
    return Fold(into=(layer.name,))


def _what(bn: Affine) -> str:
    source = bn.source
    if source.op == "placeholder":
        return "the input"
    return f"{source.meta.get('layer') or source.name} ({getattr(source.target, '__name__', source.target)})"
