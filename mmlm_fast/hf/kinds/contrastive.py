"""Contrastive losses in the forwards of CLIP, SigLIP and their relatives: no pair's similarity is kept for them."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.hf import proof
from mmlm_fast.hf.fingerprint import fingerprint, fingerprint_of_statements
from mmlm_fast.nn.lazy_similarity import LazySimilarity, similarity
from mmlm_fast.ops.clip_loss import clip_loss, clip_loss_ref
from mmlm_fast.ops.parts import RECORDS
from mmlm_fast.ops.paths import FORCED, forced_path
from mmlm_fast.ops.siglip_loss import siglip_loss, siglip_loss_ref

KIND = "contrastive loss"
# Functions of similarities, by their fingerprint; one of the models that have it.
CLIP_LOSSES = {"8cf69d77424ab50a": "clip"}
# Statements with the similarities as their only free name, whose last one assigns the loss.
SIGLIP_LOSSES = {"6df93be7108e7289": "siglip"}
_FEWEST = {"clip_loss": RECORDS["clip_loss"].least(), "siglip_loss": RECORDS["siglip_loss"].least()}


@dataclass
class Loss:
    """One loss of a forward.

    Args:
        branch: The statement ``if return_loss:`` that it is the body of.
        test: Name of the argument that asks for it.
        logits: Name of the similarities.
        op: Record of the op that takes its place.
        call: ``loss_of(logits)`` for a function of a known fingerprint; else the body is known.
        product: ``torch.matmul(a, bᵀ)``, which makes the similarities.
    """

    branch: ast.If
    test: str
    logits: str
    op: str
    call: ast.Call | None
    product: ast.Call

    def function(self, globals_: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        """The original's loss of similarities."""
        if self.call is not None:
            return globals_[self.call.func.id]  # type: ignore[attr-defined]
        last: Any = self.branch.body[-1]
        tree: Any = ast.parse(f"def loss_of({self.logits}): pass")
        tree.body[0].body = [*copy.deepcopy(self.branch.body), ast.Return(ast.Name(last.targets[0].id, ast.Load()))]
        namespace: dict[str, Any] = {}
        exec(compile(ast.fix_missing_locations(tree), "<loss>", "exec"), globals_, namespace)
        return namespace["loss_of"]


def losses(tree: ast.FunctionDef, globals_: dict[str, Any]) -> Iterator[Loss]:
    """The losses of a forward that are known."""
    arguments = {a.arg for a in ast.walk(tree.args) if isinstance(a, ast.arg)}
    stored = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    for branch in [n for n in ast.walk(tree) if isinstance(n, ast.If)]:
        test = branch.test.id if isinstance(branch.test, ast.Name) else ""
        if test not in arguments or test in stored or branch.orelse:
            continue
        found = _known(branch, globals_)
        if found is None:
            continue
        logits, op, call = found
        made = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and _is_product_named(n, logits)]
        products = [p for n in made for p in _products(n.value)]
        if len(products) == 1:
            yield Loss(branch, test, logits, op, call, products[0])


def _known(branch: ast.If, globals_: dict[str, Any]) -> tuple[str, str, ast.Call | None] | None:
    """Name of the similarities, op and call of a loss."""
    value = branch.body[0].value if len(branch.body) == 1 and isinstance(branch.body[0], ast.Assign) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        function = globals_.get(value.func.id)
        plain = len(value.args) == 1 and isinstance(value.args[0], ast.Name) and not value.keywords
        if plain and isinstance(function, FunctionType) and fingerprint(function) in CLIP_LOSSES:
            return value.args[0].id, "clip_loss", value  # type: ignore[attr-defined]
        return None
    known, free = fingerprint_of_statements(branch.body, globals_)
    return (free[0], "siglip_loss", None) if known in SIGLIP_LOSSES and len(free) == 1 else None


def _is_product_named(node: ast.Assign, name: str) -> bool:
    return len(node.targets) == 1 and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name


def _products(value: ast.expr) -> list[ast.Call]:
    return [n for n in ast.walk(value) if isinstance(n, ast.Call) and _is_matmul(n)]


def _is_matmul(node: ast.Call) -> bool:
    named = (
        isinstance(node.func, ast.Attribute) and node.func.attr == "matmul" and isinstance(node.func.value, ast.Name)
    )
    return named and node.func.value.id == "torch" and len(node.args) == 2 and not node.keywords  # type: ignore[attr-defined]


# ---- in the rewritten forward ----------------------------------------------------------------------------------------


class Contrastive:
    """What takes the place of the expressions."""

    @staticmethod
    def product(module: nn.Module, wanted: Any, op: str, a: Any, b_t: Any) -> Tensor:
        """``torch.matmul(a, b_t)``, which waits where a loss is wanted and there are enough pairs."""
        lazy = similarity(module, a, b_t) if wanted and isinstance(a, Tensor) and not _are_few(op, a) else None
        return torch.matmul(a, b_t) if lazy is None else lazy

    @staticmethod
    def clip_loss(original: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        """``original(logits)``, without them."""
        loss = logits.clip_loss() if type(logits) is LazySimilarity else None
        return original(logits) if loss is None else loss

    @staticmethod
    def siglip_loss(logits: Tensor) -> Tensor | None:
        """The loss; None where the statements of the original are to compute it."""
        return logits.siglip_loss() if type(logits) is LazySimilarity else None


def _are_few(op: str, a: Tensor) -> bool:
    """Whether there are so few pairs that the op would take its formula for them."""
    is_free = not FORCED or forced_path() is None
    return a.dim() != 2 or (a.is_cpu and is_free and a.shape[0] ** 2 < _FEWEST[op])


# ---- proof -----------------------------------------------------------------------------------------------------------


def prove(loss: Loss, globals_: dict[str, Any], weight: Tensor | None) -> float:
    """Random features, with the scale that training starts from."""
    dtype, device = (torch.float32, "cpu") if weight is None else (weight.dtype, weight.device)
    like = torch.empty(0, dtype=dtype, device=device)
    features = [proof.random(proof.ROWS, 32, like=like, scale=32**-0.5, seed=i) for i in range(2)]
    numbers = [like.new_tensor(10.0)] + ([like.new_tensor(-1.0)] if loss.op == "siglip_loss" else [])
    original = loss.function(globals_)
    op, formula = (clip_loss, clip_loss_ref) if loss.op == "clip_loss" else (siglip_loss, siglip_loss_ref)

    def theirs(a: Tensor, b: Tensor, scale: Tensor, *bias: Tensor) -> Tensor:
        logits = torch.matmul(a, b.t()) * scale
        return original(logits + bias[0] if bias else logits)

    def ours(*tensors: Tensor) -> Tensor:
        dtype = tensors[0].dtype
        wide = torch.promote_types(dtype, torch.get_default_dtype())  # of the signs in the original
        return op(*tensors).to(dtype if loss.op == "clip_loss" else wide)

    return proof.prove(theirs, ours, lambda *t: formula(*t), [*features, *numbers])
