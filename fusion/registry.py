"""Functions by operator name: how passes, readers and rules are found without if-chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[F]):
    """`@registry("add", "sub")` registers a function for operators; `registry.get("add")` finds it."""

    def __init__(self) -> None:
        self._functions: dict[str, F] = {}

    def __call__(self, *ops: str) -> Callable[[F], F]:
        def register(function: F) -> F:
            self._functions.update(dict.fromkeys(ops, function))
            return function

        return register

    def get(self, op: str) -> F | None:
        return self._functions.get(op)
