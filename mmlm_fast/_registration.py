"""Registers our ops with torch, which graphs of other processes ask for: at once, or when torch is imported later.

Arrays need no torch, so importing this package must not bring it in; who loads an exported graph imports both, in
either order, and asks for nothing of ours by name.
"""

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
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


def _is_importing_us() -> bool:
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("mmlm_fast")]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in ours)


def import_torch() -> None:
    """Import torch, if it is installed, before a module of ours does: only then are all ops registered behind it."""
    with suppress(ModuleNotFoundError):  # who needs it says so
        import_module("torch")


class _AfterTorch(MetaPathFinder):
    """Finds torch as the others do, and has our ops registered behind its import."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch" or getattr(self._thread, "asks", False):
            return None
        self._thread.asks = True  # the others, not itself
        try:
            spec = find_spec("torch")
        finally:
            self._thread.asks = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec


class _Registering(Loader):
    """torch's own loader, for one import."""

    def __init__(self, loader: Any, finder: _AfterTorch) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        with suppress(ValueError):
            sys.meta_path.remove(self._finder)
        if not _is_importing_us():  # a module of ours that imports torch; see import_torch
            _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
