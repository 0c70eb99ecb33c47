"""From any nn.Module or ExportedProgram to a Network: torch.export, made functional, constants folded."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from fusion import core_aten  # noqa: F401  (registers its rewrites)
from fusion.errors import CaptureError, ClearfoldError
from fusion.free_batch import free_batch, keeps_apart
from fusion.network import Network, annotate, call, check_finite, is_size_arithmetic, op_name, prune
from fusion.normalize import DROPOUTS, argument, normalize
from fusion.outputs import follows, names_of
from fusion.recognition import recognized
from fusion.recognize import recognize_frozen
from fusion.tracing import TRACING

aten = torch.ops.aten

# Results that may share memory with their first argument although their schema does not say so.
_MAY_ALIAS = {
    "reshape",
    "contiguous",
    "flatten",
    "to",
    "unflatten",
    "einsum",
    "type_as",
    "unsafe_chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
}


# What is wrong with networks that return as much as they find, and what to do.
_COUNTING = (
    "What it does depends on the pixels. Leave out an `if` on values (torch.where chooses between two), and give a "
    "detector, whose non-maximum suppression answers with as many boxes as it finds, up to its raw heads: as a module "
    "that returns net.head(list(net.backbone(x).values()))."
)

_ODD_BATCH = 7


class _OneSize(CaptureError):
    """The graph runs with one batch size only."""


@torch.inference_mode(False)  # tensors made under it cannot take part in a backward pass later
def capture(module: nn.Module, example: tuple[Tensor, ...]) -> Network:
    """Capture a module as a Network with a free batch dimension; the module is left as it is.

    `example` holds one tensor per input, batch first, any batch size; only shapes and dtypes matter. Layers
    keep their module paths as names, weights their parameter names. Raises CaptureError where torch.export
    cannot trace the module or where the batch size is fixed inside it, NonFiniteWeights for NaN or infinity.
    """
    frozen = evaluation_twin(module)
    # torch.export takes sizes of 0 and 1 for fixed, so the batch it sees is 2.
    inputs = tuple(_with_batch(x, 2) for x in example)
    try:
        return from_exported(_export(frozen, inputs, _free_batch(frozen, inputs)))
    except CaptureError as error:
        for inputs in _fixed(frozen, example, error):
            try:
                return from_exported(_export(frozen, inputs, None))
            except ClearfoldError:
                continue
        raise


def _fixed(
    module: nn.Module, example: tuple[Tensor, ...], error: CaptureError
) -> Iterator[tuple[Tensor, ...]]:
    """Inputs to export a module with whose batch is a number to the tracer, to be freed behind it."""
    if isinstance(error, _OneSize):
        # Written as `len(x)`. A number that nobody writes himself tells the two apart.
        yield tuple(_with_batch(x, _ODD_BATCH) for x in example)
    if all(x.ndim for x in example) and not _follows(
        module, tuple(_with_batch(x, len(x) + 1) for x in example)
    ):
        yield example  # a trace that took the batch for a number itself: as many images as it is for


def _follows(module: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a module answers for each of the images."""
    try:
        with torch.no_grad():
            return follows(module(*inputs), len(inputs[0]))
    except Exception:  # modules raise anything
        return False


def _export(module: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...] | None) -> ExportedProgram:
    try:
        with TRACING, torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except ClearfoldError:
        raise
    except Exception as error:
        advice = "Check that it runs on an input of the given shape, and that its forward makes no decision on values."
        if "data-dependent" in str(error):
            advice = _COUNTING
        raise CaptureError(
            f"The network could not be captured as one graph: {_first_line(error)}. {advice}"
        ) from error


@torch.inference_mode(False)
def from_exported(program: ExportedProgram, shape: Sequence[int] = ()) -> Network:
    """The Network of a torch.export program with tensors as positional inputs, batch first.

    shape: the sizes of its inputs behind the batch, where the program leaves them open. A batch that the program fixes
    is freed (`fusion.free_batch`). Raises CaptureError where it cannot be.
    """
    graph, constants = _lift(program, shape)
    if not _functionalize(graph):
        # A view is written through: let torch's own functionalization sort it out (slower, more verbose).
        with TRACING:
            program = program.run_decompositions({})
        graph, constants = _lift(program, shape)
        if not _functionalize(graph):
            raise CaptureError("The network writes into tensors in place in a way that cannot be captured.")
    check_finite(constants)
    network = Network(graph, constants)
    normalize(network)
    recognize_frozen(network)
    fold_constants(network)
    declared = _fixed_batch(program)
    chosen = declared is not None and free_batch(network, declared)
    _annotate(network)
    if chosen and not keeps_apart(network):
        raise _OneSize(
            f"The network was traced for a batch of {declared}, and where in its reshapes the batch stands cannot be "
            "told. Export it with a dynamic batch dimension."
        )
    recognized(network)
    return network


def _annotate(network: Network) -> None:
    try:
        annotate(network)
    except DynamicOutputShapeException as error:
        raise CaptureError(
            f"The network cannot be captured as one graph ({_first_line(error)}). {_COUNTING}"
        ) from error
    except Exception as error:
        raise _OneSize(
            f"The network runs with a batch of one size only: {_first_line(error)}. "
            "Export it with a dynamic batch dimension."
        ) from error
    if not any(_follows_batch(node) for node in network.output_values):
        raise _OneSize(
            "The network's output does not follow the batch size of its input. "
            "Export it with a dynamic batch dimension, or without the reshape that fixes the batch."
        )


def _fixed_batch(program: ExportedProgram) -> int | None:
    """The batch size that the program was traced for, where it takes no other."""
    names = program.graph_signature.user_inputs
    inputs = (node for node in program.graph.nodes if node.op == "placeholder" and node.name in names)
    values = (node.meta.get("val") for node in inputs)
    batch = next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim), None)
    return batch if isinstance(batch, int) else None


def _follows_batch(output: fx.Node) -> bool:
    shape = output.meta["shape"]
    return bool(shape) and shape[0] is None


def evaluation_twin(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares the parameters; buffers are copied, since a forward may write them.

    The original's flags and tensors stay as they are.
    """
    shared: dict[int, Any] = {id(p): p for p in module.parameters()}
    for child in module.modules():
        # Hooks such as the old weight_norm keep computed tensors as attributes, which refuse to be copied.
        shared |= {id(v): v for v in vars(child).values() if isinstance(v, Tensor)}
    return copy.deepcopy(module, shared).eval()


def fold_constants(network: Network) -> None:
    """Compute whatever depends on no input now: weight norm, weight standardization and shape arithmetic vanish."""
    values: dict[fx.Node, Any] = {}
    for node in list(network.graph.nodes):
        if node.op == "get_attr":
            values[node] = network.constants[str(node.target)]
        elif (
            node.op == "call_function"
            and all(source in values for source in node.all_input_nodes)
            and not _is_random(node)
        ):
            with torch.no_grad():
                values[node] = call(node, values)
            if not isinstance(values[node], Tensor):
                continue
            constant = network.add_constant(_constant_name(node), values[node].contiguous(), before=node)
            constant.meta["layer"] = node.meta.get("layer", "")
            values[constant] = values[node]
            node.replace_all_uses_with(constant)
    prune(network)


def _with_batch(x: Tensor, batch: int) -> Tensor:
    if x.ndim == 0:
        raise CaptureError(
            "The network has an input without a batch dimension; only [batch, ...] can be captured."
        )
    return x[:1].expand(batch, *x.shape[1:]).contiguous()


def _free_batch(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What torch.export wants to hear of each argument of forward, as its signature has them (a decorator's `*args` is
    none of it): those that it takes by `*args` are a tuple."""
    free = {0: Dim.AUTO}
    taken = inspect.signature(module.forward).bind(*inputs).arguments.values()
    return tuple(tuple(free for _ in value) if isinstance(value, tuple) else free for value in taken)


def _first_line(error: Exception) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    ).rstrip(".")


def _lift(program: ExportedProgram, shape: Sequence[int]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Copy the program's graph, with parameters, buffers and tensor constants as `get_attr` nodes."""
    signature = program.graph_signature
    if any(spec.kind == OutputKind.BUFFER_MUTATION for spec in signature.output_specs):
        raise CaptureError("The network changes its own buffers while running; export it in evaluation mode.")
    tensors = {**program.state_dict, **program.constants}
    names = {
        spec.arg.name: str(spec.target)
        for spec in signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    one = _fixed_batch(program) == 1
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    for node in _without_nesting(program.graph_module):
        if node.op == "placeholder" and not node.users and not isinstance(node.meta.get("val"), Tensor):
            continue  # an argument that was no tensor is part of the graph already
        if node.op == "placeholder" and node.name in names:
            if not node.users:
                continue
            name = names[node.name]
            # A copy: who trains or changes the module afterwards must not change the network.
            constants[name] = tensors[name].detach().clone()
            new = graph.create_node("get_attr", name)
        elif node.op == "output":
            # What is written over the image comes among the outputs of a functional program; it is none.
            kinds = [spec.kind for spec in signature.output_specs]
            answers = [
                n
                for n, kind in zip(node.args[0], kinds, strict=True)
                if kind != OutputKind.USER_INPUT_MUTATION
            ]
            returned = names_of(program.call_spec.out_spec, len(answers))
            pairs = zip(returned, answers, strict=True)
            results = {name: mapped[n] for name, n in pairs if isinstance(n, fx.Node)}
            values = tuple(results.values())
            new = graph.output(values[0] if len(values) == 1 else values)
        elif node.op == "get_attr":
            raise CaptureError(
                f"The network contains a nested graph ('{node.target}'), which cannot be explained."
            )
        else:
            new = graph.node_copy(node, lambda n: mapped[n])
        val = node.meta.get("val")
        new.meta = {"layer": _layer(node)}
        if node.op == "output":
            new.meta["names"] = tuple(results)
        if node.op == "placeholder":
            if not isinstance(val, Tensor):
                raise CaptureError(
                    f"Input '{node.name}' is no tensor; export the network with tensor inputs only."
                )
            fixed = [size if isinstance(size, int) else None for size in val.shape[1:]]
            new.meta |= {"shape": (None, *(shape or fixed)), "dtype": val.dtype}
        elif node.op == "call_function":
            _pin(new, node, one)
        mapped[node] = new
    return graph, constants


def _without_nesting(module: fx.GraphModule) -> list[Any]:
    """The nodes of a graph in order, with those of nested graphs that merely run (no_grad blocks, autocast) in the
    place of the operators that run them: what autocast would compute in half precision is computed in the network's
    own. The exported program itself is left as it is."""
    if all(_body(node) is None for node in module.graph.nodes):
        return list(module.graph.nodes)
    flat = fx.Graph()
    flat.output(flat.graph_copy(module.graph, val_map={}))
    source = fx.GraphModule(module, flat)
    while nested := next((n for n in source.graph.nodes if _body(n) is not None), None):
        _inline(source, nested)
    for node in list(source.graph.nodes):
        if node.op == "get_attr" and not node.users:
            source.graph.erase_node(node)
    return list(source.graph.nodes)


def _body(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """(nested graph, its operands) of an operator that only runs it."""
    if node.op != "call_function":
        return None
    args, name = node.args, getattr(node.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":  # (enabled, graph, *operands)
        return args[1], args[2:]  # type: ignore[return-value]
    if name == "wrap_with_autocast":  # (device, dtype, enabled, cache, graph, *operands)
        return args[4], args[5:]  # type: ignore[return-value]
    return None


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    found = _body(node)
    assert found is not None
    attribute, operands = found
    body = module.get_submodule(str(attribute.target))
    assert isinstance(body, fx.GraphModule)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    name = str(attribute.target)
    inner: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=True))
    with module.graph.inserting_before(node):
        for part in body.graph.nodes:
            if part.op == "get_attr":  # nested deeper
                inner[part] = module.graph.create_node("get_attr", f"{name}.{part.target}")
            elif part.op == "call_function":
                inner[part] = module.graph.node_copy(part, lambda n: inner[n])
    results: Any = fx.node.map_arg(body.graph.output_node().args[0], lambda n: inner[n])
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"The network contains a nested graph ('{name}') of an unknown kind.")
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _pin(new: fx.Node, traced: fx.Node, one: bool) -> None:
    """Spell out what a call left to its surroundings: the default dtype, sizes, and which axes have size one. one: the
    program was traced for one image, so that its axis looks like those."""
    val = traced.meta.get("val")
    if not isinstance(new.target, torch._ops.OpOverload) or not isinstance(val, Tensor):
        return
    names = {argument.name for argument in new.target._schema.arguments}
    tensors = [n for n in traced.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if "dtype" in names and not tensors and new.kwargs.get("dtype") is None:
        new.kwargs = {**new.kwargs, "dtype": val.dtype}
    if new.target in (aten.reshape_as.default, aten.view_as.default):
        # The other tensor lends its sizes, not its values.
        other: fx.Node = new.args[1]  # type: ignore[assignment]
        with new.graph.inserting_before(new):
            shape = [
                size if isinstance(size, int) else new.graph.call_function(aten.sym_size.int, (other, i))
                for i, size in enumerate(val.shape)
            ]
        new.target, new.args = aten.reshape.default, (new.args[0], shape)
    if new.target is aten.as_strided.default and _lies(tensors[0].meta["val"]) == _lies(val):
        # The same elements in the same order: as a reshape it says nothing of memory.
        new.target, new.args, new.kwargs = aten.reshape.default, new.args[:2], {}
    if new.target is aten.squeeze.default:
        # A batch of one must stay an axis.
        sizes = tensors[0].meta["val"].shape
        new.target = aten.squeeze.dims
        single = [i for i, size in enumerate(sizes) if isinstance(size, int) and size == 1]
        new.args = (new.args[0], [i for i in single if i or not one])


def _lies(x: Tensor) -> tuple[Any, list[tuple[Any, Any]]]:
    """Where a tensor's elements are in memory: the offset, and (size, stride) of its axes but those of size one."""
    axes = zip(x.shape, x.stride(), strict=True)
    return x.storage_offset(), [(size, step) for size, step in axes if not isinstance(size, int) or size != 1]


def _layer(node: fx.Node) -> str:
    """The path of the innermost module that the node was traced in, else that of its weight."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    if not path or path.startswith("_empty"):
        weights = [n for n in node.all_input_nodes[1:2] if n.op == "placeholder" and "weight" in n.name]
        return (
            ""
            if not weights
            else weights[0].name.removeprefix("p_").removeprefix("b_").rpartition("_weight")[0]
        )
    return str(path)


def _functionalize(graph: fx.Graph) -> bool:
    """Replace in-place operators by their functional twins; False where a view of the written tensor is read later."""
    for node in list(graph.nodes):
        # An inactive dropout returns the very tensor it was given, so a write behind it is a write to that one.
        if (
            node.op == "call_function"
            and op_name(node).rstrip("_") in DROPOUTS
            and not argument(node, "train")
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not (node.op == "call_function" and _writes(node)):
            continue
        functional = _functional_twin(node)
        written = node.args[0]
        if functional is None or not isinstance(written, fx.Node):
            return False
        later = [
            a
            for a in _aliases(written) - {written} - {node}
            if any(order[u] > order[node] for u in a.users if u is not node)
        ]
        if any(a is not node and not _derived_from(a, node) for a in later):
            return False
        node.target = functional
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
    return True


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _functional_twin(node: fx.Node) -> Callable[..., Any] | None:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    packet = getattr(aten, op_name(node).rstrip("_"), None)
    overload = target._overloadname
    return getattr(packet, overload) if packet is not None and overload in packet.overloads() else None


def _aliases(node: fx.Node) -> set[fx.Node]:
    """All nodes that may share memory with this one."""
    found, todo = {node}, [node]
    while todo:
        current = todo.pop()
        neighbours = [u for u in current.users if _is_view(u) and u.args and u.args[0] is current]
        if _is_view(current) and isinstance(current.args[0], fx.Node):
            neighbours.append(current.args[0])
        for n in neighbours:
            if n not in found:
                found.add(n)
                todo.append(n)
    return found


def _derived_from(node: fx.Node, ancestor: fx.Node) -> bool:
    while node.op == "call_function" and _is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if node is ancestor:
            return True
    return node is ancestor


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return op_name(node) in _MAY_ALIAS or any(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _is_random(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _constant_name(node: fx.Node) -> str:
    weights: Sequence[str] = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    if len(weights) == 1 and not is_size_arithmetic(node):
        return f"{weights[0]}_folded" if not weights[0].endswith("_folded") else weights[0]
    layer = node.meta.get("layer", "")
    return f"{layer}.{node.name}" if layer else node.name
