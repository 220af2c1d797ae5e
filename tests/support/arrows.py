"""Draws what imports what, from the imports: `make arrows` prints it, and CONTRIBUTING holds it.

Parts are the folders of mmlm_fast and its files beside them, csrc's folders, the kernels and the benchmarks. An arrow
that follows from two others is left out.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"mmlm_fast": "mmlm_fast", "kernels": "mmlm_kernels", "benchmarks": "mmlm_benchmarks"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_by_name(path: Path) -> list[str]:
    """Where importing is to do no work."""
    return re.findall(r'import_module\("([\w.]+)"\)', path.read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    folder, name, *_ = (*path.relative_to(ROOT).with_suffix("").parts, "")
    return f"{folder}.{name}" if folder == "mmlm_fast" else folder


def part_named(name: str) -> str | None:
    """The part of ours that a dotted name is of; None: not ours, or of the package itself."""
    top, *rest = name.split(".")
    if top != "mmlm_fast":
        return next((folder for folder, package in FOLDERS.items() if package == top), None)
    if not rest:
        return None
    if rest[0] == "_C":
        return "csrc/python"
    found = ROOT / "mmlm_fast" / rest[0]
    return f"mmlm_fast.{rest[0]}" if found.is_dir() or found.with_suffix(".py").exists() else None


def edges() -> dict[str, set[str]]:
    """Part -> parts it imports."""
    found: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "__init__.py" and path.parent.name == "mmlm_fast":
                continue
            into = found.setdefault(part_of(path), set())
            names = [*imported(path), *imported_by_name(path)]
            into |= {part for name in names if (part := part_named(name)) and part != part_of(path)}
    for path in sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".h", ".inl", ".cpp", ".cu")):
        own = f"csrc/{path.parent.name}"
        into = found.setdefault(own, set())
        named = re.findall(r'#include "(\w+)/', path.read_text(encoding="utf-8"))
        into |= {f"csrc/{name}" for name in named} - {own}
    return found


def reach(found: dict[str, set[str]], start: str, without: tuple[str, str]) -> set[str]:
    waiting, seen = [start], set()
    while waiting:
        part = waiting.pop()
        for other in found.get(part, set()):
            if (part, other) != without and other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


def drawn() -> str:
    """Mermaid's text of the graph, without arrows that follow from others."""
    found = edges()
    lines = ["graph BT"]
    for part, others in sorted(found.items()):
        for other in sorted(others):
            if other not in reach(found, part, (part, other)):
                lines.append(f"  {part} --> {other}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawn())
