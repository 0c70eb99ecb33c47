"""Heavy work off the event loop: a few threads, a short queue, and a clear no when it is full."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeVar

from app.problems import busy

T = TypeVar("T")

RETRY_AFTER = 2  # seconds


class Pool:
    """At most `threads` pieces of work at once and `queue` waiting; belongs to one event loop."""

    def __init__(self, name: str, threads: int, queue: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._room = threads + queue
        self._pending = 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work()`; raises the problem `overloaded` where the queue is full."""
        if self._pending >= self._room:
            raise busy(RETRY_AFTER, f"{self._pending} requests are already waiting: try again in a moment.")
        future = self._executor.submit(work)
        self._pending += 1
        # Counted until the thread is done, and not until the caller has lost interest.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _soon(loop, self._leave))
        return await asyncio.wrap_future(future)

    def _leave(self) -> None:
        self._pending -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)


@asynccontextmanager
async def entered(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """A context manager that touches the disk, entered and left in another thread."""
    value = await asyncio.to_thread(manager.__enter__)
    try:
        yield value
    finally:
        await asyncio.to_thread(manager.__exit__, *sys.exc_info())
