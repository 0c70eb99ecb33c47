"""The parts of a running server, made once and handed to every request."""

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends
from starlette.requests import Request

from app.child import Confined
from app.conversion import SHUTTING_DOWN, ConversionFailed, Converter
from app.engine import Engine
from app.library import Library
from app.problems import Problem, busy
from app.settings import Settings
from app.work import Pool
from models.store import BUILTIN, Store, UnknownModel

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Service:
    """Store, engine and threads of one server; lives as long as the event loop that it was made in."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.data)
        workspace = self.store.workspace if settings.spare_converter else None
        self.library = Library(
            self.store, Converter(settings.conversion_seconds, settings.conversion_memory, workspace)
        )
        self.engine = Engine(self.store, settings.device, settings.loaded_models)
        self.explaining = Pool("explain", settings.concurrency, settings.queue)
        self.converting = Pool("convert", settings.conversions, settings.queue)
        self.trouble: str | None = "The server is still preparing its default network."
        self.sandbox: Confined | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def refused_formats(self) -> tuple[str, ...]:
        return () if self.settings.allow_executable else ("torchscript", "export")

    def start(self) -> None:
        """Begin to make the default network ready; until then `trouble` says what is missing. Beside that, find out
        what holds conversions here."""
        self.store.sweep()
        self._tasks = [
            asyncio.create_task(self._prepare()),
            asyncio.create_task(asyncio.to_thread(self._try_sandbox)),
        ]

    async def stop(self) -> None:
        self.library.converter.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.converting.close)
        await asyncio.to_thread(self.explaining.close)

    async def explain(self, reference: str, work: Callable[[], T]) -> T:
        """Run work on the network `reference` when it is its turn."""
        try:
            return await self.explaining.run(work)
        except UnknownModel as error:
            raise self._not_yet(reference) or error from None

    async def _prepare(self) -> None:
        try:
            await self.converting.run(self.library.ensure_builtin)
            await self.explaining.run(lambda: self.engine.ready(self.settings.default_model))
            self.trouble = None
            await asyncio.to_thread(self.library.converter.prepare)
        except UnknownModel as error:
            self.trouble = f"The default network is missing. {error}"
        except Exception as error:
            _log.exception("the default network could not be made ready")
            self.trouble = f"The default network could not be made ready: {error}"
        if self.trouble:
            _log.error("%s", self.trouble)

    def _try_sandbox(self) -> None:
        """Confine a process that does nothing, and say once what held it."""
        try:
            self.sandbox = self.library.converter.confinement()
        except ConversionFailed as error:
            if error.code != SHUTTING_DOWN:
                _log.error("the sandbox of uploads could not be tried: %s", error)
        else:
            _report(self.sandbox)

    def _not_yet(self, reference: str) -> Problem | None:
        """What to say of a network that is not there because the server has only just started."""
        if reference in (BUILTIN, self.settings.default_model) and self.trouble:
            return busy(5, self.trouble, "model-not-ready")
        return None


def _report(sandbox: Confined) -> None:
    layers = "; ".join(f"{name}: {how}" for name, how in sandbox.layers.items())
    _log.info("uploads are read in a sandbox (%s)", layers)
    for name, why in sandbox.missing.items():
        _log.warning("the sandbox of uploads lacks %s: %s", name, why)


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


Serving = Annotated[Service, Depends(_service)]
