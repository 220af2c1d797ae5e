"""Whether a drop-in may take its shortcut: only where nothing that the original calls there has been overridden.

By a subclass, a mixin, on the instance, or by patching the original's class, its bases or the drop-in. What an original
calls is read off its code: every method and property that it names, and those that these name. Functions of its module
(``transformers.audio_utils.spectrogram``) are not looked at: they are what is replaced.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import transformers

_HOME = str(Path(transformers.__file__).parent)


@dataclass
class _Record:
    """A drop-in's original as it was when the drop-in was made."""

    original: type
    methods: dict[type, dict[str, Any]]  # of its classes
    foreign: set[str]  # patched before
    reached: dict[str, frozenset[str]] = field(default_factory=dict)
    takes_tensors: bool = False


_RECORDS: dict[type, _Record] = {}


def remember(drop_in: type, original: type) -> None:
    """Take down what `original` is made of."""
    classes = [base for base in original.__mro__ if base is not object]
    methods = {base: {n: v for n, v in vars(base).items() if _is_method(n, v)} for base in classes}
    foreign = {n for found in methods.values() for n, v in found.items() if not _is_of_transformers(v)}
    record = _RECORDS[drop_in] = _Record(original, methods, foreign)
    record.reached["__call__"] = _reached(record, "__call__")
    own = [found for base, found in methods.items() if base.__module__.startswith("transformers.models.")]
    codes = [c for name in record.reached["__call__"] for found in own for c in _codes_of(found.get(name))]
    record.takes_tensors = any("Tensor" in _names_in(code) for code in codes)


def takes_tensors(extractor: Any) -> bool:
    """Whether the original's code asks for tensors; others take a tensor of clips for one clip, or pad its batch."""
    drop_in = next((base for base in type(extractor).__mro__ if base in _RECORDS), None)
    return drop_in is None or _RECORDS[drop_in].takes_tensors


def is_as_made(extractor: Any, method: str) -> bool:
    """Return whether the original's `method`, of this object, would run the original's code alone."""
    cls = type(extractor)
    watches = _WATCHES.get(cls)
    if watches is None:
        watches = _WATCHES[cls] = {}
    watch = watches.get(method)
    if watch is None:
        watch = _watch_of(cls, method)
        if not watch.is_foreign:  # what is foreign now may be gone by the next call
            watches[method] = watch
    if watch.is_unknown:
        return True  # accelerate()'s twin before it is one, or a class made by hand
    if watch.is_foreign or not watch.names.isdisjoint(extractor.__dict__) or watch.resolve(cls) != watch.resolved:
        return False
    return all(get(name) is value for get, name, value in watch.behind)


@dataclass
class _Watch:
    """What to look at, each time, to tell whether a class is as it was made.

    Attributes:
        names: What the original's method calls, and must not lie on the instance.
        resolve: Looks these up in the class.
        resolved: What must be found.
        behind: Of definitions that another one hides, and that it may call: a look-up, a name, and what must be there.
    """

    names: frozenset[str] = frozenset()
    resolve: Any = None
    resolved: Any = None
    behind: list[tuple[Any, str, Any]] = field(default_factory=list)
    is_foreign: bool = False
    is_unknown: bool = False


_WATCHES: WeakKeyDictionary[type, dict[str, _Watch]] = WeakKeyDictionary()


def _watch_of(cls: type, method: str) -> _Watch:
    lineage = cls.__mro__
    drop_in = next((base for base in lineage if base in _RECORDS), None)
    if drop_in is None:
        return _Watch(is_unknown=True)
    record = _RECORDS[drop_in]
    names = record.reached.get(method)
    if names is None:
        names = record.reached[method] = _reached(record, method)
    # Who overrides the method itself and calls ours has said what he wants.
    others, ours = names - {method}, set(drop_in.__mro__)
    is_foreign = not names.isdisjoint(record.foreign)
    behind: list[tuple[Any, str, Any]] = []
    for base in lineage:
        known = record.methods.get(base)
        if known is not None:
            is_foreign |= any(vars(base).get(name) is not known.get(name) for name in names)
            behind += [(vars(base).get, name, known[name]) for name in names.intersection(known)]
        elif base not in ours or base is drop_in:
            is_foreign |= not others.isdisjoint(vars(base))
        if base is drop_in:
            others = names
    resolve = attrgetter(*sorted(names))
    return _Watch(names, resolve, resolve(cls), behind, is_foreign)


def _reached(record: _Record, method: str) -> frozenset[str]:
    found: set[str] = set()
    todo = [method]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for methods in record.methods.values():
            for code in _codes_of(methods.get(name)):
                todo += [n for n in _names_in(code) if any(n in known for known in record.methods.values())]
    return frozenset(found)


def _is_method(name: str, value: Any) -> bool:
    if name.startswith("__") and name != "__call__":
        return False
    return callable(value) or isinstance(value, (property, classmethod, staticmethod))


def _codes_of(value: Any) -> Iterator[CodeType]:
    """The code of a function or property, and of what decorators wrapped."""
    if isinstance(value, property):
        yield from _codes_of(value.fget)
    elif isinstance(value, (classmethod, staticmethod)):
        yield from _codes_of(value.__func__)
    elif isinstance(value, FunctionType):
        yield value.__code__
        yield from _codes_of(getattr(value, "__wrapped__", None))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str):  # getattr(self, "name")
            yield constant


def _is_of_transformers(value: Any) -> bool:
    code = next(_codes_of(value), None)
    return callable(value) and isinstance(value, type) if code is None else code.co_filename.startswith(_HOME)
