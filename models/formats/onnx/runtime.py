"""The file's own runtime, ONNX Runtime on the CPU: what certificates compare with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from torch import Tensor

from fusion.errors import BadFile

_INPUT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclass(frozen=True)
class Runtime:
    """The original file as a function of float32 images, [batch, ...] in, float32 out.

    `batch` is the size that the file fixes, or None; other sizes are then run in pieces.
    """

    data: bytes
    input: str
    output: str
    batch: int | None

    @cached_property
    def _session(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(self.data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadFile(
                f"ONNX Runtime does not accept the file: {str(error).splitlines()[0]}. Export it again."
            ) from error

    def __call__(self, x: Tensor) -> Tensor:
        declared = next(i.type for i in self._session.get_inputs() if i.name == self.input)
        images = x.detach().cpu().numpy().astype(_INPUT_TYPES[declared])
        if self.batch is None:
            return self._run(images)
        pieces = []
        for start in range(0, len(images), self.batch):
            piece = images[start : start + self.batch]
            missing = self.batch - len(piece)
            full = np.concatenate([piece, np.repeat(piece[-1:], missing, axis=0)]) if missing else piece
            pieces.append(self._run(full)[: len(piece)])
        return torch.cat(pieces)

    def _run(self, images: Any) -> Tensor:
        (result,) = self._session.run([self.output], {self.input: images})
        return torch.from_numpy(np.asarray(result, dtype=np.float32))
