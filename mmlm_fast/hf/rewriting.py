"""Forwards of transformers with some of their expressions replaced: those whose meaning we know, each by its equal.

The source is that of the installed version, read when a model is accelerated. The rest of the forward, its line numbers
and its decorators stay as they are, and globals are looked up where the original looks them up.
"""

import __future__

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

from mmlm_fast.hf.fingerprint import source_tree

PREFIX = "_mmlm_fast_"
_NAMED = ast.Attribute, ast.Name
_FUTURES = functools.reduce(lambda a, b: a | getattr(__future__, b).compiler_flag, __future__.all_feature_names, 0)


def rewritten(function: Any, change: Callable[[ast.FunctionDef], ast.FunctionDef], helpers: dict[str, Any]) -> Any:
    """A function with another body, under its decorators.

    Args:
        function: Of Python, decorated or not.
        change: Of its syntax tree.
        helpers: What the new body uses beside what the old one does, by name.

    Raises:
        OSError, TypeError, SyntaxError: where its source cannot be read, or a decorator hides it.
    """
    inner = inspect.unwrap(function)
    return _rewrapped(function, inner, _compiled(inner, change(source_tree(inner)), helpers))


def _compiled(function: FunctionType, tree: ast.FunctionDef, helpers: dict[str, Any]) -> FunctionType:
    names = [n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(tree) if isinstance(n, _NAMED)]
    if any(name.startswith("__") and not name.endswith("__") for name in names):
        raise TypeError("private names mean something in their class alone")
    tree.decorator_list, tree.returns = [], None
    for argument in [n for n in ast.walk(tree.args) if isinstance(n, ast.arg)]:
        argument.annotation = None
    nothing = ast.Constant(None)
    tree.args.defaults = [nothing] * len(tree.args.defaults)
    tree.args.kw_defaults = [None if d is None else nothing for d in tree.args.kw_defaults]
    free = function.__code__.co_freevars
    outer: Any = ast.parse(f"def outer({', '.join([*helpers, *free])}): pass").body[0]
    outer.body = [tree, ast.Return(ast.Name(tree.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([outer], []))
    flags = function.__code__.co_flags & _FUTURES
    code = compile(module, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    raw = namespace["outer"](*[None] * (len(helpers) + len(free)))
    cells = dict(zip(free, function.__closure__ or (), strict=True)) | {k: CellType(v) for k, v in helpers.items()}
    closure = tuple(cells[name] for name in raw.__code__.co_freevars)
    made = FunctionType(raw.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    return made


def _rewrapped(function: Any, inner: FunctionType, made: FunctionType, done: dict[Any, Any] | None = None) -> Any:
    """`function`, a chain of wrappers around `inner`, with `made` in its place."""
    done = {inner: made} if done is None else done
    if function in done:
        return done[function]
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r} hides the function that it wraps")
    cells = [CellType() for _ in function.__closure__ or ()]
    options = (function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    copy = done[function] = FunctionType(*options)
    copy.__kwdefaults__ = function.__kwdefaults__
    wrapped: Any = None
    for cell, old in zip(cells, function.__closure__ or (), strict=True):
        value = old.cell_contents
        if isinstance(value, FunctionType) and inspect.unwrap(value) is inner:
            value = _rewrapped(value, inner, made, done)  # a wrapper may hold itself, too
            wrapped = value if wrapped is None and value is not copy else wrapped
        cell.cell_contents = value
    if wrapped is None:
        raise TypeError(f"{function.__qualname__} hides the function that it wraps")
    functools.update_wrapper(copy, function)
    copy.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return copy


# ---- expressions -----------------------------------------------------------------------------------------------------


def call(helper: str, *arguments: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.Call:
    return ast.Call(ast.Name(helper, ast.Load()), list(arguments), keywords or [])


def calls_of(tree: ast.AST, is_wanted: Callable[[ast.Call], bool]) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and is_wanted(node)]


class _Replacing(ast.NodeTransformer):
    def __init__(self, old: list[Any], new: Callable[[Any], ast.expr]) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        is_old = any(node is o for o in self.old)
        node = self.generic_visit(node)
        return ast.copy_location(self.new(node), node) if is_old else node


def replace(tree: Any, old: list[Any], new: Callable[[Any], ast.expr]) -> Any:
    """`tree` with each node of `old` replaced by `new` of it, in place."""
    return _Replacing(old, new).visit(tree)


def blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements that run one after the other."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def always(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what of it runs once whenever it runs."""
    yield node
    if isinstance(node, (ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return
    for child in ast.iter_child_nodes(node):
        yield from always(child)
