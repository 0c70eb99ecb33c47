"""How much memory the values of a network take, found without computing them; whether it runs at all comes with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fusion.errors import ArtefactError
from fusion.network import Network, call
from fusion.tracing import TRACING

_LARGEST = 2**63 - 1


def footprint(network: Network) -> int:
    """Bytes of all values that the network computes for one image, each counted once, beside its weights.

    About what an explanation holds at a time, which keeps them all. Raises ArtefactError for a graph that does
    not run, or whose sizes no tensor can have.
    """
    try:
        with TRACING:
            return _bytes(network)
    except ArtefactError:
        raise
    except Exception as error:  # every operator has its own way to refuse its arguments
        first = (str(error).splitlines() or ["no further word"])[0]
        raise ArtefactError(
            f"The stored network does not run ({type(error).__name__}: {first[:200]}). Upload it again."
        ) from error


def _bytes(network: Network) -> int:
    values = {}
    total = 0
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        for node in network.graph.nodes:
            if node.op == "placeholder":
                shape = [1 if size is None else size for size in node.meta["shape"]]
                values[node] = torch.empty(shape, dtype=node.meta["dtype"], device=network.device)
            elif node.op == "get_attr":
                values[node] = mode.from_tensor(network.constants[str(node.target)])
                continue
            elif node.op == "call_function":
                values[node] = call(node, values)
            else:
                continue
            total += _size(values[node])
    return total


def _size(value: object) -> int:
    total = 0
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            total += leaf.numel() * leaf.element_size()
        elif isinstance(leaf, int) and abs(leaf) > _LARGEST:
            raise ArtefactError("The stored network computes sizes that no tensor has. Upload it again.")
    return total
