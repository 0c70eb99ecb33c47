"""A child that has loaded its libraries and waits for a file: an upload need not wait seconds for them."""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.child import Child, start

_log = logging.getLogger(__name__)

Workspace = Callable[[], AbstractContextManager[Path]]


@dataclass(eq=False)
class Waiting:
    """A child that does one piece of work and ends. What it reads is put into `inbox`; it writes to `scratch`."""

    child: Child
    inbox: Path
    scratch: Path
    leave: ExitStack

    def take(self, source: Path, data: Sequence[str], program: Callable[[Path, Path], Sequence[str]]) -> bool:
        """Begin the work `program(file, scratch)` on a file with its data files of the same folder; False where the
        child has died meanwhile."""
        for name in (source.name, *data):
            _put(source.parent / name, self.inbox / name)
        return self.child.send(program(self.inbox / source.name, self.scratch))

    def close(self) -> None:
        self.child.end()
        self.leave.close()


class Spare:
    """At most one waiting child, in a workspace of its own. Safe to use from several threads."""

    def __init__(self, workspace: Workspace, options: Sequence[str]) -> None:
        self._workspace = workspace
        self._options = options
        self._lock = threading.Lock()
        self._waiting: Waiting | None = None
        self._closed = False

    def prepare(self) -> None:
        """Start a child, unless one waits already."""
        with self._lock:
            if self._waiting is None and not self._closed:
                try:
                    self._waiting = self._start()
                except OSError as error:  # files are converted without one, too
                    _log.warning("no conversion process waits for the next file: %s", error)

    @contextmanager
    def taken(self) -> Iterator[Waiting | None]:
        """The waiting child, or None where there is none; the next one is started when its work is done, so that they
        do not compete."""
        with self._lock:
            waiting, self._waiting = self._waiting, None
        try:
            yield waiting
        finally:
            if waiting is not None:
                waiting.close()
            self.prepare()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._waiting is not None:
                self._waiting.close()
                self._waiting = None

    def _start(self) -> Waiting:
        with ExitStack() as stack:
            folder = stack.enter_context(self._workspace())
            inbox, scratch = folder / "inbox", folder / "scratch"
            inbox.mkdir()
            scratch.mkdir()
            stderr = stack.enter_context((folder / "stderr").open("w+b"))
            child = start([*self._options, "--wait", "--read", str(inbox)], [], scratch, stderr)
            return Waiting(child, inbox, scratch, stack.pop_all())


def _put(source: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, file)
    except OSError:  # another volume, or one without links
        shutil.copyfile(source, file)
