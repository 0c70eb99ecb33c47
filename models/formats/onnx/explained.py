"""Errors that name the layer: whatever is raised where a node of a file is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusion.errors import BadFile, ClearfoldError
from models.formats.onnx.registry import Node


@contextmanager
def explained(node: Node) -> Iterator[None]:
    """Turn whatever an operator raises into an error that names the layer."""
    try:
        yield
    except (ClearfoldError, MemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # torch has no class for that
            raise MemoryError(str(error)) from error
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
        if not isinstance(
            error, RuntimeError
        ):  # what Python says of indices and lengths, not torch of shapes
            line = f"its inputs and attributes do not fit together ({line.rstrip('.')})"
        raise BadFile(
            f"Layer '{node.called}' ({node.title}) cannot run: {line.rstrip('.')}. "
            "Check that the file runs in ONNX Runtime at this image size, "
            "and export it with a dynamic batch dimension."
        ) from error
