"""BN -> conv/linear becomes conv/linear: W (s x + t) + b = (W s) x + (W t + b), with W t a map under zero padding."""

from __future__ import annotations

from fusion.linear import Affine, LinearLayer, broadcast_channels, linear_layer
from fusion.network import Network, op_name
from fusion.passes.fold import Fold, bias_of, set_bias_map, update_layer, weight_of


def fold_into_linears_after(network: Network, bn: Affine) -> Fold:
    """Fold into every linear layer that reads the normalization; all of its readers must take it."""
    layers: list[LinearLayer] = []
    shape = bn.node.meta["shape"]
    for user in bn.node.users:
        layer = linear_layer(network, user)
        if layer is None or layer.source is not bn.node:
            return Fold(reason=f"it is read by {_reader(user)}, not by linear layers alone")
        if layer.kind == "linear" and len(shape) != 2:
            return Fold(
                reason=f"it normalizes axis 1 of {list(shape)}, which is not the axis that '{layer.name}' reads"
            )
        layers.append(layer)
    if not layers:
        return Fold(reason="nothing reads it")
    for layer in layers:
        _fold(network, bn, layer)
    bn.node.replace_all_uses_with(bn.source)
    network.graph.erase_node(bn.node)
    return Fold(into=tuple(dict.fromkeys(layer.name for layer in layers)))


def _fold(network: Network, bn: Affine, layer: LinearLayer) -> None:
    weight = weight_of(network, layer)
    bias = bias_of(network, layer)
    # The layer's own answer to the constant input t: one value per channel inside, others where padding (which
    # is zero behind the normalization, so -t/s in front of it) reaches in. Works for s = 0 too.
    shift = broadcast_channels(bn.shift, bn.node.meta["shape"])
    answer = layer.function()(shift, weight, bias)
    spatial = tuple(range(2, answer.ndim))
    uniform = not spatial or bool(
        (answer == answer.flatten(2)[..., :1].reshape(1, -1, *[1] * len(spatial))).all()
    )
    if layer.bias_map is not None:
        answer = answer + network.constants[str(layer.bias_map.target)].double()
        uniform = False
    if uniform or _no_padding(layer):
        vector = answer.flatten(2)[0, :, 0] if spatial else answer[0]
        update_layer(network, layer, layer.scale_inputs(weight, bn.scale), vector)
        return
    update_layer(network, layer, layer.scale_inputs(weight, bn.scale), None)
    set_bias_map(network, layer, answer)


def _no_padding(layer: LinearLayer) -> bool:
    if layer.kind != "conv" or layer.bias_map is not None:
        return layer.kind == "linear" and layer.bias_map is None
    padding = layer.node.args[4] if len(layer.node.args) > 4 else layer.node.kwargs.get("padding", 0)
    sizes = [padding] if isinstance(padding, int | str) else list(padding)  # type: ignore[arg-type]
    return all(size in (0, "valid") for size in sizes)


def _reader(user: object) -> str:
    meta = getattr(user, "meta", {})
    name = getattr(user, "name", "")
    return "the network's output" if name == "output" else f"{meta.get('layer') or name} ({op_name(user)})"  # type: ignore[arg-type]
