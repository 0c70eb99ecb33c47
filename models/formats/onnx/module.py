"""The network as an nn.Module: one submodule per layer under the author's name, the weights under theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from models.formats.onnx.batch import Batched
from models.formats.onnx.names import unique
from models.formats.onnx.plan import Plan
from models.formats.onnx.steps import Argument, Constant, Static, Step, Variable
from models.formats.onnx.values import numbers


class Layer(nn.Module):
    """A place in the module tree: it holds weights and children, and runs its step if it has one."""

    _step: Step | None = None

    def forward(self, *arguments: Any) -> Any:
        assert self._step is not None
        return self._step.run(self._step.node, *arguments)

    def extra_repr(self) -> str:
        return "" if self._step is None else self._step.node.title


class OnnxModule(Layer):
    """An ONNX graph as a function of images [batch, ...], for any batch size, in float32. Several outputs come by their
    names."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._input, self._outputs = plan.input, plan.outputs
        names = iter(unique([step.node for step in plan.steps if not step.sizes]))
        self._paths: list[str | None] = []
        # Weights live in the module tree only, so that copying the module can share them.
        self._steps = [replace(step, arguments=()) for step in plan.steps]
        for step in self._steps:
            path, layer = (None, None) if step.sizes else _descend(self, next(names))
            if layer is not None:
                layer._step = step
            self._paths.append(path)
        weights: dict[int, str] = {}
        for constant in (a.value for step in plan.steps for a in step.arguments if isinstance(a, Constant)):
            if id(constant.tensor) not in weights:
                weights[id(constant.tensor)] = _register(self, constant.name, constant.tensor)
        self._sources: list[list[str | Argument]] = [
            [weights[id(a.value.tensor)] if isinstance(a, Constant) else a for a in step.arguments]
            for step in plan.steps
        ]
        self.eval()

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        values: dict[str, Any] = {self._input: x}
        for step, path, sources in zip(self._steps, self._paths, self._sources, strict=True):
            arguments = [self._resolve(source, values, x) for source in sources]
            results = (
                step.run(step.node, *arguments) if path is None else self.get_submodule(path)(*arguments)
            )
            for name, result in zip(
                step.node.outputs, results if isinstance(results, tuple) else (results,), strict=False
            ):
                values[name] = result
            for name in step.release:
                del values[name]
        results = {name: values[name] for name in self._outputs}
        return results if len(results) > 1 else results[self._outputs[0]]

    def _resolve(self, source: Any, values: dict[str, Any], x: Tensor) -> Any:
        match source:
            case str():
                owner, _, name = source.rpartition(".")
                return getattr(self.get_submodule(owner), name)
            case Variable(name):
                return values[name]
            case Batched():
                return numbers(source.sizes(x.shape[0]))
            case Static(value):
                return value
        raise TypeError(source)


def _descend(root: nn.Module, path: str) -> tuple[str, Layer]:
    """The layer at a path, made where it is missing; names that nn.Module needs itself get an underscore."""
    here: nn.Module = root
    taken = []
    for part in path.split("."):
        name = part or "_"
        while name not in here._modules and hasattr(here, name):
            name += "_"
        if name not in here._modules:
            here.add_module(name, Layer())
        here = here._modules[name]  # type: ignore[assignment]
        taken.append(name)
    assert isinstance(here, Layer)
    return ".".join(taken), here


def _register(root: Layer, name: str, tensor: Tensor) -> str:
    """Hold a weight under its own name (with an underscore where that is taken); its final name."""
    owner, _, last = name.rpartition(".")
    path, layer = _descend(root, owner) if owner else ("", root)
    key = last or "_"
    while hasattr(layer, key):
        key += "_"
    if tensor.is_floating_point():
        layer.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
    else:
        layer.register_buffer(key, tensor)
    return f"{path}.{key}" if path else key
