"""Quantized networks as their dequantized selves: what is quantized and later dequantized stays a float.

Integers carry no relevance, so no layer may see any. Dequantizing moves up through what only rearranges or picks
values until it meets the quantizing, and the two become one rounding of a float. Where a file quantizes by the range of
whatever image it sees (DynamicQuantizeLinear), the float is taken as it is: its rounding would depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from models.formats.onnx.operators.quantization import RANGES
from models.formats.onnx.patterns import Known, live
from models.formats.onnx.registry import OWN, Node
from models.formats.onnx.values import dtype
from models.opened import QUANTIZED

# Operators that hand values on as they are, or mix them (Resize), and which of their inputs are such values: all (None)
# or those in these places.
_FIRST = (0,)
_PASSING: dict[str, tuple[int, ...] | None] = dict.fromkeys(
    "DepthToSpace Expand Flatten Gather Identity MaxPool Reshape Resize Slice SpaceToDepth Split Squeeze Tile "
    "Transpose Unsqueeze Upsample".split(),
    _FIRST,
) | {"Concat": None, "Pad": (0, 2), "Where": (1, 2)}
_INTEGER = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
_DYNAMIC = "DynamicQuantizeLinear"


def notes(nodes: Iterable[Node]) -> list[str]:
    """What a user should know of a file that quantizes."""
    ops = {node.op for node in nodes}
    if not any("Quantize" in op or "QLinear" in op or op in _INTEGER for op in ops):
        return []
    said = [QUANTIZED]
    return said if not any("Dynamic" in op for op in ops) else [*said, "activations are not rounded"]


def dequantized(nodes: Sequence[Node], known: dict[str, Known], outputs: Sequence[str]) -> list[Node]:
    """The nodes with floats wherever a quantized value is dequantized sooner or later."""
    lifter = _Lifter(nodes, known)
    for node in nodes:
        node = lifter.renamed(node)
        if not node.domain and node.op == "DequantizeLinear":
            lifted = lifter.lifted(node.inputs[0], node)
        elif not node.domain and node.op == "Mul":
            lifted = lifter.product(node)
        else:
            lifted = None
        if lifted is None:
            lifter.nodes.append(node)
        elif node.outputs[0] in outputs:
            lifter.nodes.append(replace(node, op="Identity", domain="", inputs=(lifted,), attributes={}))
        else:
            lifter.names[node.outputs[0]] = lifted
    return live(lifter.nodes, outputs)


@dataclass
class _Lifter:
    """The nodes written so far, and the names that replaced values have."""

    source: Sequence[Node]
    known: dict[str, Known]
    nodes: list[Node] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    made: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.maker = {name: node for node in self.source for name in node.outputs if name}

    def renamed(self, node: Node) -> Node:
        return replace(node, inputs=tuple(self.names.get(name, name) for name in node.inputs))

    def lifted(self, name: str, reader: Node) -> str | None:
        """The float that `reader` (a DequantizeLinear) makes of a quantized value; None where that is not quantized
        here, or by other numbers."""
        scale, zero = reader.inputs[1], (*reader.inputs[2:3], "")[0]
        key = (name, scale, zero)
        if key in self.made:
            return self.made[key]
        maker = self.maker.get(name)
        if maker is None or maker.domain:
            return None
        found = None
        if maker.op == _DYNAMIC:
            found = self.renamed(maker).inputs[0] if (scale, zero) == maker.outputs[1:] else None
        elif maker.op == "QuantizeLinear":
            found = self._joined(maker, reader)
        elif maker.op in _PASSING and self._is_positive(scale):
            found = self._passed(name, maker, reader)
        if found is not None:
            self.made[key] = found
        return found

    def _joined(self, maker: Node, reader: Node) -> str | None:
        """Quantizing and dequantizing by the same numbers, as one rounding."""
        settings = [(node.get("axis", 1), node.get("block_size", 0)) for node in (maker, reader)]
        pairs = [(*node.inputs[1:], "") for node in (maker, reader)]
        same = all(self._equal(a, b) for a, b in zip(pairs[0][:2], pairs[1][:2], strict=True))
        if not same or (settings[0] != settings[1] and self._entries(pairs[0][0]) != 1):
            return None
        zero = pairs[0][1]
        kind = self.known[zero].tensor.dtype if zero else dtype(maker.get("output_dtype", 0) or 2)
        if kind not in RANGES:
            return None
        attributes = {"range": RANGES[kind], "axis": settings[0][0], "block_size": settings[0][1]}
        inputs = tuple(self.renamed(maker).inputs)
        return self._write(
            replace(reader, op="FakeQuantize", domain=OWN, inputs=inputs, attributes=attributes), "float"
        )

    def _passed(self, name: str, maker: Node, reader: Node) -> str | None:
        """The operator that hands a value on, on floats."""
        if maker.op == "MaxPool" and any(maker.outputs[1:]):
            return None
        inputs = list(self.renamed(maker).inputs)
        places = _PASSING[maker.op]
        if maker.op == "Pad" and maker.get("mode", "constant") == "constant" and not any(maker.inputs[2:3]):
            return None  # padded with the integer zero, which is no float zero
        for i in range(len(inputs)) if places is None else places:
            original = maker.inputs[i] if i < len(maker.inputs) else ""
            if not original:
                continue
            if original in self.known:
                constant = replace(reader, inputs=(original, *reader.inputs[1:]))
                inputs[i] = self._write(constant, f"{original}/float")
                continue
            lifted = self.lifted(original, reader)
            if lifted is None:
                return None
            inputs[i] = lifted
        place = maker.outputs.index(name)
        outputs = tuple(f"{output}/float" if output else "" for output in maker.outputs)
        floats = replace(maker, inputs=tuple(inputs), outputs=outputs)
        self.nodes.append(floats)
        return outputs[place]

    def product(self, node: Node) -> str | None:
        """scale · float(integer product of a tensor quantized on the spot), as a product of floats; else None."""
        for a, b in (node.inputs, node.inputs[::-1]):
            cast, scales = self.maker.get(a), self.maker.get(b)
            if cast is None or cast.op != "Cast" or scales is None or scales.op != "Mul":
                continue
            integer = self.maker.get(cast.inputs[0])
            if integer is None or integer.domain or integer.op not in _INTEGER:
                continue
            x, w, xz, wz = (*integer.inputs, "", "")[:4]
            quantizing = self.maker.get(x)
            if quantizing is None or quantizing.op != _DYNAMIC or quantizing.outputs[2] != xz:
                continue
            own = [name for name in scales.inputs if name != quantizing.outputs[1]]
            if len(own) != 1 or own[0] not in self.known or w not in self.known:
                continue
            axis = 0 if integer.op == "ConvInteger" else -1
            weight = self._write(
                replace(
                    node, op="DequantizeLinear", inputs=(w, own[0], wz), attributes={"axis": axis}, opset=22
                ),
                f"{w}/float",
            )
            inputs = (self.renamed(quantizing).inputs[0], weight)
            return self._write(
                replace(integer, op=_INTEGER[integer.op], inputs=inputs, name=node.name), "float"
            )
        return None

    def _write(self, node: Node, suffix: str) -> str:
        name = f"{node.outputs[0]}/{suffix}"
        self.nodes.append(replace(node, outputs=(name,)))
        return name

    def _equal(self, a: str, b: str) -> bool:
        if a == b:
            return not a or a in self.known
        return a in self.known and b in self.known and torch.equal(self.known[a].tensor, self.known[b].tensor)

    def _entries(self, name: str) -> int:
        return self.known[name].tensor.numel()

    def _is_positive(self, scale: str) -> bool:
        """One scale for all, so that the order of the values stays."""
        return scale in self.known and self._entries(scale) == 1 and bool(self.known[scale].tensor > 0)
