"""A hash of what a forward computes, by which it is known again in other classes, files and versions."""

import ast
import builtins
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

_LENGTH = 16  # hexadecimal digits
_IGNORED = ("ctx", "kind", "type_comment", "type_params", "annotation", "returns", "decorator_list", "lineno")


def fingerprint(owner: Any, method: str | None = None) -> str | None:
    """Hash a function, or a method of a class, by its statements.

    Names of arguments and locals, annotations, docstrings and comments do not count; names of attributes and constants
    do, and what it calls: functions of Python and methods of the class by their own statements, others by their names.

    Returns:
        16 hexadecimal digits, the same in every version of Python; None where the source cannot be read, or where a
        wrapper hides it.
    """
    function = owner if method is None else getattr(owner, method, None)
    return _fingerprint(function, None if method is None else owner)


@cache
def _fingerprint(function: Any, cls: Any) -> str | None:
    if hasattr(function, "__wrapped__"):
        return None
    try:
        words = list(_words_of(function, cls, ()))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:_LENGTH]


def fingerprint_of_statements(body: list[ast.stmt], globals_: dict[str, Any]) -> tuple[str, list[str]]:
    """Hash statements of a function in the same way, but for what they call.

    Args:
        body: Some that follow each other.
        globals_: Of the function: these names count as such.

    Returns:
        16 hexadecimal digits, and the names that the statements take from before.
    """
    names = [n for b in body for n in ast.walk(b) if isinstance(n, ast.Name)]
    stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    own = dict.fromkeys(n.id for n in names if n.id in stored or not (n.id in globals_ or hasattr(builtins, n.id)))
    words = [w for b in body for w in _words(b, {name: f"v{i}" for i, name in enumerate(own)})]
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:_LENGTH]
    return digest, [name for name in own if name not in stored]


def source_tree(function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function, with the line numbers of its file.

    Raises:
        OSError, TypeError, SyntaxError: where its source cannot be read.
    """
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise SyntaxError(f"{function.__qualname__} is no plain function")
    return ast.increment_lineno(tree, first - 1)


def _words_of(function: Any, cls: type | None, callers: tuple) -> Iterator[str]:
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r} is no function of Python")
    if function in callers:
        yield f"again {callers.index(function)}"
        return
    tree = source_tree(function)
    body = tree.body[1:] if ast.get_docstring(tree, clean=False) is not None else tree.body
    arguments = [a.arg for a in ast.walk(tree.args) if isinstance(a, ast.arg)]
    stored = [n.id for b in body for n in ast.walk(b) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    numbers = {name: f"v{i}" for i, name in enumerate(dict.fromkeys([*arguments, *stored]))}
    for default in [*tree.args.defaults, *tree.args.kw_defaults]:
        yield from _words(default, numbers)
    for statement in body:
        yield from _words(statement, numbers)
    used = dict.fromkeys(n.id for b in body for n in ast.walk(b) if isinstance(n, ast.Name) and n.id not in numbers)
    callers = (*callers, function)
    for name in used:
        yield from _meaning(name, function, cls, callers)
    if cls is not None and arguments:
        for name in dict.fromkeys(_own_attributes(body, arguments[0])):
            method = getattr(cls, name, None)
            if isinstance(method, FunctionType):
                yield f"method {name}"
                yield from _words_of(inspect.unwrap(method), cls, callers)


def _own_attributes(body: list[ast.stmt], this: str) -> Iterator[str]:
    for node in (n for b in body for n in ast.walk(b)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == this:
            yield node.attr


def _meaning(name: str, function: FunctionType, cls: type | None, callers: tuple) -> Iterator[str]:
    value = function.__globals__.get(name, getattr(builtins, name, None))
    if isinstance(value, ModuleType):
        yield f"module {value.__name__}"
    elif isinstance(inspect.unwrap(value) if callable(value) else value, FunctionType):
        yield f"calls {name}"
        yield from _words_of(inspect.unwrap(value), None, callers)  # type: ignore[arg-type]
    elif hasattr(value, "__qualname__"):
        yield f"{getattr(value, '__module__', None)}.{value.__qualname__}"  # type: ignore[union-attr]
    else:
        yield repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def _words(node: Any, numbers: dict[str, str]) -> Iterator[str]:
    """A tree in words that no version of Python changes, as it does ``ast.dump`` and ``ast.unparse``."""
    if isinstance(node, ast.Name):
        yield numbers.get(node.id, node.id)
    elif isinstance(node, ast.arg):
        yield numbers.get(node.arg, node.arg)
    elif isinstance(node, ast.AST):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.Assign(targets=[node.target], value=node.value)
        yield f"({type(node).__name__}"
        for field in node._fields:
            if field not in _IGNORED:
                yield from _words(getattr(node, field, None), numbers)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _words(item, numbers)
        yield "]"
    else:
        yield repr(node)
