"""What a TorchScript archive is, read without loading it: refuses what is none and what could do harm.

TorchScript code runs while it is loaded and may read and write files (`aten::from_file`, `aten::save`, `__setstate__`).
So before loading, its zip directory, its pickles and its code are held against what torch writes (`models.scan`,
`allowed.py`). That is depth, not proof: strangers' files are loaded in a confined process all the same.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from fusion.errors import BadFile, ClearfoldError, UnsafeFile, UnsupportedOperator
from models.formats.strangers import AGAIN, is_whole_zip, refuse
from models.formats.torchscript.allowed import (
    CLASSES,
    GLOBALS,
    OUTSIDE,
    OUTSIDE_SPACES,
    UNREADABLE,
    vocabulary,
)
from models.formats.torchscript.enums import enumerations
from models.scan.pickles import scan_entries
from models.scan.scripts import Call, Scripts, dotted, parse, scan_scripts
from models.scan.zips import DAMAGE, Contents, contents, damaged

MAX_CODE_BYTES = 64 * 1024 * 1024
# The images that a network was traced with, left out of the file, and the bytecode of the lite interpreter: nothing
# that torch.jit.load asks for.
_UNREAD = ("traced_inputs.pkl", "bytecode.pkl")
MAX_METADATA_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Archive:
    """The extra files that an archive of a network brings along, and the enumerations of its code by their names."""

    metadata: Mapping[str, Any]
    enums: Mapping[str, type[Enum]]


def inspect(path: Path) -> Archive:
    """Checks a file before torch loads it. Raises BadFile, UnsafeFile, or UnsupportedOperator for a call of an operator
    that is not known as harmless."""
    if not path.is_file():
        raise BadFile(f"There is no file '{path.name}'. Give the path of a TorchScript file.")
    try:
        whole = is_whole_zip(path)
    except DAMAGE as error:
        raise damaged(path.name, error) from error
    if not whole:
        raise refuse(path)
    found = contents(path, path.name, _may_be_compressed)
    _check_kind(found)
    scripts = _scripts(found)
    _scan_pickles(found, scripts)
    call = scan_scripts(scripts, vocabulary(), path.name)
    if call is not None:
        raise _refused(call, scripts, path.name)
    return Archive(_metadata(found), enumerations(scripts))


def _may_be_compressed(name: str) -> bool:
    """Torch compresses code and what belongs to it; what the author put beside it may be so, too."""
    return name.startswith(("code/", "extra/"))


def _is_code(name: str) -> bool:
    return name.startswith("code/") and name.endswith(".py")


def _is_pickle(name: str) -> bool:
    return name.endswith(("pkl", "pickle")) and not name.startswith("extra/")


def _check_kind(found: Contents) -> None:
    name = found.name
    code = found.named(lambda entry: entry.startswith("code/"))
    if code and "data.pkl" in found.entries:
        return
    if code:
        raise BadFile(f"'{name}' is a TorchScript archive without its weights (data.pkl). {AGAIN}")
    if "data.pkl" in found.entries:
        raise BadFile(
            f"'{name}' is a pickled state_dict or module, not a TorchScript file: it has weights, but no "
            "network that could be run. Build the network in Python, load the weights there, and save "
            "torch.jit.trace(model.eval(), example) or an ONNX file."
        )
    raise BadFile(f"'{name}' is a zip archive, but no TorchScript file. Save one with torch.jit.save.")


def _scripts(found: Contents) -> Scripts:
    name = found.name
    code = found.named(_is_code)
    odd = set(found.named(lambda entry: entry.startswith("code/") and not _is_pickle(entry))) - set(code)
    if odd:
        raise UnsafeFile(f"'{name}' holds '{min(odd)}' among its code", "Torch writes no such file.")
    if sum(found.entries[entry].file_size for entry in code) > MAX_CODE_BYTES:
        raise BadFile(f"'{name}' holds more than {MAX_CODE_BYTES >> 20} MiB of code. {AGAIN}")
    return parse(dict(found.read_all(code)), name)


def _scan_pickles(found: Contents, scripts: Scripts) -> None:
    own = {whole for whole, _ in scripts.classes()} | CLASSES

    def allowed(module: str, name: str) -> bool:
        return (module, name) in GLOBALS or f"{module}.{name}" in own

    scan_entries(found, found.named(_is_pickle), allowed, _UNREAD)


def _refused(call: Call, scripts: Scripts, name: str) -> ClearfoldError:
    layer = layer_paths(scripts).get(call.owner) or call.owner.removeprefix("__torch__").strip(".")
    space = call.operator.partition("::")[0]
    deed = OUTSIDE.get(call.operator) or OUTSIDE_SPACES.get(space)
    if deed is not None:
        where = f"layer '{layer}'" if layer else "its code"
        return UnsafeFile(
            f"'{name}' calls {call.operator} in {where}, which {deed}", "No network needs that."
        )
    hint = next((hint for part, hint in UNREADABLE.items() if part in call.operator), "")
    return UnsupportedOperator(call.operator, layer, hint)


def layer_paths(scripts: Scripts) -> dict[str, str]:
    """Where each class is first used: `__torch__.nets.Block` -> `features.0`, by attribute annotations."""
    members = {whole: dict(_fields(node)) for whole, node in scripts.classes()}
    used = {kind for fields in members.values() for kind in fields.values()}
    paths = {root: "" for root in members if root not in used}
    todo = list(paths)
    while todo:
        owner = todo.pop(0)
        for field, kind in members[owner].items():
            if kind in members and kind not in paths:
                paths[kind] = f"{paths[owner]}.{field}".lstrip(".")
                todo.append(kind)
    return paths


def _fields(owner: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """(name, class) of a class's attributes; names such as "0" are written `__annotations__["0"] = ...`."""
    for member in owner.body:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            yield member.target.id, _whole(member.annotation)
        if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Subscript):
            target = member.targets[0]
            name = target.slice.value if isinstance(target.slice, ast.Constant) else ""
            owned = isinstance(target.value, ast.Name) and target.value.id == "__annotations__"
            yield str(name) if owned else "", _whole(member.value)


def _whole(node: ast.AST) -> str:
    return ".".join(dotted(node) or ())


def _metadata(found: Contents) -> dict[str, Any]:
    """The `_extra_files` of torch.jit.save: JSON objects merged, other text under its file's name."""
    merged: dict[str, Any] = {}
    small = [
        entry
        for entry in found.named(lambda entry: entry.startswith("extra/"))
        if found.entries[entry].file_size <= MAX_METADATA_BYTES
    ]
    for entry, data in found.read_all(small):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(value, dict):
            merged.update(value)
        else:
            merged[PurePosixPath(entry).stem] = value
    return merged
