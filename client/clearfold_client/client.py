"""The two clients. Each sends the same calls and differs only in how it waits."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Concatenate, ParamSpec, Self, TypeVar

import httpx

from clearfold_client import calls
from clearfold_client.calls import Call
from clearfold_client.problems import from_response, from_transport
from clearfold_client.uploads import Upload

P = ParamSpec("P")
T = TypeVar("T")

# Connecting is quick or will not be; a first explanation loads a network, an upload is converted.
TIMEOUT = httpx.Timeout(180.0, connect=5.0)
_BLOCK = 2**18


def _sync(build: Callable[P, Call[T]]) -> "Callable[Concatenate[Client, P], T]":
    @wraps(build)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(build(*args, **kwargs))

    return method


def _async(build: Callable[P, Call[T]]) -> "Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]":
    @wraps(build)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        # Building a call may read a file or encode an image.
        return await self._run(await asyncio.to_thread(build, *args, **kwargs))

    return method


class Client:
    """A Clearfold server. `timeout` is in seconds, for each wait; nothing is tried twice."""

    def __init__(self, url: str = "http://127.0.0.1:8000", timeout: float | httpx.Timeout = TIMEOUT) -> None:
        self.url = url
        self._http = httpx.Client(base_url=_base(url), timeout=timeout)

    explain = _sync(calls.explain)
    predict = _sync(calls.predict)
    models = _sync(calls.models)
    model = _sync(calls.model)
    layers = _sync(calls.layers)
    upload_model = _sync(calls.upload_model)
    change_model = _sync(calls.change_model)
    delete_model = _sync(calls.delete_model)
    download_fused = _sync(calls.download_fused)
    composites = _sync(calls.composites)
    methods = _sync(calls.methods)
    health = _sync(calls.health)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        body = call.body.blocks() if isinstance(call.body, Upload) else call.body
        request = self._http.build_request(**_parts(call), content=body)
        try:
            response = self._http.send(request, stream=True)
            try:
                if call.sink is None or not response.is_success:
                    response.read()
                _check(call, response)
                if call.sink is not None:
                    with _replacing(call.sink) as file:
                        for block in response.iter_bytes(_BLOCK):
                            file.write(block)
            finally:
                response.close()
        except httpx.TransportError as error:
            raise from_transport(error, self.url) from error
        result = call.parse(response)
        return result if call.then is None else self._run(call.then(result))


class AsyncClient:
    """The same for asyncio: every method is a coroutine."""

    def __init__(self, url: str = "http://127.0.0.1:8000", timeout: float | httpx.Timeout = TIMEOUT) -> None:
        self.url = url
        self._http = httpx.AsyncClient(base_url=_base(url), timeout=timeout)

    explain = _async(calls.explain)
    predict = _async(calls.predict)
    models = _async(calls.models)
    model = _async(calls.model)
    layers = _async(calls.layers)
    upload_model = _async(calls.upload_model)
    change_model = _async(calls.change_model)
    delete_model = _async(calls.delete_model)
    download_fused = _async(calls.download_fused)
    composites = _async(calls.composites)
    methods = _async(calls.methods)
    health = _async(calls.health)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Call[T]) -> T:
        body = _in_threads(call.body.blocks()) if isinstance(call.body, Upload) else call.body
        request = self._http.build_request(**_parts(call), content=body)
        try:
            response = await self._http.send(request, stream=True)
            try:
                if call.sink is None or not response.is_success:
                    await response.aread()
                _check(call, response)
                if call.sink is not None:
                    with _replacing(call.sink) as file:
                        async for block in response.aiter_bytes(_BLOCK):
                            await asyncio.to_thread(file.write, block)
            finally:
                await response.aclose()
        except httpx.TransportError as error:
            raise from_transport(error, self.url) from error
        result = call.parse(response)
        return result if call.then is None else await self._run(call.then(result))


def _base(url: str) -> str:
    return url.rstrip("/") + "/"


def _parts(call: Call[Any]) -> dict[str, Any]:
    return {
        "method": call.method,
        "url": call.path,
        "params": call.query,
        "headers": {"Accept": "application/json", **call.headers},
        "json": call.json,
        "files": call.files,
        "data": call.form,
    }


def _check(call: Call[Any], response: httpx.Response) -> None:
    if not response.is_success and response.status_code not in call.also:
        raise from_response(response)


async def _in_threads(blocks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (block := await asyncio.to_thread(next, blocks, b"")) != b"":
        yield block


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place only when it is complete."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
