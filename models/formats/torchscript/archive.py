"""What a TorchScript archive is, read without loading it: refuses what is none and what could do harm.

TorchScript code runs while it is loaded and may read and write files (`aten::from_file`, `aten::save`,
`__setstate__`). The checks here go before loading; a server loads strangers' files in a sandbox all the same.
"""

from __future__ import annotations

import ast
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fusion.errors import BadFile, UnsupportedOperator
from models.formats.strangers import AGAIN, is_whole_zip, refuse

MAX_ENTRIES = 100_000
MAX_CODE_BYTES = 64 * 1024 * 1024
MAX_METADATA_BYTES = 4 * 1024 * 1024

# Calls that reach files or foreign memory. Whatever else is unknown fails at the layer it is in.
FORBIDDEN_CALLS = frozenset({"save", "from_file", "set_", "resize_", "resize_as_", "as_strided_"})
KNOWN_NAMESPACES = frozenset({"aten", "prim"})


@dataclass(frozen=True)
class Archive:
    """The readable parts of an archive: class and function sources, and the extra files beside them."""

    sources: Mapping[str, str]
    metadata: Mapping[str, Any]


def inspect(path: Path) -> Archive:
    """Checks a file before torch loads it. Raises BadFile, or UnsupportedOperator for a forbidden call."""
    if not path.is_file():
        raise BadFile(f"There is no file '{path.name}'. Give the path of a TorchScript file.")
    try:
        if not is_whole_zip(path):
            raise refuse(path)
        with zipfile.ZipFile(path) as archive:
            return _inspect(archive, path.name)
    except (zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError) as error:
        raise BadFile(f"'{path.name}' is damaged or truncated ({error}). {AGAIN}") from error


def _inspect(archive: zipfile.ZipFile, name: str) -> Archive:
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise BadFile(f"'{name}' holds {len(entries)} entries: it is no ordinary network. {AGAIN}")
    relative: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        inner = "/".join(parts[1:])
        if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename or inner in relative:
            raise BadFile(f"'{name}' holds the unsafe or repeated path '{entry.filename}'. {AGAIN}")
        relative[inner] = entry
    _check_kind(relative, name)
    if len({entry.filename.partition("/")[0] for entry in entries}) > 1:
        raise BadFile(f"'{name}' holds more than one network folder. {AGAIN}")
    if sum(entry.file_size for key, entry in relative.items() if key.startswith("code/")) > MAX_CODE_BYTES:
        raise BadFile(f"'{name}' holds more than {MAX_CODE_BYTES >> 20} MiB of code. {AGAIN}")
    for key, entry in relative.items():
        if not key.startswith(("code/", "extra/")) and entry.compress_type != zipfile.ZIP_STORED:
            raise BadFile(f"'{name}' holds compressed weights, which torch never writes. {AGAIN}")
    code = [(k, entry) for k, entry in relative.items() if k.startswith("code/") and k.endswith(".py")]
    sources = {key: archive.read(entry).decode("utf-8") for key, entry in code}
    _check_code(sources, name)
    return Archive(sources, _metadata(archive, relative))


def _check_kind(relative: Mapping[str, Any], name: str) -> None:
    code = any(key.startswith("code/") for key in relative)
    if code and "data.pkl" in relative:
        return
    if code:
        raise BadFile(f"'{name}' is a TorchScript archive without its weights (data.pkl). {AGAIN}")
    if "data.pkl" in relative:
        raise BadFile(
            f"'{name}' is a pickled state_dict or module, not a TorchScript file: it has weights, but no "
            "network that could be run. Build the network in Python, load the weights there, and save "
            "torch.jit.trace(model.eval(), example) or an ONNX file."
        )
    raise BadFile(f"'{name}' is a zip archive, but no TorchScript file. Save one with torch.jit.save.")


def _check_code(sources: Mapping[str, str], name: str) -> None:
    layers: dict[str, str] | None = None
    for key, source in sources.items():
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise BadFile(f"'{name}' holds damaged code ({key}). {AGAIN}") from error
        for owner, node in _definitions(tree):
            if isinstance(node, ast.FunctionDef) and node.name in {"__setstate__", "__getstate__"}:
                raise BadFile(
                    f"'{name}' runs code of its own while it is loaded ({owner}.{node.name}). "
                    "That is refused; export the network as ONNX."
                )
            for operator in _forbidden_calls(node):
                layers = layer_paths(sources) if layers is None else layers
                where = f"__torch__.{_module_name(key)}{owner}"
                raise UnsupportedOperator(operator, layers.get(where) or owner)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """(class name, member) for all members of classes, and ("", definition) for free functions."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from ((node.name, member) for member in node.body)
        else:
            yield "", node


def _forbidden_calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        base, called = node.func.value, node.func.attr
        namespace = base.attr if isinstance(base, ast.Attribute) and _is_name(base.value, "ops") else ""
        if (_is_name(base, "torch") or namespace in KNOWN_NAMESPACES) and called in FORBIDDEN_CALLS:
            yield f"aten::{called}"
        elif namespace and namespace not in KNOWN_NAMESPACES:
            yield f"{namespace}::{called}"


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def layer_paths(sources: Mapping[str, str]) -> dict[str, str]:
    """Where each class is first used: `__torch__.nets.Block` -> `features.0`, by attribute annotations."""
    members: dict[str, dict[str, str]] = {}
    for key, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                members[f"__torch__.{_module_name(key)}{node.name}"] = dict(_fields(node))
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
    """(name, type) of a class's attributes; names such as "0" are written `__annotations__["0"] = ...`."""
    for member in owner.body:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            yield member.target.id, ast.unparse(member.annotation)
        if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Subscript):
            target = member.targets[0]
            name = target.slice.value if isinstance(target.slice, ast.Constant) else ""
            yield str(name) if _is_name(target.value, "__annotations__") else "", ast.unparse(member.value)


def _module_name(key: str) -> str:
    inner = key.removeprefix("code/").removeprefix("__torch__").removesuffix(".py").strip("/")
    return inner.replace("/", ".") + "." if inner else ""


def _metadata(archive: zipfile.ZipFile, relative: Mapping[str, zipfile.ZipInfo]) -> dict[str, Any]:
    """The `_extra_files` of torch.jit.save: JSON objects merged, other text under its file's name."""
    found: dict[str, Any] = {}
    for key, entry in relative.items():
        if not key.startswith("extra/") or entry.file_size > MAX_METADATA_BYTES:
            continue
        name = key.removeprefix("extra/")
        try:
            text = io.TextIOWrapper(archive.open(entry), "utf-8").read()
        except UnicodeDecodeError:
            continue
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if isinstance(value, dict):
            found.update(value)
        else:
            found[PurePosixPath(name).stem] = value
    return found
