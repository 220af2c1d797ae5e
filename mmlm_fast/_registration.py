"""Registers our ops with torch, which graphs of other processes ask for: at once, or when torch is imported later.

Arrays need no torch, so importing this package must not bring it in; who loads an exported graph imports both, in
either order, and asks for nothing of ours by name.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def register_ops() -> None:
    """Register the ops of all packages of ours that are imported; without torch, as soon as it is there."""
    if hasattr(sys.modules.get("torch"), "compile"):  # not in the midst of its own import
        _register()
    elif not any(isinstance(finder, _AfterTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTorch())


def _register() -> None:
    import_module("mmlm_fast.ops")
    if "mmlm_fast.audio" in sys.modules:
        import_module("mmlm_fast.audio.spectral")


class _AfterTorch(MetaPathFinder):
    """Finds torch as the others do, once, and has our ops registered behind its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = find_spec("torch")
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """torch's own loader, for one import."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
