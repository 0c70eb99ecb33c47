"""The enumerations that a script's code defines. torch hands out their members only where Python knows their class: the
one that the network was written with, which need not be installed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any

import torch

from models.scan.scripts import Scripts


def enumerations(scripts: Scripts) -> dict[str, type[Enum]]:
    """A class for each enumeration, by its whole name; none of members that Python does not take, or without values."""
    found: dict[str, type[Enum]] = {}
    for whole, node in scripts.classes():
        if any(isinstance(base, ast.Name) and base.id == "Enum" for base in node.bases):
            with suppress(ValueError, TypeError):
                found[whole] = Enum(node.name, dict(_members(node)))  # type: ignore[assignment]
    return found


def _members(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for member in node.body:
        if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
            yield member.targets[0].id, ast.literal_eval(member.value)


@contextmanager
def known(enums: Mapping[str, type[Enum]]) -> Iterator[None]:
    """Lets torch find these classes meanwhile, but those that it has already."""
    table: dict[str, type[Any]] = torch.jit._state._name_to_pyclass
    added = {name: kind for name, kind in enums.items() if name not in table}
    table.update(added)
    try:
        yield
    finally:
        for name in added:
            table.pop(name, None)
