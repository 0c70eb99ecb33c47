"""Values read from places or put at places: relevance follows the values, and where they are is a number."""

from __future__ import annotations

from typing import Any

from torch import fx

from fusion.network import Network
from lrp.held import held_inputs
from lrp.surrogate import Builder, is_code, operator_rule

_GRIDS = ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")


@held_inputs(*_GRIDS)
def _where_read(network: Network, node: fx.Node) -> list[fx.Node]:
    grid = node.args[1]
    return [grid] if isinstance(grid, fx.Node) else []


@operator_rule(*_GRIDS)
def _read(builder: Builder, node: fx.Node) -> fx.Node:
    """Interpolation is linear in what it reads. Where it reads, which a deformable convolution or a spatial transformer
    computes from the image, is held constant, as attention weights are."""
    source, grid, *rest = node.args
    places: Any = builder.values[grid]  # type: ignore[index]
    places = builder.detached(places) if builder.depends(grid) else places
    return builder.emit(node.target, builder.values[source], places, *rest, **node.kwargs)  # type: ignore[index,arg-type]


@operator_rule("scatter", "index_put", "slice_scatter", "select_scatter")
def _put(builder: Builder, node: fx.Node) -> fx.Node:
    """Linear in what is written and in what it is written into; a constant among the two keeps its part."""

    def value(n: fx.Node) -> fx.Node:
        if builder.depends(n) or is_code(n):
            return builder.values[n]
        return builder.sink(node, builder.values[n], None, builder.place(node))

    return builder.copied(node, value)


@operator_rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "sort")
def _chosen(builder: Builder, node: fx.Node) -> fx.Node:
    """The gradient is the rule: each value comes from one place."""
    return builder.copied(node)
