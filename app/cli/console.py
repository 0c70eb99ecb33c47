"""What the commands say: results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

out = Console()
err = Console(stderr=True)


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a text that can be changed, where somebody is watching."""
    with err.status(text) as status:
        yield status.update


@contextmanager
def transferring(text: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes, as `progress(done, total)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(text, total=total)

        def update(done: int, total: int) -> None:
            converting = "Converting" if done >= total else text
            progress.update(task, completed=done, total=total, description=converting)

        yield update


def say(text: str) -> None:
    """A line for people, on stderr."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def result(document: Any) -> None:
    """A result for programs, on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


def complain(error: Exception) -> bool:
    """Say in one line what is wrong; False for an error that is a mistake of ours."""
    text = _said(error)
    if text is None:
        return False
    err.print(f"clearfold: {text}", style="red", highlight=False, markup=False, soft_wrap=True)
    return True


def _said(error: Exception) -> str | None:
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    if isinstance(error, _known()):
        return " ".join(str(error).split())
    return None


def _known() -> tuple[type[Exception], ...]:
    """The errors meant for users, of those packages that have been imported at all."""
    names = (("fusion.errors", "ClearfoldError"), ("clearfold_client.problems", "Problem"))
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
