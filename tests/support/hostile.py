"""Files that are made to harm whoever opens them, each small and made on the spot."""

import io
import pickle
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

_IMAGE = ["N", 3, 32, 32]
_node = helper.make_node


def onnx_file(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, Any] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """From images `x` to scores `y`."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _IMAGE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


def chain(count: int, op: str = "Relu", domain: str = "") -> list[onnx.NodeProto]:
    """From x to y in so many steps."""
    names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    return [_node(op, [a], [b], domain=domain) for a, b in pairwise(names)]


def classifier(count: int) -> bytes:
    """So many layers in a row, and class scores."""
    nodes = chain(count)
    nodes[-1].output[0] = "f"
    head = [_node("GlobalAveragePool", ["f"], ["p"]), _node("Flatten", ["p"], ["y"])]
    return onnx_file([*nodes, *head]).SerializeToString()


def functions(calls: int, depth: int) -> bytes:
    """Functions that each call the next one so many times."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    bodies = [chain(calls, f"f{i + 1}", "own") for i in range(depth - 1)] + [chain(1)]
    made = [helper.make_function("own", f"f{i}", ["x"], ["y"], b, imports) for i, b in enumerate(bodies)]
    return onnx_file(chain(1, "f0", "own"), functions=made).SerializeToString()


def external(place: str, elements: int = 3, count: int = 1, **where: object) -> bytes:
    """Weights that are in another file, so many times."""
    model = onnx_file([_node("Add", ["x", "w0"], ["y"])])
    for i in range(count):
        tensor = model.graph.initializer.add(
            name=f"w{i}",
            dims=[elements],
            data_type=TensorProto.FLOAT,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in {"location": place, **where}.items():
            tensor.external_data.add(key=key, value=str(value))
    return model.SerializeToString()


def declared(elements: int) -> bytes:
    """Weights of a size that are not there."""
    model = onnx_file([_node("Add", ["x", "w"], ["y"])])
    model.graph.initializer.append(TensorProto(name="w", dims=[elements], data_type=TensorProto.FLOAT))
    return model.SerializeToString()


def filled(shape: Sequence[int]) -> bytes:
    """A few bytes that ask for a tensor of this shape."""
    nodes = [_node("ConstantOfShape", ["s"], ["c"]), _node("Add", ["x", "c"], ["y"])]
    return onnx_file(nodes, {"s": np.array(shape)}).SerializeToString()


def hoard(count: int) -> bytes:
    """So many tensors of half a gibibyte each, which are all needed to the end."""
    nodes = [_node("ConstantOfShape", [f"s{i}"], [f"c{i}"]) for i in range(count)]
    nodes += [_node("Concat", [f"c{i}" for i in range(count)], ["all"], axis=0)]
    nodes += [_node("ReduceMax", ["all"], ["m"], keepdims=0), _node("Mul", ["x", "m"], ["y"])]
    return onnx_file(nodes, {f"s{i}": np.array([2**27]) for i in range(count)}).SerializeToString()


def endless() -> bytes:
    """A loop without a number of rounds whose condition stays true."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [_node("Identity", ["c"], ["d"]), _node("Relu", ["a"], ["b"])],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("c", TensorProto.BOOL, []),
            value("a", TensorProto.FLOAT, None),
        ],
        [value("d", TensorProto.BOOL, []), value("b", TensorProto.FLOAT, None)],
    )
    loop = _node("Loop", ["", "go", "x"], ["y"], body=body)
    return onnx_file([loop], {"go": np.array(True)}).SerializeToString()


def circle() -> bytes:
    """Two nodes that wait for each other."""
    nodes = [_node("Add", ["x", "b"], ["a"]), _node("Relu", ["a"], ["b"]), _node("Relu", ["b"], ["y"])]
    return onnx_file(nodes).SerializeToString()


def messages(count: int) -> bytes:
    """So many empty nodes, of two bytes each."""
    nodes, length = b"\x0a\x00" * count, bytearray()
    size = len(nodes)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return b"\x3a" + bytes([*length, size]) + nodes


def named(length: int) -> bytes:
    """An operator whose name is that long."""
    return onnx_file([_node("R" * length, ["x"], ["y"], name="n" * length)]).SerializeToString()


class WritesInForward(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        torch.ops.aten.save(x, self.path)
        return self.fc(x.mean([2, 3]))  # type: ignore[no-any-return]


class ReadsInForward(WritesInForward):
    def forward(self, x: Tensor) -> Tensor:
        found = torch.from_file(self.path, False, 4, dtype=torch.uint8)
        return self.fc(x.mean([2, 3])) + found.sum()  # type: ignore[no-any-return]


class WritesOnLoad(nn.Module):
    """Has a state of its own, so that loading it runs its code."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3])

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.ops.aten.save(torch.zeros(3), self.path)


class ReadsOnLoad(WritesOnLoad):
    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = bool(torch.from_file(self.path, False, 1).sum() > 0)


def scripted(kind: type[nn.Module], path: str) -> bytes:
    """TorchScript that does to a path what its kind does."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(kind(path).eval()), buffer)
    return buffer.getvalue()


def zip_bomb(mebibytes: int) -> bytes:
    """A TorchScript archive whose weights are packed, and unpack to a thousand times their size."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(scripted(WritesOnLoad, "none"))) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr(source.namelist()[0].partition("/")[0] + "/data/9", bytes(mebibytes * 2**20))
    return packed.getvalue()


class _Calls:
    """Pickled, a call of the system's shell."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.path}",)


def pickled(path: str) -> bytes:
    """A pickle that makes a file, in the protocol that torch writes."""
    return pickle.dumps(_Calls(path), protocol=2)


def archived(path: str) -> bytes:
    """The same within a TorchScript archive."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(scripted(WritesInForward, "none"))) as source,
        zipfile.ZipFile(packed, "w") as target,
    ):
        for name in source.namelist():
            target.writestr(name, pickled(path) if name.endswith("data.pkl") else source.read(name))
    return packed.getvalue()
