"""Do the tests notice a wrong operator? Mutants drawn by a seed over the rooms that matter most.

    python -m tests.bench.mutants --n 100 --seed 0

A mutant is a module with one comparison, sum, product, logical operator or number changed. It is
caught if one of the tests that import its module fails (or runs into the time limit). Nothing in
the checkout is touched: the mutants live in a copy.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("corrections", "stars", "storage", "ingest")
_SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}  # fmt: skip


# Tests that use a room through its stages and the command line.
OF_ROOM = {
    "corrections": ("tests/stages/test_train.py", "tests/cases/test_science.py"),
    "ingest": ("tests/stages/test_ingest.py", "tests/cases/test_readers.py"),
    "stars": (
        "tests/stages/test_dedupe.py", "tests/stages/test_crossmatch.py",
        "tests/stages/test_reference.py", "tests/cases/test_dedupe.py",
    ),
    "storage": ("tests/cases/test_storage.py", "tests/cases/test_foreign.py"),
}  # fmt: skip


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Nodes of functions that can be changed; messages, annotations and constants are left out."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for statement in function.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
                    yield node, "compare"
                elif isinstance(node, ast.BinOp) and type(node.op) in _SWAPPED:
                    if not isinstance(node.left, ast.Constant | ast.JoinedStr) or not isinstance(
                        node.left.value if isinstance(node.left, ast.Constant) else "", str
                    ):
                        yield node, "operator"
                elif isinstance(node, ast.BoolOp):
                    yield node, "logic"
                elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
                    yield node, "number"


def change(node: ast.AST) -> None:
    """Change a node in place."""
    if isinstance(node, ast.Compare):
        node.ops[0] = _SWAPPED[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = _SWAPPED[type(node.op)]()
    elif isinstance(node, ast.Constant):
        node.value = node.value + 1  # type: ignore[operator]


def draw(n: int, seed: int) -> list[tuple[Path, str, str]]:
    """Mutants: module, what was changed, and the text of the changed module."""
    rng = random.Random(seed)
    found = []
    for room in ROOMS:
        for path in sorted((ROOT / "sos_dask" / room).rglob("*.py")):
            tree = ast.parse(path.read_text())
            found += [(path, number) for number in range(len(list(places(tree))))]
    made = []
    for path, number in rng.sample(found, min(n, len(found))):
        tree = copy.deepcopy(ast.parse(path.read_text()))
        node, kind = list(places(tree))[number]
        before = ast.unparse(node)
        change(node)
        what = f"line {node.lineno}: {kind} {before[:60]} -> {ast.unparse(node)[:60]}"  # type: ignore[attr-defined]
        made.append((path.relative_to(ROOT), what, ast.unparse(tree)))
    return made


def tests_of(module: Path) -> list[str]:
    """Files of tests that import a module, its own first, then the smallest; those of its room."""
    name = ".".join(module.with_suffix("").parts).removesuffix(".__init__")
    parent, _, leaf = name.rpartition(".")
    wanted = re.compile(rf"from {re.escape(name)}[ .]|from {re.escape(parent)} import .*\b{leaf}\b")
    tests = [*ROOT.glob("tests/test_*.py"), *ROOT.glob("tests/*/test_*.py")]
    found = [path for path in tests if wanted.search(path.read_text())]
    if not found:  # only the room's own face is imported
        found = [path for path in tests if f"from {parent}" in path.read_text()]
    own = f"test_{leaf}.py"
    found.sort(key=lambda path: (path.name != own, path.stat().st_size))
    files = [str(path.relative_to(ROOT)) for path in found]
    return list(dict.fromkeys([*files, *OF_ROOM.get(module.parts[1], ())]))


def is_caught(place: Path, mutant: tuple[Path, str, str], limit_s: float) -> bool:
    """Run the tests of a module in a copy of the checkout, with the mutant in its place."""
    module, _, text = mutant
    sound = (place / module).read_text()
    (place / module).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        ran = subprocess.run(
            [*command, *tests_of(module)], cwd=place, capture_output=True, check=False,
            timeout=limit_s, env={**os.environ, "PYTHONPATH": str(place)},
        )  # fmt: skip
        if ran.returncode > 2:  # no tests, or a file that is not there: nothing was tried
            raise SystemExit(ran.stdout.decode() + ran.stderr.decode())
        return ran.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        (place / module).write_text(sound)


def main() -> None:
    """Draw mutants, run the tests on each and print what was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=240.0, help="Of the tests of one mutant.")
    parser.add_argument("--jobs", type=int, default=2, help="Mutants at a time.")
    given = parser.parse_args()
    began, mutants, survivors = time.monotonic(), draw(given.n, given.seed), 0
    copies: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        for number in range(given.jobs):
            place = Path(folder) / str(number)
            ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "store", "*-store")
            shutil.copytree(ROOT, place, ignore=ignored)
            copies.put(place)

        def run(mutant: tuple[Path, str, str]) -> bool:
            place = copies.get()
            try:
                return is_caught(place, mutant, given.limit_s)
            finally:
                copies.put(place)

        for mutant, caught in zip(mutants, pool.map(run, mutants), strict=True):
            survivors += not caught
            print("caught" if caught else "SURVIVED", mutant[0], mutant[1], flush=True)
    share = 100 * (1 - survivors / len(mutants))
    print(f"{share:.0f} % of {len(mutants)} mutants caught in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
