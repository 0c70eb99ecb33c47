"""How much memory the values of a network take, found without computing them; whether it runs at all comes with it."""

from __future__ import annotations

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fusion.errors import ArtefactError
from fusion.network import Network, Shape, fake_run
from fusion.tracing import TRACING

_BATCH = 2  # not 1, which torch treats specially
_LARGEST = 2**63 - 1


def footprint(network: Network) -> int:
    """Bytes of all values that the network computes for one image, each counted once, beside its weights.

    About what an explanation holds at a time, which keeps them all. Raises ArtefactError for a graph that does
    not run, whose sizes no tensor can have, or whose values are not of the shapes that are stored with it.
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
    sizes = []

    def look(node: fx.Node, value: object) -> None:
        _compare(node, value)
        if node.op != "get_attr":
            sizes.append(_size(value, node.meta["shape"]))

    fake_run(network, _BATCH, look)
    return sum(sizes)


def _compare(node: fx.Node, value: object) -> None:
    stored: Shape | None = node.meta["shape"]
    if not isinstance(value, Tensor):
        return
    same = stored is not None and len(stored) == value.ndim and node.meta["dtype"] == value.dtype
    if not same or any(a not in (None, b) for a, b in zip(stored or (), value.shape, strict=True)):
        raise ArtefactError(
            f"The value '{node.name}' of the stored network is {list(value.shape)} {value.dtype}, not "
            f"{list(stored or ())} {node.meta['dtype']} as stored. Upload the network again."
        )


def _size(value: object, shape: Shape | None) -> int:
    """Bytes for one image; several tensors at once, as of a split, have no shape of their own."""
    total = 0
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            total += leaf.numel() * leaf.element_size()
        elif isinstance(leaf, int) and abs(leaf) > _LARGEST:
            raise ArtefactError("The stored network computes sizes that no tensor has. Upload it again.")
    return total if shape is not None and None not in shape else total // _BATCH
