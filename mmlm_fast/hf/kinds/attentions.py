"""Attention, which transformers looks up by a name in a model's configuration: see `mmlm_fast.hf.attention`."""

import ast
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmlm_fast.hf import proof
from mmlm_fast.hf.attention import NAME, attention
from mmlm_fast.hf.changing import original_class
from mmlm_fast.hf.fingerprint import source_tree
from mmlm_fast.hf.site import ALREADY, Site

KIND = "attention"
TAKEN = ("sdpa",)  # what a user gets who does not ask for another


def find(model: nn.Module) -> Iterator[Site]:
    """The outermost models of transformers whose attention is looked up by name."""
    taken: set[nn.Module] = set()
    refused: list[Site] = []
    for path, part in model.named_modules():
        if not isinstance(part, PreTrainedModel) or part in taken or _implementation(part) is None:
            continue
        site = _site(path, part)
        if site.reason is None or site.reason == ALREADY:
            taken.update(part.modules())
            yield site
        elif not any(isinstance(s.target, nn.Module) and part in set(s.target.modules()) for s in refused):
            refused.append(site)
    yield from refused


def _site(path: str, part: PreTrainedModel) -> Site:
    used = _implementation(part)
    site = Site(KIND, path, type(part).__name__, part, op="interval_attention", note=f"in place of {used}")
    if used == NAME:
        site.reason = ALREADY
    elif used not in TAKEN:
        site.reason = f"its attention is {used}: somebody's choice, or all that it has"
    elif not getattr(part, "_supports_attention_backend", False) and not _looks_up(part):
        site.reason = "its attention is not looked up by name"
    else:
        reads = next((type(m).__name__ for m in part.modules() if _reads_its_mask(original_class(m))), None)
        site.reason = reads and f"{reads} reads the mask that it is handed, which with ours holds intervals"
    weight = next((p for p in part.parameters() if p.is_floating_point()), None)
    site.like = weight
    site.alike = None if weight is None else (weight.dtype, weight.device)
    site.prove = functools.partial(_prove, weight)
    site.apply = functools.partial(_apply, part)
    return site


@functools.cache
def _reads_its_mask(cls: Any) -> bool:
    """Whether an attention that is looked up does more with ``attention_mask`` than to hand it over."""
    methods = [inspect.unwrap(f) for f in vars(cls).values() if isinstance(f, FunctionType)]
    try:
        if not any("get_interface(" in inspect.getsource(method) for method in methods):
            return False
        nodes = [node for method in methods for node in ast.walk(source_tree(method))]
    except (OSError, TypeError, SyntaxError):
        return False
    used = [part for node in nodes if isinstance(node, _READING) for part in ast.iter_child_nodes(node)]
    return any(isinstance(part, ast.Name) and part.id == "attention_mask" for part in used)


_READING = ast.Subscript, ast.Attribute, ast.BinOp, ast.UnaryOp


def _implementation(model: PreTrainedModel) -> str | None:
    return getattr(model.config, "_attn_implementation", None)


def _looks_up(model: PreTrainedModel) -> bool:
    """Whether transformers finds in the model's file that its attention is looked up by name."""
    can = getattr(model, "_can_set_attn_implementation", None)
    return bool(can()) if can is not None else False


def _apply(model: PreTrainedModel) -> Callable[[], None]:
    """In configurations of the model's own: others may be built from the same objects."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PretrainedConfig):
            module.config = copy.deepcopy(config, copies)  # type: ignore[assignment]
    before = [(c, c._attn_implementation) for c in _configs(model)]
    model.set_attn_implementation(NAME)
    changed = {type(c) for c, _ in before if c._attn_implementation == NAME}
    for config, implementation in before:
        if implementation not in TAKEN:  # somebody's choice, for a part
            config._attn_implementation_internal = implementation
        elif type(config) in changed:  # also of layers whose configuration is a copy
            config._attn_implementation_internal = NAME

    def undo() -> None:
        for config, implementation in before:
            if config._attn_implementation == NAME:
                config._attn_implementation_internal = implementation

    return undo


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    waiting = [m.__dict__["config"] for m in model.modules() if isinstance(m.__dict__.get("config"), PretrainedConfig)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [c for c in vars(config).values() if isinstance(c, PretrainedConfig)]
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]


def _prove(weight: Tensor | None) -> float:
    """Two heads of keys for four of queries, causal."""
    dtype = torch.float32 if weight is None else weight.dtype
    like = torch.empty(0, dtype=dtype, device="cpu" if weight is None else weight.device)
    tensors = [proof.random(2, heads, 24, 32, like=like, seed=i) for i, heads in enumerate((4, 2, 2))]
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(24, 24, dtype=torch.bool, device=q.device).triu(1)
        return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    return proof.prove(
        lambda q, k, v: sdpa_attention_forward(module, q, k, v, None)[0],
        lambda q, k, v: attention(module, q, k, v, None)[0],
        exact, tensors,
    )  # fmt: skip
