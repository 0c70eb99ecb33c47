"""From an ONNX file to "ready to explain": `python -m benchmarks.importing --json FILE [--markdown FILE] [--rounds N]`.

ResNet-50 as an exporter leaves it (batch norms kept, 102 MB) is uploaded to a server on this machine: read in the
sandbox, fused, certified against ONNX Runtime, checked and stored.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from clearfold_client import Client, NotReachable
from PIL import Image

from benchmarks import documents
from benchmarks.networks import Architecture

SECONDS_GOAL = 6.0
MEMORY_GOAL = 4.0  # times the file
SIDE = 224
_START = 120.0  # seconds that a server may take to be ready
_SETTLE = 15.0  # seconds until its waiting process has loaded, too


def export(folder: Path) -> Path:
    """torchvision's ResNet-50, with random weights, as the legacy exporter writes it when it folds nothing."""
    module = Architecture("torchvision:resnet50", (3, SIDE, SIDE)).build()
    file = folder / "resnet50.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the exporter is the legacy one
        torch.onnx.export(
            module,
            (torch.zeros(1, 3, SIDE, SIDE),),
            str(file),
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["image"],
            output_names=["scores"],
            dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}},
        )
    return file


@contextmanager
def serving(folder: Path, waits: bool) -> Iterator[Client]:
    """A server with an empty store, ready; `waits`: with a conversion process that waits for the next file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = "import sys; from app.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", "--port", str(port), "--data", str(folder)]
    settings = {"CLEARFOLD_SPARE_CONVERTER": str(waits), "CLEARFOLD_DEVICE": "cpu"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **settings})
        try:
            with Client(f"http://127.0.0.1:{port}", timeout=300) as client:
                _until_ready(client)
                time.sleep(_SETTLE)
                yield client
        finally:
            server.terminate()
            server.wait()


def _until_ready(client: Client) -> None:
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        try:
            if client.health().ready:
                return
        except NotReachable:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the server was not ready after {_START:g} seconds")


def upload(file: Path, waits: bool) -> dict[str, Any]:
    """Seconds from the first byte of the upload to the answer that the network is ready, and of its first heatmap."""
    image = Image.effect_mandelbrot((SIDE, SIDE), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), waits) as client:
        started = time.perf_counter()
        model = client.upload_model(file)
        ready = time.perf_counter()
        client.explain(image, model.id)
        return {
            "seconds": ready - started,
            "first_heatmap_seconds": time.perf_counter() - ready,
            "difference": model.certificate["max_relative"],
            "folded": model.fusion["folded"],
        }


def memory(file: Path) -> dict[str, int]:
    """Bytes resident at the peak: of a conversion process, and of one that only loads its libraries and has done a
    first small piece of work with them."""
    with tempfile.TemporaryDirectory() as folder:
        write = ["--write", folder]
        loaded = _peak([*write, "--wait"])
        return {
            "file": file.stat().st_size,
            "peak": _peak([*write, "--read", str(file), "convert", "--", str(file), folder]),
            "libraries": loaded,
        }


def _peak(arguments: Sequence[str]) -> int:
    """The largest resident size of a worker that ran well."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20), "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as log:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "models.worker", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        )
        largest = 0
        # What the system counts for a child at its end starts with the size of its parent, so it is asked on the way.
        while worker.poll() is None:
            largest = max(largest, _resident(worker.pid))
            time.sleep(0.01)
        if worker.returncode != 0:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace")[-2000:])
    return largest


def _resident(pid: int) -> int:
    """The largest resident size of a process so far, in bytes; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def summarize(rows: list[dict[str, Any]], used: dict[str, int]) -> dict[str, Any]:
    """Medians over the rounds, and the memory that a conversion takes beyond its libraries, in files."""

    def median(waits: bool, key: str) -> float:
        return statistics.median(row[key] for row in rows if row["waits"] == waits)

    return {
        "seconds": median(True, "seconds"),
        "seconds_without_a_waiting_process": median(False, "seconds"),
        "first_heatmap_seconds": median(True, "first_heatmap_seconds"),
        "seconds_goal": SECONDS_GOAL,
        "memory_over_file": (used["peak"] - used["libraries"]) / used["file"],
        "memory_over_file_with_libraries": used["peak"] / used["file"],
        "memory_goal": MEMORY_GOAL,
        "worst_relative_difference": max(row["difference"] for row in rows),
        "cores": os.cpu_count(),
    }


def markdown(document: dict[str, Any]) -> str:
    """docs/importing.md."""
    summary, used = document["summary"], document["memory"]
    mb = {name: f"{size / 1e6:.0f} MB" for name, size in used.items()}
    return "\n".join(
        [
            "# From a file to ready to explain",
            "",
            "Made by `python -m benchmarks.importing --json FILE --markdown docs/importing.md`: ResNet-50 with its 53",
            f"batch norms, an ONNX file of {mb['file']}, uploaded to a server on the same machine "
            f"({summary['cores']} cores). It is read in",
            "the sandbox, fused, certified against ONNX Runtime on 8 inputs, checked by the server and stored.",
            "",
            "| | measured | goal |",
            "| --- | --- | --- |",
            f"| first byte of the upload to ready | {summary['seconds']:.1f} s | {SECONDS_GOAL:g} s |",
            "| the same where no process waits (`CLEARFOLD_SPARE_CONVERTER=false`) "
            f"| {summary['seconds_without_a_waiting_process']:.1f} s | |",
            f"| the first heatmap after that | {summary['first_heatmap_seconds']:.1f} s | |",
            f"| peak memory beyond the libraries' | {summary['memory_over_file']:.1f} x the file "
            f"| {MEMORY_GOAL:g} x |",
            f"| peak memory with them | {summary['memory_over_file_with_libraries']:.1f} x the file | |",
            "",
            f"Libraries alone (torch, ONNX Runtime, loaded and once used) are resident with {mb['libraries']}, the",
            f"conversion at its peak with {mb['peak']}. Times are medians of {len(document['rows']) // 2} rounds.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    documents.add_outputs(parser)
    parser.add_argument("--rounds", type=int, default=3, help="uploads of each kind")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = export(Path(folder))
        for round_number in range(arguments.rounds):
            for waits in (True, False):
                rows.append({"round": round_number, "waits": waits, **upload(file, waits)})
                print(json.dumps(rows[-1]), flush=True)
        used = memory(file)
    document = {"summary": summarize(rows, used), "memory": used, "rows": rows}
    documents.write_json(arguments, document)
    documents.write_page(arguments, document, markdown)


if __name__ == "__main__":
    main()
