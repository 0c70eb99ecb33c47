"""Reads a TorchScript file. The only module, with program.py, that touches torch.jit (which will go away)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion.errors import BadFile, ClearfoldError, UnsupportedOperator
from models.formats.portions import any_number
from models.formats.probing import check_finite, find_example, first_line, map_tensors
from models.formats.torchscript import enums, integers
from models.formats.torchscript.archive import inspect
from models.formats.torchscript.layers import Script, ScriptLayer, ScriptNetwork
from models.formats.torchscript.packed import Packed
from models.formats.torchscript.program import FunctionRef, Graph, Node, as_value, parse_graph
from models.metadata import read_metadata

_C: Any = torch._C  # its stubs lack what a reader needs


@dataclass(frozen=True)
class TorchScriptSource:
    """A script as an nn.Module that torch.export captures, with the script's own forward to compare with."""

    module: nn.Module
    example: Tensor
    original: Callable[[Tensor], Any]
    notes: tuple[str, ...]
    metadata: Mapping[str, Any]
    channels_last: bool


def read(path: str | Path, *, size: tuple[int, int] | None = None) -> TorchScriptSource:
    """Reads a traced, scripted or frozen TorchScript file.

    TorchScript does not say what size of image the network takes: `size` (height, width) does, else the
    file's metadata, else 224x224. Raises BadFile, UnsupportedOperator (naming operator and layer),
    NonFiniteWeights.
    """
    path = Path(path)
    archive = inspect(path)
    functions, root = _load(path)
    with enums.known(archive.enums):
        module = _mirror(root, functions)
    check_finite(module)
    notes = integers.notes(_nodes(module))
    size = size or read_metadata(archive.metadata).get("size")
    example, last = find_example(module, size, notes, BadFile)
    original = any_number(_runner(root, example.dtype), len(example))
    return TorchScriptSource(module, example, original, tuple(notes), archive.metadata, last)


def _nodes(module: nn.Module) -> Iterator[Node]:
    """All nodes of a network's graphs."""
    for layer in module.modules():
        if isinstance(layer, ScriptLayer):
            for graph in (*layer.script.methods.values(), *layer.script.functions.values()):
                yield from graph.block.walk()


def _load(path: Path) -> tuple[Any, Any]:
    """(the file's functions, its top module in evaluation mode).

    These are the calls of torch.jit.load, which keeps the functions to itself."""
    wrap: Any = torch.jit._recursive.wrap_cpp_module
    functions = _C.CompilationUnit()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = _C.import_ir_module(functions, str(path), torch.device("cpu"), {}, False)
            root = wrap(raw)
            root.eval()
    except Exception as error:
        raise _load_error(path.name, error) from error
    return functions, root


def _load_error(name: str, error: Exception) -> ClearfoldError:
    for line in str(error).splitlines():
        if "Unknown builtin op:" in line:
            operator = line.partition("Unknown builtin op:")[2].strip(" .")
            return UnsupportedOperator(operator, _class_in(str(error)))
    return BadFile(f"'{name}' cannot be loaded as TorchScript: {first_line(error)}. Export or copy it again.")


def _class_in(message: str) -> str:
    """torch quotes the class in which loading failed."""
    classes = [line.split("__torch__.")[-1] for line in message.splitlines() if "__torch__." in line]
    return classes[0].split()[0].rstrip(",:(") if classes else ""


def _mirror(root: Any, functions: Any) -> ScriptNetwork:
    raw = root._c
    graphs = {function.qualified_name: function for function in functions.get_functions()}
    free: dict[str, Graph] = {}
    owners = list(_modules(raw, ""))
    methods = {
        path: {name: parse_graph(owner._get_method(name).graph) for name in owner._method_names()}
        for path, owner in owners
    }
    todo = [graph for table in methods.values() for graph in table.values()]
    while todo:
        for name in _called(todo.pop()):
            if name not in free and name in graphs:
                free[name] = parse_graph(graphs[name].graph)
                todo.append(free[name])
    wanted = {
        node.attributes["name"]
        for table in ({"": free}, methods)
        for scripts in table.values()
        for graph in scripts.values()
        for node in graph.block.walk()
        if node.kind == "prim::GetAttr"
    }
    network = _layer(raw, "", methods, wanted, free, ScriptNetwork)
    assert isinstance(network, ScriptNetwork)
    network.defaults = _defaults(raw, root.original_name)
    return network


def _modules(raw: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, raw
    for name, child in _C.ModuleDict(raw).items():
        yield from _modules(child, f"{path}.{name}".lstrip("."))


def _called(graph: Graph) -> Iterator[str]:
    for node in graph.block.walk():
        if node.kind == "prim::Constant" and isinstance(node.attributes["value"], FunctionRef):
            yield node.attributes["value"].name


def _layer(
    raw: Any,
    path: str,
    methods: Mapping[str, Mapping[str, Graph]],
    wanted: set[str],
    functions: Mapping[str, Graph],
    kind: type[ScriptLayer] = ScriptLayer,
) -> ScriptLayer:
    if raw._get_forward_hooks() or raw._get_forward_pre_hooks():
        raise UnsupportedOperator("forward hook", path, "Remove the hooks and export the network again.")
    children: dict[str, nn.Module] = {
        name: _layer(child, f"{path}.{name}".lstrip("."), methods, wanted, functions)
        for name, child in _C.ModuleDict(raw).items()
    }
    parameters = dict(_C.ParameterDict(raw).items())
    stored = dict(_C.BufferDict(raw).items())
    others = sorted(wanted - children.keys() - parameters.keys() - stored.keys())
    stored |= {name: raw.getattr(name) for name in others if raw.hasattr(name)}
    buffers: dict[str, Tensor] = {}
    packed: dict[str, Packed] = {}
    attributes: dict[str, Any] = {}
    for name, value in stored.items():
        value = as_value(value)
        table = buffers if isinstance(value, Tensor) else packed if isinstance(value, Packed) else attributes
        table[name] = value
    script = Script(path, methods[path], attributes, functions)
    return kind(script, parameters, buffers, {**children, **packed})


def _defaults(raw: Any, name: str) -> tuple[Any, ...]:
    if not raw._has_method("forward"):
        raise BadFile(f"The script '{name}' has no forward method. Save the network itself.")
    arguments = raw._get_method("forward").schema.arguments[1:]
    if not arguments or any(not argument.has_default_value() for argument in arguments[1:]):
        raise BadFile(
            f"The script '{name}' takes {len(arguments)} inputs; only one image batch can be given. "
            "Wrap it in a module that takes the image alone and save that."
        )
    return tuple(argument.default_value for argument in arguments[1:])


def _runner(root: Any, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    """The script's own forward on the CPU, in its own dtype; answers in the dtype it was asked in."""

    def run(x: Tensor) -> Any:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return map_tensors(root(x.detach().to("cpu", dtype, copy=True)), lambda t: t.to(x.dtype))

    return run
