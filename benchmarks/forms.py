"""The forms that a network's users have it in: how each is written, and what runs it besides Clearfold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.export import Dim

Runtime = Callable[[Tensor], Any]
Source = nn.Module | Path


@dataclass(frozen=True)
class Form:
    """`write` (module, images [N, C, H, W], folder) gives the file, or the module itself; `load` the form's own runtime
    for it. Both raise whatever the exporter and the runtime raise."""

    write: Callable[[nn.Module, Tensor, Path], Source]
    load: Callable[[Any], Runtime]


def _itself(module: nn.Module, x: Tensor, folder: Path) -> nn.Module:
    return module


def _trace(module: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "traced.pt"
    torch.jit.trace(module, x[:1], check_trace=False).save(path)
    return path


def _script(module: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "scripted.pt"
    torch.jit.script(module).save(path)
    return path


def _export(module: nn.Module, x: Tensor, folder: Path) -> Path:
    """As torch.export does by default: for the one image that it is given."""
    path = folder / "exported.pt2"
    torch.export.save(torch.export.export(module, (x[:1],)), path)
    return path


def _decompose(module: nn.Module, x: Tensor, folder: Path) -> Path:
    """In core ATen, as other tools want programs; for any number of images."""
    path = folder / "decomposed.pt2"
    program = torch.export.export(module, (x,), dynamic_shapes=({0: Dim.AUTO},))
    torch.export.save(program.run_decompositions(), path)
    return path


def _by_dynamo(module: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "dynamo.onnx"
    shapes = ({0: Dim.DYNAMIC},)
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return path  # the weights are beside it, in a file of their own, as this exporter leaves them


def _by_legacy(module: nn.Module, x: Tensor, folder: Path) -> Path:
    path = folder / "legacy.onnx"
    with (
        torch.enable_grad()
    ):  # without, nn.MultiheadAttention takes a fused path that this exporter cannot write
        torch.onnx.export(
            module,
            (x[:1],),
            path,
            dynamo=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            verbose=False,
        )
    return path


def _optimize(module: nn.Module, x: Tensor, folder: Path) -> Path:
    """ONNX Runtime's offline optimizer on a file that was written before."""
    path = folder / "optimized.onnx"
    source = next(p for p in (folder / "dynamo.onnx", folder / "legacy.onnx") if p.is_file())
    options = _options()
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    _session(source, options)
    return path


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    return options


def _session(path: Path, options: Any) -> Any:
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _onnx_runtime(path: Path) -> Runtime:
    session = _session(path, _options())
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(value) for value in session.run(None, {name: x.numpy()})]


def _torchscript(path: Path) -> Runtime:
    found: Runtime = torch.jit.load(path)
    return found


def _exported(path: Path) -> Runtime:
    return torch.export.load(path).module()


def _module(module: nn.Module) -> Runtime:
    return module


FORMS: dict[str, Form] = {
    "module": Form(_itself, _module),
    "traced": Form(_trace, _torchscript),
    "scripted": Form(_script, _torchscript),
    "exported": Form(_export, _exported),
    "decomposed": Form(_decompose, _exported),
    "dynamo": Form(_by_dynamo, _onnx_runtime),
    "legacy": Form(_by_legacy, _onnx_runtime),
    "optimized": Form(_optimize, _onnx_runtime),
}
