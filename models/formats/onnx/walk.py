"""One walk over the nodes, on tensors without storage whose batch is a symbol: what is constant, what is a size, and
which steps a batch of images goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusion.errors import BadFile, ClearfoldError
from models.formats.onnx.batch import Batched, follow_batch
from models.formats.onnx.expansion import Worklist, expand
from models.formats.onnx.explained import explained
from models.formats.onnx.folding import as_array, fold_one, operator_of
from models.formats.onnx.parts import by_image
from models.formats.onnx.patterns import Known
from models.formats.onnx.registry import Node, Operator, find_arithmetic
from models.formats.onnx.single import Singles
from models.formats.onnx.steps import Argument, Constant, Static, Step, Variable
from models.formats.onnx.values import Counted, allocation, as_tensor, is_symbolic, numbers
from models.formats.onnx.views import as_view

# Beyond this, an integer constant is data (a table of indices), not a shape.
_MOST_NUMBERS = 4096

# Their results are as good as constant: no relevance comes back through them.
_STEPPED = {"Ceil", "Floor", "Sign"}


@dataclass(frozen=True)
class Failure:
    """A node that cannot be read although all that it reads is there, and why."""

    node: Node
    error: ClearfoldError


class OneSizeOnly(BadFile):
    """A node that makes a number of the batch size: nothing can be computed for any size behind it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        super().__init__(
            f"Layer '{node.called}' ({node.title}) runs with a batch of one size only. "
            "Export the network with a dynamic batch dimension."
        )


@dataclass
class Walk:
    """What is known after the walk: constants, values that depend on the image, which of these relevance can come back
    through (`carrying`), what computes them, and which lack the batch axis in the file (`singles`).

    A walk goes on where a node cannot be read: `failures` are those nodes, `behind` those that read what they compute.
    """

    known: dict[str, Known]
    values: dict[str, Any]
    free: SymInt
    singles: Singles
    mode: FakeTensorMode
    declared: int | None
    steps: list[Step] = field(default_factory=list)
    carrying: set[str] = field(default_factory=set)
    maker: dict[str, Node] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    behind: list[Node] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        nodes: Iterable[Node],
        known: dict[str, Known],
        image: str,
        sample: tuple[int, ...],
        declared: int | None,
        left_out: Sequence[Failure] = (),
    ) -> Walk:
        """Walk over the nodes for images of shape `sample`; `declared` is the batch size that the file fixes, or None.
        New constants are added to `known`. Nodes `left_out` count as failed. Raises OneSizeOnly, which a walk cannot go
        on behind."""
        shapes = ShapeEnv()
        mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        dynamic = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * len(sample)
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=dynamic)
        x = mode.from_tensor(
            torch.empty(2, *sample), symbolic_context=context, source=ConstantSource("image")
        )
        free = x.shape[0]
        assert isinstance(free, SymInt)
        values: dict[str, Any] = {image: x}
        walk = cls(known, values, free, Singles(known, values, free), mode, declared)
        walk.carrying.add(image)
        walk._go(nodes, {failure.node.outputs: failure.error for failure in left_out})
        return walk

    def _go(self, nodes: Iterable[Node], left_out: Mapping[tuple[str, ...], ClearfoldError]) -> None:
        todo = Worklist(nodes)
        lost: set[str] = set()
        for node in todo:
            if lost.intersection(node.inputs):
                lost.update(name for name in node.outputs if name)
                self.behind.append(node)
                continue
            try:
                if node.outputs in left_out:
                    raise left_out[node.outputs]
                with explained(node):
                    expanded = expand(node, self.known, self._look)
                if expanded is None:
                    self._pass(node)
                else:
                    todo.put(expanded)
            except ClearfoldError as error:
                if isinstance(error, OneSizeOnly) and node.outputs not in left_out:
                    raise
                lost.update(name for name in node.outputs if name)
                self.failures.append(Failure(node, error))

    def _look(self, name: str) -> Any:
        return self.known[name].tensor if name in self.known else self.values.get(name)

    def _pass(self, node: Node) -> None:
        if all(name in self.known or not name for name in node.inputs):
            fold_one(node, self.known)
            return
        missing = [
            name for name in node.inputs if name and name not in self.known and name not in self.values
        ]
        if missing:
            raise BadFile(
                f"Layer '{node.called}' reads '{missing[0]}', "
                "which nothing in the file computes. Export it again."
            )
        self.maker.update((name, node) for name in node.outputs if name)
        with explained(node):
            nodes = self.singles.on_batch(node) if self.declared == 1 else [node]
        for each in nodes:
            with explained(node):
                parts = self._by_image(each)
            for part in parts:
                self._run(part)

    def _by_image(self, node: Node) -> list[Node]:
        if self.declared is None:
            return [node]
        return by_image(node, self.known, self.values, self.free, self.declared)

    def _run(self, node: Node) -> None:
        known, values, free, declared = self.known, self.values, self.free, self.declared
        view = as_view(node, known, values, self.steps, free, declared)
        if view is not None:
            node, target = view
            step = Step(node, _on_tensors(operator_of(node)), (Variable(node.inputs[0]), target), sizes=False)
        else:
            step = _step(node, known, values)
            step = replace(step, arguments=follow_batch(node, step.arguments, values, free, declared))
        with torch.no_grad(), explained(node), self.mode, enable_python_dispatcher():
            arguments = [_value(argument, values, free, self.mode) for argument in step.arguments]
            results = step.run(node, *arguments)
        if not free.node.expr.free_symbols:
            raise OneSizeOnly(node)
        results = results if isinstance(results, tuple) else (results,)
        reads = {argument.name for argument in step.arguments if isinstance(argument, Variable)}
        carries = bool(self.carrying & reads) and node.op not in _STEPPED
        dynamic_result = False
        for name, result in zip(node.outputs, results, strict=False):
            if isinstance(result, Tensor):
                allocation(result.shape, node.called)
            if isinstance(result, Tensor) or is_symbolic(result):
                values[name], dynamic_result = result, True
                if carries and isinstance(result, Tensor) and result.is_floating_point():
                    self.carrying.add(name)
            else:
                known[name] = Known(as_tensor(result), name)
                self.singles.bare.discard(name)
        if dynamic_result:
            self.steps.append(step)


def _step(node: Node, known: Mapping[str, Known], values: Mapping[str, Any]) -> Step:
    """The node with its arguments in the form that its function takes."""
    sizes = find_arithmetic(node, known)
    if sizes is not None and all(_is_number(name, known, values) for name in node.inputs):
        given = [
            Static(None) if not n else Variable(n) if n in values else Static(as_array(known[n]))
            for n in node.inputs
        ]
        return Step(node, sizes, tuple(given), sizes=True)
    operator = operator_of(node)
    if operator.counting:
        raise Counted(node.title, node.called)
    arguments: list[Argument] = []
    rank = max((values[n].ndim for n in node.inputs if n in values), default=0)
    for i, name in enumerate(node.inputs):
        if not name:
            arguments.append(Static(None))
        elif name in values:
            arguments.append(Variable(name))
        elif i in operator.static:
            arguments.append(Static(as_array(known[name])))
        elif operator.scalars and known[name].tensor.numel() == 1 and known[name].tensor.ndim <= rank:
            arguments.append(Static(known[name].tensor.item()))
        else:
            arguments.append(Constant(known[name]))
    while arguments and isinstance(arguments[-1], Static) and arguments[-1].value is None:
        arguments.pop()
    return Step(node, _on_tensors(operator), tuple(arguments), sizes=False)


def _on_tensors(operator: Operator) -> Callable[..., Any]:
    """The operator's function, with sizes turned into tensors wherever it takes no numbers."""

    def run(node: Node, *arguments: Any) -> Any:
        first = next((a for a in arguments if isinstance(a, Tensor)), None)
        ready = (
            as_tensor(a, first)
            if i not in operator.static and not isinstance(a, Tensor | float | int | None)
            else a
            for i, a in enumerate(arguments)
        )
        return operator.run(node, *ready)

    return run


def _is_number(name: str, known: Mapping[str, Known], values: Mapping[str, Any]) -> bool:
    if name in values:
        return not isinstance(values[name], Tensor)
    if not name:
        return True
    constant = known[name].tensor
    return constant.ndim <= 1 and constant.numel() <= (1 if constant.is_floating_point() else _MOST_NUMBERS)


def _value(argument: Argument, values: Mapping[str, Any], batch: SymInt, mode: FakeTensorMode) -> Any:
    match argument:
        case Variable(name):
            return values[name]
        case Constant(known):
            # Fake like the rest: a real tensor would force the batch to be a number.
            return mode.from_tensor(known.tensor, static_shapes=True)
        case Batched():
            return numbers(argument.sizes(batch))
        case Static(value):
            return value
