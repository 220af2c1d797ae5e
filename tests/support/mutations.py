"""Breaks the code on purpose, one mutation of tests/mutations.toml at a time in a copy, and reports what no test saw.

python -P -m support.mutations                 all of them
python -P -m support.mutations -k attention    those whose name, file or test says so
python -P -m support.mutations --check         only whether each still applies: what the test suite does
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "mutations.toml"
PACKAGES = {"mmlm_fast": "mmlm_fast", "mmlm_kernels": "kernels", "mmlm_benchmarks": "benchmarks"}
FOLDERS = ("benchmarks", "csrc", "docs", "kernels", "mmlm_fast", "tests")
FILES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
)
SECONDS = 900  # of a test: what hangs is seen too


@dataclass(frozen=True)
class Mutation:
    """One way to break a file.

    Args:
        name: What is wrong then.
        file: From the root of the repository.
        find: Text that the file holds exactly once.
        replace: What stands there instead.
        test: Arguments of pytest: what must turn red.
        environment: Variables of the test's process.
    """

    name: str
    file: str
    find: str
    replace: str
    test: str
    environment: dict[str, str]

    def fault(self, root: Path = ROOT) -> str:
        """Why it cannot be applied; empty where it can."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        count = path.read_text(encoding="utf-8").count(self.find)
        if count != 1:
            return f"{self.file} holds the text {count} times, wanted once: {self.find!r}"
        if self.find == self.replace:
            return "it changes nothing"
        test = root / self.test.split()[0].partition("::")[0]
        return "" if test.is_file() else f"no such test: {self.test}"


def mutations(path: Path = TABLE) -> list[Mutation]:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    found = [Mutation(**{"environment": {}, **entry}) for entry in table["mutation"]]
    names = [m.name for m in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names must differ, got twice: {', '.join(twice)}")
    return found


class Copy:
    """The working tree in a folder of its own, whose packages a test imports in place of the installed ones."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.site, self.is_built = folder / "tree", folder / "site", True
        self.tree.mkdir(parents=True)
        self.site.mkdir()
        leave = shutil.ignore_patterns("__pycache__", ".pytest_cache")
        for name in FOLDERS:
            shutil.copytree(ROOT / name, self.tree / name, ignore=leave)
        for name in FILES:
            shutil.copy2(ROOT / name, self.tree / name)
        for package, name in PACKAGES.items():
            (self.site / package).symlink_to(self.tree / name)
        self.environment = os.environ | {
            "PYTHONPATH": str(self.site), "PYTHONSAFEPATH": "1", "OMP_WAIT_POLICY": "passive"
        }  # fmt: skip

    def write(self, file: str, text: str) -> None:
        (self.tree / file).write_text(text, encoding="utf-8")
        if file.startswith("csrc/"):
            self.is_built = False

    def build(self) -> None:
        """The native core anew, without CUDA; ninja leaves out what has not changed.

        Done when a test asks for it: what one mutation leaves behind is built together with the next.
        """
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(self.tree / "build")]
        environment = os.environ | {"MMLM_FAST_CUDA": "0", "MMLM_FAST_WIDE": "1"}
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the native core was not built: {(done.stdout + done.stderr)[-2000:]}")
        self.is_built = True

    def test(self, mutation: Mutation) -> tuple[int, str]:
        """pytest's exit status (negative: a crash; 1000: time is up) and the end of what it printed."""
        if not self.is_built:
            self.build()
        environment = self.environment | mutation.environment
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.test.split()]
        try:
            done = subprocess.run(
                command, cwd=self.tree, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return 1000, f"no end after {SECONDS} s"
        return done.returncode, (done.stdout + done.stderr)[-2000:]


def run(chosen: list[Mutation]) -> int:
    """Apply each and run its test; prints a line each and returns how many were not seen or could not be tried."""
    bad, green = 0, set()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Copy(Path(folder))
        for i, mutation in enumerate(chosen, 1):
            begin = time.monotonic()
            verdict, told = "", mutation.fault(copy.tree)
            if told:
                verdict = "STALE"
            elif mutation.test not in green:
                status, told = copy.test(mutation)
                if status:
                    verdict = "RED WITHOUT IT"
                else:
                    green.add(mutation.test)
            if not verdict:
                before = (copy.tree / mutation.file).read_text(encoding="utf-8")
                try:
                    copy.write(mutation.file, before.replace(mutation.find, mutation.replace))
                    status, told = copy.test(mutation)
                except RuntimeError as error:
                    status, told = 2, str(error)
                finally:
                    copy.write(mutation.file, before)
                # 1: a test failed; below 0: it crashed; 1000: it hangs. 2 to 5: pytest ran none.
                verdict = "survived" if status == 0 else "NOT RUN" if 2 <= status <= 5 else ""
            line = f"[{i}/{len(chosen)}] {verdict or 'seen'} in {time.monotonic() - begin:.0f} s: {mutation.name}"
            print(line, flush=True)
            if verdict:
                bad += 1
                print(f"    {mutation.file}; {mutation.test}\n    {told if verdict != 'survived' else ''}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutations were seen")
    return bad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("-k", metavar="WORD", default="", help="those that have it in their name, file or test")
    parser.add_argument("--check", action="store_true", help="do not run tests: only whether each still applies")
    parser.add_argument("--table", type=Path, default=TABLE, help="in place of tests/mutations.toml")
    args = parser.parse_args(argv)
    chosen = [m for m in mutations(args.table) if args.k in f"{m.name} {m.file} {m.test}"]
    if not chosen:
        parser.error(f"no mutation has {args.k!r} in its name, file or test")
    stale = [f"{m.name}: {fault}" for m in chosen if (fault := m.fault())]
    if args.check or stale:
        print("\n".join(stale) or f"all {len(chosen)} apply")
        return bool(stale)
    return bool(run(chosen))


if __name__ == "__main__":
    sys.exit(main())
