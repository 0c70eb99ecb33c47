"""`make demo`: the server with its built-in network, and one explanation through the real API."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import threading
import time
from pathlib import Path

import uvicorn
from clearfold_client import Client

from app.main import create_app
from app.settings import Settings
from models.zoo.samples import sample_files

OUTPUT = Path("demo-output")
READY_SECONDS = 180.0


def main() -> int:
    """Serve until Ctrl-C (or, with --once, until the heatmap is written); returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m app.demo", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--once", action="store_true", help="stop after the heatmap is written")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="folder for the heatmap and the model store"
    )
    arguments = parser.parse_args()
    if _taken(arguments.host, arguments.port):
        print(f"Port {arguments.port} is in use. Say: make demo PORT={arguments.port + 1}", file=sys.stderr)
        return 2
    output: Path = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        host=arguments.host,
        port=arguments.port,
        data=output / "store",
        log_level="warning",
        allow_executable=True,  # on one's own machine, for one's own files
    )
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_graceful_shutdown=5,
        )
    )
    failures: list[BaseException] = []

    def visit() -> None:
        try:
            _explain_sample(f"http://{settings.host}:{settings.port}", output, server)
            print("Stopping." if arguments.once else "Serving until Ctrl-C.", flush=True)
        except Exception as error:  # the server must not go on as if the demo had worked
            failures.append(error)
        if arguments.once or failures:
            server.should_exit = True

    print("Starting the server ...", flush=True)
    visitor = threading.Thread(target=visit, daemon=True)
    visitor.start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    visitor.join(timeout=5)
    if failures:
        print(f"The demo failed: {failures[0]}", file=sys.stderr)
        return 1
    return 0


def _explain_sample(url: str, output: Path, server: uvicorn.Server) -> None:
    sample = sample_files()[0]
    with Client(url) as clearfold:
        deadline = time.monotonic() + READY_SECONDS
        while not (server.started and clearfold.health().ready):
            if time.monotonic() > deadline:
                raise TimeoutError("the built-in network did not become ready")
            time.sleep(0.2)
        explanation = clearfold.explain(sample.image)
    path = output / f"{sample.name}.heatmap.png"
    explanation.overlay().resize((512, 512)).save(path)
    top, sums = explanation.prediction, explanation.sums
    assert sums is not None  # LRP keeps them
    assert top is not None  # the built-in network has classes
    print(f"Image      {sample.image}")
    print(f"Heatmap    {path}")
    print(f"Class      {top.label} ({top.probability:.1%})")
    print(f"Relevance  {sums['input']:.3f} of the score {sums['score']:.3f} is in the pixels,")
    print(f"           {sums['kept']:.3f} stayed in the network")
    print(f"Page       {url}/", flush=True)


def _taken(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
