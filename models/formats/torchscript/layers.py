"""nn.Modules that mirror a script's module tree: same names, same weights, and the script's graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fusion.errors import UnsupportedOperator
from models.formats.torchscript.integers import OPERATORS
from models.formats.torchscript.interpret import Frame, call_operator
from models.formats.torchscript.packed import Packed
from models.formats.torchscript.program import Constant, Graph, Node

_OPERATOR_NAMES = {"aten::_convolution": "conv"}


class Script:
    """What a script module holds besides weights and children, and how it runs on a ScriptLayer."""

    def __init__(
        self,
        path: str,
        methods: Mapping[str, Graph],
        attributes: Mapping[str, Any],
        functions: Mapping[str, Graph],
    ) -> None:
        self.path = path
        self.methods = methods
        self.attributes = attributes
        self.functions = functions
        self.module: nn.Module = nn.Module()
        self.operators: dict[Node, str] = {}
        self.constants: dict[tuple[Graph, str], str] = {}
        # Buffers of one number: scripts ask for it (`float(self.scale)`), and it must not depend on a tensor.
        self.numbers: dict[str, complex] = {}

    def attach(self, module: nn.Module, flat: bool) -> None:
        """Registers with the module the tensors that the graphs hold as constants.

        An operator that owns a constant becomes a named layer; in a flat script (frozen: one graph, no
        children), all operators do, because nothing else tells one layer from another."""
        self.module = module
        self.numbers = {name: b.item() for name, b in module.named_buffers(recurse=False) if b.numel() == 1}
        counts: Counter[str] = Counter()
        for graph in self.methods.values():
            owned: set[str] = set()
            for node in graph.block.walk():
                weights = {n for n in node.inputs if n in graph.constants and _is_weight(graph.constants[n])}
                packed = node.kind in OPERATORS and not node.kind.startswith("aten::")
                tensors = packed or any(argument.type == "Tensor" for argument in node.arguments)
                if (node.target is None and not packed) or not (weights or (flat and tensors)):
                    continue
                base = _OPERATOR_NAMES.get(node.kind, node.kind.partition("::")[2].strip("_"))
                counts[base] += 1
                self.operators[node] = f"{base}_{counts[base]}"
                module.add_module(self.operators[node], OpLayer(node, graph.constants))
                owned |= weights
            for name, value in graph.constants.items():
                if name not in owned and _is_weight(value):
                    counts["constant"] += 1
                    self.constants[graph, name] = f"constant_{counts['constant']}"
                    hold(module, self.constants[graph, name], value)

    def call(self, method: str, values: Sequence[Any]) -> Any:
        graph = self.methods.get(method)
        if graph is None:
            raise UnsupportedOperator(f"prim::CallMethod[{method}]", self.path)
        return Frame(self, graph).run([self.module, *values])

    def attribute(self, name: str) -> Any:
        module = self.module
        for table in (module._parameters, module._buffers, module._modules, self.attributes):
            if name in table:
                return table[name]
        raise UnsupportedOperator(f"prim::GetAttr[{name}]", self.path)

    def constant(self, graph: Graph, name: str) -> Any:
        own = self.constants.get((graph, name))
        return getattr(self.module, own) if own else graph.constants[name]

    def function(self, name: str) -> Graph:
        graph = self.functions.get(name)
        if graph is None:
            raise UnsupportedOperator(name, self.path)
        return graph

    def apply(self, node: Node, values: Sequence[Any]) -> Any:
        name = self.operators.get(node)
        return getattr(self.module, name)(*values) if name else call_operator(node, values, self.path)


def _is_weight(constant: Constant) -> bool:
    return isinstance(constant, Packed) or constant.dim() > 0


def hold(module: nn.Module, name: str, constant: Constant) -> None:
    """Registers a constant with a module."""
    if isinstance(constant, Packed):
        module.add_module(name, constant)
    else:
        module.register_buffer(name, constant)


class OpLayer(nn.Module):
    """One operator with the constant tensors it takes, under the names of the operator's arguments."""

    def __init__(self, node: Node, constants: Mapping[str, Constant]) -> None:
        super().__init__()
        self.node = node
        self.held: dict[int, str] = {}
        for position, name in enumerate(node.inputs):
            if name in constants and _is_weight(constants[name]):
                self.held[position] = "packed" if not node.arguments else node.arguments[position].name
                hold(self, self.held[position], constants[name])

    def forward(self, *values: Any) -> Any:
        filled = [getattr(self, self.held[i]) if i in self.held else value for i, value in enumerate(values)]
        return call_operator(self.node, filled)


class ScriptLayer(nn.Module):
    """One module of the script. Its children are ScriptLayers that are called like any nn.Module, so that
    torch.export sees the layers' own names."""

    def __init__(
        self,
        script: Script,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        children: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            trainable = tensor.is_floating_point() or tensor.is_complex()
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=trainable))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.detach())
        for name, child in children.items():
            self.add_module(name, child)
        self.script = script
        script.attach(self, flat=not children and not script.path)

    def forward(self, *values: Any, method: str = "forward") -> Any:
        return self.script.call(method, values)


class ScriptNetwork(ScriptLayer):
    """The top module: takes one batch of images; further arguments of the script keep their defaults."""

    defaults: tuple[Any, ...] = ()

    def forward(self, image: Tensor) -> Any:  # type: ignore[override]
        return self.script.call("forward", [image, *self.defaults])
