"""Operators that a network spells out, brought back to one each, in the order in which they build on each other."""

from __future__ import annotations

from fusion.activations import recognize_activations
from fusion.attention import recognize_attention
from fusion.distances import recognize_distances
from fusion.idle import drop_idle
from fusion.instance_norm import recognize_instance_norms
from fusion.lengths import recognize_lengths
from fusion.logsumexp import recognize_logsumexp
from fusion.moves import recognize_moves
from fusion.network import Network, annotate, prune
from fusion.products import recognize_products
from fusion.recognize import recognize

# These give what they write its shape.
_SHAPED = (
    drop_idle,
    recognize_products,
    recognize_attention,
    recognize_moves,
    recognize_lengths,
    recognize_logsumexp,
    recognize_instance_norms,
    recognize_activations,
)


def recognized(network: Network) -> None:
    """Write one operator for every chain that is one, in place. Needs shapes (`annotate`), which are there afterwards
    too."""
    for step in _SHAPED:
        step(network)
        network.graph.eliminate_dead_code()  # or values would seem to have more readers than they have
    if recognize(network) | recognize_distances(network):
        annotate(network)
    prune(network)
