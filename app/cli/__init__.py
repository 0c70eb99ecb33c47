"""The command `clearfold`: one line per error, and nothing heavy imported before it is needed."""

import sys
from collections.abc import Sequence

import typer

from app.cli import explain, fuse, models, serve
from app.cli.console import complain

cli = typer.Typer(
    name="clearfold",
    help="Relevance heatmaps for trained image networks with normalization layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cli.command("serve")(serve.serve)
cli.command("explain")(explain.explain)
cli.command("fuse")(fuse.fuse)
cli.add_typer(models.cli, name="models")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends with exit code 2 for whatever the user can do something about."""
    try:
        cli(args=None if arguments is None else list(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not complain(error):
            raise
        sys.exit(2)
