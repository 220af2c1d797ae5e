"""What forwards of transformers do between modules: sums before norms, rotations, placeholders."""

import ast
import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from mmlm_fast.hf.changing import (
    OWN_FORWARD,
    change,
    has_own_forward,
    innermost,
    is_eager,
    is_undone,
    layers_of,
    original_class,
    why_unreachable,
)
from mmlm_fast.hf.fingerprint import source_tree
from mmlm_fast.hf.kinds import contrastive, merging, norms, rotary
from mmlm_fast.hf.rewriting import PREFIX, always, blocks, call, calls_of, replace, rewritten
from mmlm_fast.hf.site import ALREADY, WIDEST, Site, unless_tiny

SUM, ROPE = "sum and norm", "rotary embedding"


def find(model: nn.Module) -> Iterator[Site]:
    """Forwards that hold an expression whose meaning we know."""
    for path, module in model.named_modules():
        cls = original_class(module)
        if cls.__module__.startswith("torch.") or not isinstance(module, nn.Module):
            continue
        for part in PARTS:
            names = part.names(module)
            if names is None:
                continue
            found = _count(cls, part.kind, names)
            if isinstance(found, str):
                yield Site(part.kind, path, type(module).__name__, module, reason=found)
            elif found:
                yield _site(path, module, part, names)


def _site(path: str, module: nn.Module, part: "Part", names: tuple[str, ...]) -> Site:
    cls = original_class(module)
    site = Site(part.kind, path, type(module).__name__, module, op=part.op_in(cls))
    if any(made is methods and options[0] == part.kind for made, options in layers_of(type(module))):
        site.reason = ALREADY
    elif has_own_forward(module):
        site.reason = OWN_FORWARD
    site.alike, site.prove = part.proof(module, cls, names)
    site.like = next((p for p in module.parameters() if p.is_floating_point()), None)
    site.also = tuple(type(getattr(module, name)).__name__ for name in names)
    site.apply = functools.partial(_apply, module, part.kind, names)
    return site


def _apply(module: nn.Module, kind: str, names: tuple[str, ...]) -> Callable[[], None]:
    return change(module, methods, kind, names)


@innermost
def methods(cls: Any, kind: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The forward of a class with the expressions of one kind replaced; compiled code has the original's."""
    chosen: dict[str, tuple[str, ...]] = {kind: names}
    for made, options in layers_of(cls):
        if made is methods:
            chosen[options[0]] = options[1]
    first = getattr(cls, "_mmlm_fast_original", cls)
    original = first.forward
    ours = _forward(original, tuple(sorted(chosen.items())))
    least = min(_PART[each].least for each in chosen)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_eager() and first.forward is original and not is_undone(self):
            return ours(self, *args, **kwargs)
        return first.forward(self, *args, **kwargs)

    return {"forward": unless_tiny(first, least // WIDEST, forward)}


def _forward(original: Any, chosen: tuple[tuple[str, tuple[str, ...]], ...]) -> Any:
    globals_ = inspect.unwrap(original).__globals__

    def changed(tree: ast.FunctionDef) -> ast.FunctionDef:
        for kind, names in chosen:
            _PART[kind].change(tree, names, globals_)
        return tree

    return rewritten(original, changed, {f"{PREFIX}{part.name}": part.helper for part in PARTS})


def _count(cls: Any, kind: str, names: tuple[str, ...]) -> int | str:
    """How many expressions of a kind the forward of a class holds, or why they can't be replaced."""
    return _count_in(cls.forward, kind, names)


@functools.cache
def _count_in(forward: Any, kind: str, names: tuple[str, ...]) -> int | str:
    function = inspect.unwrap(forward)
    try:
        tree = source_tree(function)
    except (OSError, TypeError, SyntaxError):
        return 0
    count = _PART[kind].change(tree, names, function.__globals__)
    if count:
        try:
            _forward(forward, ((kind, names),))
        except (TypeError, SyntaxError, ValueError) as error:
            return f"its forward cannot be rewritten: {error}"
    return count


class Part(ABC):
    """One kind of expression.

    Attributes:
        kind: In words.
        name: Of the helper in the rewritten forward.
        op: Record that says which path it takes.
        least: How large that says its tensors must be, where they are about as large as what the forward is handed;
            else 0.
        helper: What takes the place of the expression.
    """

    kind: str
    name: str
    op: str
    least = 0
    helper: Any

    def op_in(self, cls: Any) -> str:
        """The record of the expressions in the forward of a class."""
        return self.op

    @abstractmethod
    def names(self, module: nn.Module) -> tuple[str, ...] | None:
        """Names of attributes of a module that the expressions are about; None where there can be none."""

    @abstractmethod
    def change(self, tree: ast.FunctionDef, names: tuple[str, ...], globals_: dict[str, Any]) -> int:
        """Replace the expressions in a tree, in place; returns how many there are."""

    @abstractmethod
    def proof(self, module: nn.Module, cls: Any, names: tuple[str, ...]) -> tuple[Any, Callable[[], float] | None]:
        """What sites that are proved at once have in common, and the proof."""


class _Sums(Part):
    """``h = a + b``, perhaps names for h, then a statement with ``self.norm(h)``: the norm of the sum, and the sum."""

    kind, name, op, least = SUM, "sum_and_norm", "add_norm", norms.LEAST
    helper = staticmethod(norms.sum_and_norm)

    def names(self, module: nn.Module) -> tuple[str, ...] | None:
        parts = [(name, child) for name, child in module.named_children() if norms.known(child) is not None]
        return tuple(name for name, child in parts if why_unreachable(child) is None) or None

    def change(self, tree: ast.FunctionDef, names: tuple[str, ...], globals_: dict[str, Any]) -> int:
        this, count = tree.args.args[0].arg if tree.args.args else "", 0
        inside: Any = calls_of(tree, lambda n: _is_norm(n, this, names) and _is_sum(n.args[0]))
        replace(tree, inside, self._norm_alone)
        for block in blocks(tree):
            for i, statement in enumerate(block):
                summed = _sum_of(statement)
                if summed is None:
                    continue
                target, value = summed
                after = next((s for s in block[i + 1 :] if not _is_copy(s, target)), None)
                if not isinstance(after, (ast.Assign, ast.Return, ast.Expr)) or after.value is None:
                    continue
                nodes: list[Any] = list(always(after.value))
                wanted = [n for n in nodes if _is_norm(n, this, names) and _is_name(n.args[0], target)]
                if len(wanted) != 1 or _calls_before(after.value, wanted[0]):
                    continue
                normed = wanted[0]
                place, count = f"{PREFIX}normed_{count}", count + 1
                pair = ast.Tuple([ast.Name(place, ast.Store()), ast.Name(target, ast.Store())], ast.Store())
                new = call(f"{PREFIX}{self.name}", copy.deepcopy(normed.func), value.left, value.right)
                block[i] = ast.copy_location(ast.Assign([pair], new), statement)
                replace(after, [normed], lambda _, place=place: ast.Name(place, ast.Load()))  # type: ignore[misc]
        return count + len(inside)

    def _norm_alone(self, node: ast.Call) -> ast.expr:
        value: Any = node.args[0]
        pair = call(f"{PREFIX}{self.name}", node.func, value.left, value.right)
        return ast.Subscript(pair, ast.Constant(0), ast.Load())

    def proof(self, module: nn.Module, cls: Any, names: tuple[str, ...]) -> tuple[Any, Callable[[], float] | None]:
        parts = [getattr(module, name) for name in names]
        return (cls, *map(norms.alike, parts)), functools.partial(norms.prove_sums, parts)


def _sum_of(statement: ast.stmt) -> tuple[str, Any] | None:
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target = statement.targets[0]
    return (target.id, statement.value) if isinstance(target, ast.Name) and _is_sum(statement.value) else None


def _calls_before(node: ast.AST, last: ast.AST) -> bool:
    """Whether a call is over before that of `last` begins, which might change what `last` is handed."""
    for part in always(node):
        if part is last:
            return False
        if isinstance(part, ast.Call) and not any(inner is last for inner in ast.walk(part)):
            return True
    return False


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_copy(statement: ast.stmt, name: str) -> bool:
    return (
        isinstance(statement, ast.Assign)
        and _is_name(statement.value, name)
        and all(isinstance(t, ast.Name) and t.id != name for t in statement.targets)
    )


def _is_norm(node: Any, this: str, names: tuple[str, ...]) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and _is_name(node.func.value, this)
        and node.func.attr in names
        and not node.keywords
        and len(node.args) == 1
    )


class _Rotations(Part):
    """Calls of a function that rotates queries and keys, known by its fingerprint."""

    kind, name, op, least = ROPE, "rotated", "qk_norm_rope", rotary.LEAST
    helper = staticmethod(rotary.rotated)

    def names(self, module: nn.Module) -> tuple[str, ...] | None:
        return ()

    def change(self, tree: ast.FunctionDef, names: tuple[str, ...], globals_: dict[str, Any]) -> int:
        def is_rotation(node: ast.Call) -> bool:
            return isinstance(node.func, ast.Name) and rotary.known(globals_.get(node.func.id)) is not None

        found = calls_of(tree, is_rotation)
        replace(tree, found, lambda n: call(f"{PREFIX}{self.name}", n.func, *n.args, keywords=n.keywords))
        return len(found)

    def proof(self, module: nn.Module, cls: Any, names: tuple[str, ...]) -> tuple[Any, Callable[[], float] | None]:
        forward = inspect.unwrap(cls.forward)
        used = [forward.__globals__.get(name) for name in forward.__code__.co_names]
        functions = [f for f in used if rotary.known(f) is not None]
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
        like = None if weight is None else (weight.dtype, weight.device)
        return (tuple(functions), like), functools.partial(rotary.prove, functions, weight)


class _Merges(Part):
    """``embeddings.masked_scatter(mask, features)``."""

    kind, name, op = merging.KIND, "scattered", "merge_embeddings"
    helper = staticmethod(merging.scattered)

    def names(self, module: nn.Module) -> tuple[str, ...] | None:
        return ()

    def change(self, tree: ast.FunctionDef, names: tuple[str, ...], globals_: dict[str, Any]) -> int:
        def is_merge(node: ast.Call) -> bool:
            named = isinstance(node.func, ast.Attribute) and node.func.attr == "masked_scatter"
            return named and len(node.args) == 2 and not node.keywords

        found = calls_of(tree, is_merge)
        replace(tree, found, lambda n: call(f"{PREFIX}{self.name}", n.func.value, *n.args))
        return len(found)

    def proof(self, module: nn.Module, cls: Any, names: tuple[str, ...]) -> tuple[Any, Callable[[], float] | None]:
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
        like = None if weight is None else (weight.dtype, weight.device)
        return like, functools.partial(merging.prove, weight)


class _Losses(Part):
    """``loss_of(similarities)`` where the similarities are a product that nothing else need read."""

    kind, name, op = contrastive.KIND, "contrastive", "clip_loss"
    helper = contrastive.Contrastive

    def names(self, module: nn.Module) -> tuple[str, ...] | None:
        return ()

    def change(self, tree: ast.FunctionDef, names: tuple[str, ...], globals_: dict[str, Any]) -> int:
        found = list(contrastive.losses(tree, globals_))
        for loss in found:
            self._change(tree, loss)
        return len(found)

    def op_in(self, cls: Any) -> str:
        return self._of(cls).op

    def _of(self, cls: Any) -> contrastive.Loss:
        forward = inspect.unwrap(cls.forward)
        return next(contrastive.losses(source_tree(forward), forward.__globals__))

    def _change(self, tree: ast.FunctionDef, loss: contrastive.Loss) -> None:
        this, wanted = ast.Name(tree.args.args[0].arg, ast.Load()), ast.Name(loss.test, ast.Load())
        options = [this, wanted, ast.Constant(loss.op)]
        replace(tree, [loss.product], lambda n: self._call("product", *options, *n.args))
        if loss.call is not None:
            replace(tree, [loss.call], lambda n: self._call("clip_loss", n.func, *n.args))
            return
        body: list[Any] = loss.branch.body
        name = body[-1].targets[0].id
        ours = ast.Assign([ast.Name(name, ast.Store())], self._call("siglip_loss", ast.Name(loss.logits, ast.Load())))
        is_none = ast.Compare(ast.Name(name, ast.Load()), [ast.Is()], [ast.Constant(None)])
        loss.branch.body = [ast.copy_location(new, body[0]) for new in (ours, ast.If(is_none, body, []))]

    def _call(self, method: str, *arguments: ast.expr) -> ast.Call:
        helper = ast.Name(f"{PREFIX}{self.name}", ast.Load())
        return ast.Call(ast.Attribute(helper, method, ast.Load()), list(arguments), [])

    def proof(self, module: nn.Module, cls: Any, names: tuple[str, ...]) -> tuple[Any, Callable[[], float] | None]:
        loss, forward = self._of(cls), inspect.unwrap(cls.forward)
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
        like = None if weight is None else (weight.dtype, weight.device)
        return (cls, like), functools.partial(contrastive.prove, loss, forward.__globals__, weight)


PARTS: tuple[Part, ...] = (_Sums(), _Rotations(), _Merges(), _Losses())
_PART = {part.kind: part for part in PARTS}
