"""The code of a TorchScript archive: what may stand in it, and which operators it may call.

TorchScript's code is Python by its grammar, so `ast` parses it. Whatever torch's printer does not write is refused, and
every call has to be one of: an allowed operator (`torch.relu(x)`, `ops.quantized.add(...)`, `x.relu()`), a function,
class or method of the archive itself, or one of a few built-in words. An operator cannot hide behind another name,
because only what the archive defines may be given a name of its own.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fusion.errors import BadFile, UnsafeFile
from models.formats.strangers import AGAIN

ROOT = "__torch__"

# The nodes that torch's printer makes (torch/csrc/jit/serialization/python_print.cpp).
_NODES: frozenset[type[ast.AST]] = frozenset(
    {
        *(ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.keyword, ast.Assign, ast.AnnAssign),
        *(
            ast.AugAssign,
            ast.Delete,
            ast.Return,
            ast.If,
            ast.For,
            ast.While,
            ast.Break,
            ast.Continue,
            ast.Pass,
        ),
        *(ast.Expr, ast.Assert, ast.Raise, ast.With, ast.withitem, ast.Call, ast.Name, ast.Attribute),
        *(ast.Subscript, ast.Slice, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.UnaryOp, ast.BinOp),
        *(ast.BoolOp, ast.Compare, ast.IfExp),
    }
)
_MARKS = (ast.expr_context, ast.unaryop, ast.operator, ast.boolop, ast.cmpop)  # say how, and hold nothing
_VALUES = (str, int, float, complex, bool, type(None), type(...))
_WORDS = frozenset(
    """
    annotate unchecked_cast uninitialized getattr isinstance range len print int float bool str complex list tuple dict
    min max abs enumerate zip
    """.split()
)
_ODD = re.compile(rb"[^\n\t\x20-\x7e]")
_SPACES = frozenset({"torch", "ops", ROOT, "CONSTANTS"})


@dataclass(frozen=True)
class Vocabulary:
    """What scripts may say: operators ("aten::relu"), and C++ classes by their whole names, with the names of their
    methods. `foreign` are the names ("save") of all other ATen operators: no method of an archive's own may be called
    so."""

    operators: Container[str]
    foreign: Container[str]
    classes: Container[str]
    methods: Container[str]


@dataclass(frozen=True)
class Call:
    """A call of an operator off the list, and the class it stands in ("__torch__.nets.Block")."""

    operator: str
    owner: str


@dataclass(frozen=True)
class _Definitions:
    """What an archive defines, by whole names, and the names of its methods."""

    qualified: set[str] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Scripts:
    """The parsed code of an archive by entry (`code/__torch__/nets.py`)."""

    trees: Mapping[str, ast.Module]
    defined: _Definitions

    def classes(self) -> Iterator[tuple[str, ast.ClassDef]]:
        """(whole name, definition) of every class."""
        for key, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    yield f"{module_name(key)}.{node.name}", node


def parse(sources: Mapping[str, bytes], name: str) -> Scripts:
    """Raises BadFile for code that cannot be parsed, UnsafeFile for characters that torch does not write."""
    trees = {key: _parsed(data, f"'{name}' ({key})") for key, data in sources.items()}
    defined = _Definitions()
    for key, tree in trees.items():
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            whole = f"{module_name(key)}.{node.name}"
            defined.qualified.add(whole)
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef):
                    defined.methods.add(member.name)
                    defined.qualified.add(f"{whole}.{member.name}")
                elif isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
                    defined.qualified.add(f"{whole}.{member.targets[0].id}")  # of an enumeration
    return Scripts(trees, defined)


def module_name(key: str) -> str:
    """`code/__torch__/nets.py` -> `__torch__.nets`."""
    return key.removeprefix("code/").removesuffix(".py").replace("/", ".")


def _parsed(data: bytes, where: str) -> ast.Module:
    # Other characters may end a line or a comment for one parser and not for the other.
    if any((byte < 32 and byte not in b"\n\t") or byte > 126 for byte in data):
        raise UnsafeFile(f"{where} holds characters that no code has", "Torch writes others as escapes.")
    source = data.decode("ascii")
    try:
        tree = ast.parse(source)
        comments = "#" in source and any(
            token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(source).readline)
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise BadFile(f"{where} is damaged: its code cannot be parsed. {AGAIN}") from error
    if comments:
        raise UnsafeFile(f"{where} has comments", "To TorchScript they may be code, and torch writes none.")
    return tree


def scan_scripts(scripts: Scripts, vocabulary: Vocabulary, name: str) -> Call | None:
    """The first call of an operator off the list, if any. Raises UnsafeFile for what torch's printer does not write."""
    for key, tree in scripts.trees.items():
        module = module_name(key)
        for node in tree.body:
            parts: list[ast.AST] = [node]
            owner = module
            if isinstance(node, ast.ClassDef):
                parts = [*node.bases, *node.keywords, *node.decorator_list, *node.body]
                owner = f"{module}.{node.name}"
            for part in parts:
                found = _Scope(part, scripts.defined, vocabulary, f"'{name}' ({owner})").scan()
                if found is not None:
                    return Call(found, owner)
    return None


def _strange(where: str, what: str) -> UnsafeFile:
    return UnsafeFile(f"{where} has code that torch does not write: {what}", "It could hide what it calls.")


class _Scope:
    """One function, or one statement outside of any: names mean the same throughout."""

    def __init__(self, top: ast.AST, defined: _Definitions, vocabulary: Vocabulary, where: str) -> None:
        self.top = top
        self.defined = defined
        self.vocabulary = vocabulary
        self.where = where

    def scan(self) -> str | None:
        """The first operator off the list that is called here."""
        todo: list[ast.AST] = [self.top]
        while todo:
            node = todo.pop()
            self._check(node)
            if isinstance(node, ast.Call):
                operator, callee = self._called(node.func)
                if operator is not None and operator not in self.vocabulary.operators:
                    return operator
                todo += [*callee, *node.args, *node.keywords]
            elif (
                isinstance(node, ast.Attribute)
                and (path := dotted(node))
                and path[0] in _SPACES - {"CONSTANTS"}
            ):
                self._refer(path)
            else:
                todo += _children(node)
        return None

    def _check(self, node: ast.AST) -> None:
        if type(node) not in _NODES:
            raise self._strange(type(node).__name__)
        if isinstance(node, ast.Constant) and not isinstance(node.value, _VALUES):
            raise self._strange(f"a constant of type {type(node.value).__name__}")
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (node is not self.top or node.decorator_list):
            raise self._strange(f"a nested or decorated definition ('{node.name}')")
        if isinstance(node, ast.Name):
            bound = not isinstance(node.ctx, ast.Load)
            if node.id in _SPACES - {"CONSTANTS"} or (bound and node.id in _WORDS | _SPACES):
                raise self._strange(f"another use of the name '{node.id}'")
        if isinstance(node, ast.arg) and node.arg in _WORDS | _SPACES:
            raise self._strange(f"another use of the name '{node.arg}'")

    def _called(self, called: ast.expr) -> tuple[str | None, list[ast.AST]]:
        """(the operator that is called, if it is one; what of the callee is left to look at)."""
        if isinstance(called, ast.Name):
            if called.id not in _WORDS and called.id not in self.functions:
                raise self._strange(f"a call of '{called.id}'")
            return None, []
        if not isinstance(called, ast.Attribute):
            raise self._strange("a call of a value")
        path = dotted(called) or ("", called.attr)
        if path[0] == "torch" and len(path) == 2:
            return f"aten::{path[1]}", []
        if path[0] == "ops" and len(path) == 3:
            return f"{path[1]}::{path[2]}", []
        if path[0] in _SPACES - {"CONSTANTS"}:
            self._refer(path)
            return None, []
        return self._method(called.attr), [called.value]

    def _method(self, name: str) -> str | None:
        """What `x.name()` calls: with a tensor for x, the operator of that name; else a method of the archive's."""
        if name in self.vocabulary.foreign or f"aten::{name}" in self.vocabulary.operators:
            return f"aten::{name}"
        if name not in self.defined.methods and name not in self.vocabulary.methods:
            raise self._strange(f"a call of the method '{name}', which nothing in it defines")
        return None

    def _refer(self, path: tuple[str, ...]) -> None:
        """A name below `__torch__` has to be of the archive, or of a C++ class that is known."""
        whole = ".".join(path)
        if whole not in self.defined.qualified and whole not in self.vocabulary.classes:
            raise self._strange(f"the name '{whole}'")

    @cached_property
    def functions(self) -> set[str]:
        """Names that stand for functions of the archive wherever they are bound."""
        bound: Counter[str] = Counter()
        functions: Counter[str] = Counter()
        todo = [self.top]
        while todo:
            node = todo.pop()
            todo += _children(node)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                bound[node.id] += 1
            elif isinstance(node, ast.arg):
                bound[node.arg] += 1
            elif (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            ):
                path = dotted(node.value) or ()
                functions[node.targets[0].id] += ".".join(path) in self.defined.qualified
        return {name for name, count in functions.items() if 0 < count == bound[name]}

    def _strange(self, what: str) -> UnsafeFile:
        return _strange(self.where, what)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    for name in node._fields:
        value = getattr(node, name, None)
        if isinstance(value, list):
            yield from (item for item in value if isinstance(item, ast.AST))
        elif isinstance(value, ast.AST) and not isinstance(value, _MARKS):
            yield value


def dotted(node: ast.AST) -> tuple[str, ...] | None:
    """("torch", "relu") of `torch.relu`; None where it starts at something else than a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else None
