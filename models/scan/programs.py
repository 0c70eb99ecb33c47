"""torch.export archives (.pt2): what their JSON names, and which of their parts would be unpickled.

torch.export.load looks up each operator of the graph by the path that the file gives (`torch.os.system` is one), lets
sympy evaluate the file's expressions of sizes, unpickles what the file says is pickled, and loads compiled code. All
that is held against what torch.export.save writes of a network.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Container, Iterator
from typing import Any

from fusion.errors import BadFile, UnsafeFile
from models.formats.strangers import AGAIN
from models.scan.pickles import Allowed, scan_entries
from models.scan.zips import Contents, contents

MAX_JSON = 256 * 1024 * 1024
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(\.\w+)?")
_PYTHON = re.compile(r"(_operator|math)\.(?!_)\w+|torch\.(_C\._)?sym_\w+|torch\._sym_\w+")
# Wrappers of nested graphs, and quantization as torch.ao exports it.
_SPACES = frozenset({"higher_order", "quantized_decomposed", "torchvision"})
_EXPRESSIONS = (
    ast.Expression, ast.Name, ast.Constant, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.Tuple,
)  # fmt: skip
_FUNCTIONS = frozenset(
    """
    Symbol Integer Float Rational Add Mul Pow Max Min Mod Eq Ne Lt Le Gt Ge And Or Not Abs Piecewise ceiling floor
    FloorDiv CleanDiv CeilDiv ModularIndexing PythonMod Where CeilToInt FloorToInt RoundToInt RoundDecimal ToFloat
    TruncToInt TruncToFloat IntTrueDiv FloatTrueDiv FloatPow PowByNatural Identity LShift RShift
    OpaqueUnaryFn_sqrt
    """.split()
)
_COMPILED = ("data/aotinductor/", "data/executorch/")


def scan_program(found: Contents, operators: Container[str], allowed: Allowed, extra: str) -> None:
    """Raises UnsafeFile for what no exported network needs, BadFile for what is damaged. `operators` ("aten::relu")
    are those that may be called, `allowed` says which names pickles may call for; files below the folder `extra` are
    the author's own, which nothing loads."""

    def ending(*ends: str) -> list[str]:
        return found.named(lambda entry: entry.endswith(ends) and not entry.startswith(f"{extra}/"))

    compiled = found.named(lambda entry: entry.startswith(_COMPILED))
    if compiled:
        raise UnsafeFile(
            f"'{found.name}' holds compiled code ('{compiled[0]}')", "Save it with torch.export.save alone."
        )
    for entry in ending(".json"):
        where = f"'{found.name}' ({entry})"
        stored = _parsed(found, entry, where)
        _scan_graph(stored, operators, where)
        for path in _pickled(stored, where):
            _scan_stored(found, f"{entry.rpartition('/')[0]}/{path}", allowed)
    for entry in ending(".pt"):
        _scan_stored(found, entry, allowed)
    scan_entries(found, ending("pkl", "pickle"), allowed)


def _parsed(found: Contents, entry: str, where: str) -> Any:
    if found.entries[entry].file_size > MAX_JSON:
        raise UnsafeFile(f"{where} has more than {MAX_JSON >> 20} MiB", "No graph is that large.")
    try:
        return json.loads(found.read(entry))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{where} is damaged ({error}). {AGAIN}") from error


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of all objects inside."""
    todo = [value]
    while todo:
        current = todo.pop()
        if isinstance(current, dict):
            yield from current.items()
            todo += current.values()
        elif isinstance(current, list):
            todo += current


def _scan_graph(stored: Any, operators: Container[str], where: str) -> None:
    for key, value in _fields(stored):
        if key == "target" and isinstance(value, str):
            found = _OPERATOR.fullmatch(value)
            known = found is not None and (f"{found[1]}::{found[2]}" in operators or found[1] in _SPACES)
            if not known and not _PYTHON.fullmatch(value):
                raise UnsafeFile(f"{where} calls {value}", "It is not known as harmless.")
        elif key == "expr_str" and isinstance(value, str) and not _is_expression(value):
            raise UnsafeFile(
                f"{where} has the expression {value[:100]!r}", "Evaluating it could run anything."
            )


def _is_expression(text: str) -> bool:
    """Whether it is arithmetic on symbols: sympy evaluates it as Python."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in nodes:
        if not isinstance(node, _EXPRESSIONS):
            return False
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        ):
            return False
        if isinstance(node, ast.Name) and "__" in node.id:
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isidentifier():
            return False
    return True


def _pickled(stored: Any, where: str) -> Iterator[str]:
    """The entries beside a table of weights or constants that it says are pickled tensors."""
    table = stored.get("config") if isinstance(stored, dict) else None
    for payload in table.values() if isinstance(table, dict) else ():
        if not isinstance(payload, dict):
            continue
        path = str(payload.get("path_name", ""))
        if "/" in path or path.startswith(("custom_obj", "opaque_obj")):
            raise UnsafeFile(f"{where} holds a Python object ('{path}')", "Only tensors are read.")
        if payload.get("use_pickle"):
            yield path


def _scan_stored(found: Contents, entry: str, allowed: Allowed) -> None:
    """A part that torch.save wrote: an archive of its own, of tensors only."""
    name = f"{found.name}/{entry}"
    if entry not in found.entries:
        raise BadFile(f"'{found.name}' lacks its entry '{entry}'. {AGAIN}")
    data = found.read(entry)
    if not data:
        return
    inner = contents(data, name, lambda _: False)
    if inner.named(lambda part: part.startswith("code/") or part == "constants.pkl"):
        raise UnsafeFile(f"'{name}' is a TorchScript archive", "It would be loaded with its code.")
    scan_entries(inner, inner.named(lambda part: part.endswith(("pkl", "pickle"))), allowed)
