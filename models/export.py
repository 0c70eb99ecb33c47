"""The export process: writes a stored network as an ONNX file or a torch.export program, and ends.

    python -m models.export FOLDER FILE

Tracing changes global state of torch while it runs, so it must not share a process with explanations.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import worker
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.export", description=__doc__)
    parser.add_argument("folder", type=Path, help="the artefact")
    parser.add_argument("file", type=Path, help="what to write: a .onnx or a .pt2 file")
    worker.add_arguments(parser)
    options = parser.parse_args(arguments)

    def work(say: Say) -> dict[str, Any]:
        import fusion

        say("writing")
        export(fusion.load(options.folder)[0], options.file)
        return {"bytes": options.file.stat().st_size}

    return worker.run(options, work)


if __name__ == "__main__":
    sys.exit(main())
