"""The forwards of the installed transformers by their fingerprints: ``python -m support.fingerprints [WORD]``."""

import importlib
import inspect
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import transformers.models
from torch import nn

from mmlm_fast.hf.fingerprint import fingerprint


def modeling_modules() -> Iterator[Any]:
    """Every modeling file of transformers that can be imported here."""
    for folder in pkgutil.iter_modules(transformers.models.__path__):
        package = f"transformers.models.{folder.name}"
        try:
            files = pkgutil.iter_modules(importlib.import_module(package).__path__)
        except (ImportError, AttributeError):
            continue
        for file in files:
            if file.name.startswith("modeling_"):
                try:
                    yield importlib.import_module(f"{package}.{file.name}")
                except ImportError:
                    continue


def all_fingerprints() -> dict[str, list[str]]:
    """Hash -> the places of the classes' forwards, and of functions with "rotary" in their name."""
    found = defaultdict(list)
    for module in modeling_modules():
        folder = module.__name__.split(".")[-2]
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            mark = None
            if inspect.isclass(value) and issubclass(value, nn.Module):
                mark = fingerprint(value, "forward")
            elif inspect.isfunction(value) and "rotary" in name:
                mark = fingerprint(value)
            if mark is not None:
                found[mark].append(f"{folder}.{name}")
    return dict(found)


if __name__ == "__main__":
    words = sys.argv[1:]
    for mark, places in sorted(all_fingerprints().items(), key=lambda item: -len(item[1])):
        if not words or any(word in place for word in words for place in places):
            print(mark, len(places), *places[:6])
