"""The file's own runtime, ONNX Runtime on the CPU: what certificates compare with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from torch import Tensor

from fusion.errors import BadFile
from models.formats.onnx.excerpt import excerpt
from models.formats.onnx.inputs import KINDS, neutral

# What ONNX Runtime says of an opset that it does not know yet, and what it says before anything else.
_NEWEST = re.compile(r"official support for domain ai\.onnx is till opset (\d+)")
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .{1,300}? failed: ?)?")


@dataclass(frozen=True)
class Runtime:
    """The original file as a function of float32 images, [batch, ...] in, float32 out; several outputs by their names.

    `file` is open for reading, so that it can be read whatever became of its name. `batch` is the size that it fixes,
    or None; other sizes are then run in pieces. Outputs in `bare` come without a batch axis, and get one. `inner`: they
    are values on the file's way to its outputs, and nothing behind them is run.
    """

    file: BinaryIO
    input: str
    outputs: tuple[str, ...]
    batch: int | None
    bare: frozenset[str] = frozenset()
    inner: bool = False

    @cached_property
    def _session(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # it keeps what the largest run took
        # Else the optimizer rounds what meets weights of four bits to eight, which no file asks for.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # Beyond this level weights are only laid out anew, for speed and at the price of a copy.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        try:
            return onnxruntime.InferenceSession(self._source(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _refused("does not accept", error) from error

    def _source(self) -> str | bytes:
        """The file under a name that its descriptor gives it, else its bytes, which take their size in memory more.

        (By a name, the runtime would also open other files that the network refers to: there are none any more when
        the network has been read.)"""
        if self.inner:
            self.file.seek(0)
            return excerpt(self.file.read(), self.outputs)
        name = Path(f"/dev/fd/{self.file.fileno()}")
        if name.exists():
            return str(name)
        self.file.seek(0)
        return self.file.read()

    def __call__(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        declared = next(i.type for i in self._session.get_inputs() if i.name == self.input)
        images = x.detach().cpu().numpy().astype(KINDS[declared])
        if self.batch is None:
            return self._named(self._run(images))
        pieces: list[list[Tensor]] = []
        for start in range(0, len(images), self.batch):
            piece = images[start : start + self.batch]
            missing = self.batch - len(piece)
            full = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
            pieces.append([result[: len(piece)] for result in self._run(full)])
        return self._named([torch.cat(column) for column in zip(*pieces, strict=True)])

    def _run(self, images: Any) -> list[Tensor]:
        session = self._session
        beside = {
            other.name: neutral(other.type, other.shape, len(images))
            for other in session.get_inputs()
            if other.name != self.input
        }
        try:
            results = session.run(list(self.outputs), {self.input: images, **beside})
        except Exception as error:  # the runtime has a class of its own for each of its codes
            raise _refused("cannot run", error) from error
        tensors = [torch.from_numpy(np.asarray(result, dtype=np.float32)) for result in results]
        return [t[None] if name in self.bare else t for name, t in zip(self.outputs, tensors, strict=True)]

    def _named(self, results: list[Tensor]) -> Tensor | dict[str, Tensor]:
        return results[0] if len(results) == 1 else dict(zip(self.outputs, results, strict=True))


def _refused(what: str, error: Exception) -> Exception:
    said = next(iter(str(error).splitlines()), type(error).__name__)
    if "alloc" in said:  # it has no class for that
        return MemoryError(said)
    newest = _NEWEST.search(said)
    if newest is not None:
        return BadFile(
            f"The installed ONNX Runtime runs ONNX opsets up to {newest[1]}, and the file uses a newer one. "
            f"Export it with opset {newest[1]} or an older one."
        )
    said = _PREFIX.sub("", said)
    return BadFile(f"ONNX Runtime {what} the file: {said[:500].rstrip('.')}. Export it again.")
