"""What to run, worked out once: constants folded, shapes known, the batch free.

The nodes run on fake tensors whose batch is a symbol. Whatever comes out without that symbol is a constant;
sizes that contain it stay arithmetic; the rest are the steps that a batch of images goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusion.errors import BadFile, UnsupportedOperator
from models.formats.onnx import activations  # noqa: F401  (registers its patterns)
from models.formats.onnx.batch import Batched, follow_batch
from models.formats.onnx.expansion import Worklist, expand
from models.formats.onnx.folding import as_array, explained, first_weight, fold, fold_one, operator_of
from models.formats.onnx.names import with_path
from models.formats.onnx.patterns import Known, live, simplify
from models.formats.onnx.quantized import dequantized
from models.formats.onnx.registry import Node, Operator, find_arithmetic
from models.formats.onnx.steps import Argument, Constant, Static, Step, Variable
from models.formats.onnx.values import allocation, as_tensor, is_symbolic, numbers
from models.formats.onnx.views import as_view

# Beyond this, an integer constant is data (a table of indices), not a shape.
_MOST_NUMBERS = 4096

_COUNTING = (
    "How much it returns depends on pixel values, so nothing behind it has a fixed shape. "
    "Export the network up to the layer before it."
)


@dataclass(frozen=True)
class Plan:
    """The steps from the image to the outputs, all given by their names."""

    steps: tuple[Step, ...]
    input: str
    outputs: tuple[str, ...]


def make(
    nodes: Iterable[Node],
    weights: Mapping[str, Tensor],
    image: str,
    sample: tuple[int, ...],
    batch: int | None,
    outputs: Sequence[str],
) -> Plan:
    """Plan the nodes for images of shape `sample`; `batch` is the batch size that the file fixes, or None. Outputs that
    do not depend on the image are left out where there are others."""
    known = {name: Known(tensor, name) for name, tensor in weights.items()}
    rest = dequantized(fold(live(nodes, outputs), known), known, outputs)
    rest = fold(rest, known)
    rest = [with_path(node, first_weight(node, known)) for node in simplify(rest, known, outputs)]
    return _specialize(rest, known, image, sample, batch, outputs)


def _specialize(
    nodes: list[Node],
    known: dict[str, Known],
    image: str,
    sample: tuple[int, ...],
    batch: int | None,
    outputs: Sequence[str],
) -> Plan:
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    dynamic = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * len(sample)
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=dynamic)
    x = mode.from_tensor(torch.empty(2, *sample), symbolic_context=context, source=ConstantSource("image"))
    free = x.shape[0]
    assert isinstance(free, SymInt)
    values: dict[str, Any] = {image: x}
    steps = []
    todo = Worklist(nodes)

    def look(name: str) -> Any:
        return known[name].tensor if name in known else values.get(name)

    for node in todo:
        expanded = expand(node, known, look)
        if expanded is not None:
            todo.put(expanded)
            continue
        if all(name in known or not name for name in node.inputs):
            fold_one(node, known)
            continue
        missing = [name for name in node.inputs if name and name not in known and name not in values]
        if missing:
            raise BadFile(
                f"Layer '{node.layer or node.name}' reads '{missing[0]}', "
                "which nothing in the file computes. Export it again."
            )
        view = as_view(node, known, values, steps, free, batch)
        if view is not None:
            node, target = view
            step = Step(node, _on_tensors(operator_of(node)), (Variable(node.inputs[0]), target), sizes=False)
        else:
            step = _step(node, known, values)
            step = replace(step, arguments=follow_batch(node, step.arguments, values, free, batch))
        with torch.no_grad(), explained(node), mode, enable_python_dispatcher():
            arguments = [_value(argument, values, free, mode) for argument in step.arguments]
            results = step.run(node, *arguments)
        if not free.node.expr.free_symbols:
            raise BadFile(
                f"Layer '{node.layer or node.name}' ({node.title}) runs with a batch of one size only. "
                "Export the network with a dynamic batch dimension."
            )
        results = results if isinstance(results, tuple) else (results,)
        dynamic_result = False
        for name, result in zip(node.outputs, results, strict=False):
            if isinstance(result, Tensor):
                allocation(result.shape, node.layer or node.name)
            if isinstance(result, Tensor) or is_symbolic(result):
                values[name], dynamic_result = result, True
            else:
                known[name] = Known(as_tensor(result), name)
        if dynamic_result:
            steps.append(step)
    computed = tuple(output for output in outputs if isinstance(values.get(output), Tensor))  # no sizes
    if not computed:
        raise BadFile("The network's output does not depend on its input. Export it again.")
    return Plan(_with_release(steps, computed), image, computed)


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
        raise UnsupportedOperator(node.title, node.layer or node.name or node.outputs[0], _COUNTING)
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


def _with_release(steps: list[Step], outputs: Sequence[str]) -> tuple[Step, ...]:
    """Drop the steps that nothing reads, and note after which step each value is no longer needed."""
    wanted, kept = set(outputs), []
    for step in reversed(steps):
        if not wanted.intersection(step.node.outputs):
            continue
        reads = {a.name for a in step.arguments if isinstance(a, Variable)}
        kept.append(replace(step, release=tuple(sorted(reads - wanted))))
        wanted |= reads
    return tuple(reversed(kept))
