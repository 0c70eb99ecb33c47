"""Whether a table [N, K] holds class scores or an embedding, as far as the graph that makes it tells.

Class scores come from a linear layer, or from the mean of one's maps. What comes out of a normalization, of an
activation behind a sum, or of pooled features is an embedding: a classifier without its head. Where the graph does not
tell (a linear layer at the end of a face or image-text encoder), the table counts as class scores.
"""

from __future__ import annotations

from torch import fx

from fusion.linear import linear_layer_ending_at
from fusion.network import Network, is_size_arithmetic, op_name
from fusion.recognize import normalizations

_CHOOSING = ("softmax", "_softmax", "log_softmax", "_log_softmax", "sigmoid", "logsigmoid")
# What moves, scales, pools or adds up scores leaves them scores.
_KEEPING = set(
    "reshape flatten unflatten squeeze unsqueeze permute transpose select slice to _to_copy clone contiguous expand "
    "mean adaptive_avg_pool2d avg_pool2d adaptive_max_pool2d max_pool2d amax sum add sub rsub mul div neg cat stack "
    "round clamp batch_norm".split()
)
_NORMALIZING = ("layer_norm", "rms_norm", "group_norm", "instance_norm")
_RECTIFYING = ("relu", "relu6", "hardtanh")
_SMOOTH = ("silu", "gelu", "hardswish", "mish", "elu", "selu", "celu", "tanh", "leaky_relu", "prelu")


def is_embedding(network: Network, output: fx.Node) -> bool:
    """Whether the graph tells that a table is an embedding, and no table of class scores."""
    spelled = normalizations(network)
    todo, seen = [output], {output}
    while todo:
        node = todo.pop()
        if node.op != "call_function" or linear_layer_ending_at(network, node) is not None:
            continue
        op = op_name(node)
        if op in _CHOOSING:
            return False
        if op in _NORMALIZING or node in spelled:
            return True
        if op in _RECTIFYING:
            if not _is_linear(network, node.args[0]):
                return True
            continue
        if op not in _KEEPING:
            return op in _SMOOTH
        for source in node.all_input_nodes:
            if source not in seen and not is_size_arithmetic(source):
                seen.add(source)
                todo.append(source)
    return False


def _is_linear(network: Network, node: object) -> bool:
    """Whether a rectifier's input comes right out of a linear layer (or its batch norm), as where maps of scores are
    averaged."""
    while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == "batch_norm":
        node = node.args[0]
    return isinstance(node, fx.Node) and linear_layer_ending_at(network, node) is not None
