"""`clearfold serve`: the server, on this machine."""

from typing import Annotated

import typer

from app.cli.console import say, working
from app.cli.options import Data, read_settings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000].")] = None,
    data: Data = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... [auto].")] = None,
    allow_executable: Annotated[
        bool | None,
        typer.Option(
            "--allow-executable/--no-allow-executable",
            help="Take TorchScript and torch.export files too, which can run code when they are read [no].",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve the HTTP API and the page until Ctrl-C. Every setting is also a variable CLEARFOLD_*."""
    import logging

    folder = data.absolute() if data is not None else None
    settings = read_settings(
        host=host, port=port, data=folder, device=device, allow_executable=allow_executable
    )
    with working("Loading"):
        import uvicorn

        from app.main import create_app

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    say(f"Clearfold at http://{settings.host}:{settings.port} (models in {settings.data})")
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
