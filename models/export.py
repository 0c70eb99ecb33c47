"""The export: writes a stored network as an ONNX file or a torch.export program.

Tracing changes global state of torch while it runs, so it must not share a process with explanations: it runs in
a child process (`models.worker`). Arguments: FOLDER FILE.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.worker import Say

if TYPE_CHECKING:
    from fusion import Network

FORMATS = ("onnx", "pt2")


def export(network: "Network", file: Path) -> None:
    """Write a network in the format that the file's suffix names: .onnx or .pt2."""
    import fusion

    writers: dict[str, Callable[[Network, Path], None]] = {
        ".onnx": fusion.to_onnx,
        ".pt2": fusion.save_exported,
    }
    writers[file.suffix.lower()](network, file)


def work(arguments: Sequence[str], say: Say) -> dict[str, Any]:
    """What the child process does."""
    import fusion

    parser = argparse.ArgumentParser(prog="python -m models.worker export", description=__doc__)
    parser.add_argument("folder", type=Path, help="the artefact")
    parser.add_argument("file", type=Path, help="what to write: a .onnx or a .pt2 file")
    options = parser.parse_args(arguments)
    say("writing")
    export(fusion.load(options.folder)[0], options.file)
    return {}
