"""Plant faults in the formulas and the solvers, one at a time, and see which the tests catch.

    python eval/mutants.py [--only admm] [--jobs 2] [--json mutants.json] [--again mutants.json]

A fault is an operator, a comparison, a constant, a condition or a statement that is another one, or
none. Each is planted in memory, in a process of its own, which runs the tests that mirror the file;
a fault is caught where one of them fails, or none ends in time. What survives is listed by its
line, and `--again` plants only what survived then. docs/testing.md explains the survivors.
"""

import argparse
import ast
import copy
import gc
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
KERNELS = "tests/kernels/test_kernels.py"  # those of the branches for a GPU, interpreted
TESTS = {
    "gblm.maths.patterns": [
        "tests/test_patterns.py",
        f"{KERNELS}::test_patterns_choose_alike_with_and_without",
    ],
    "gblm.maths.scores": [
        "tests/test_scores.py",
        f"{KERNELS}::test_methods_fuse_score_and_mask",
        f"{KERNELS}::test_score_and_mask_are_one_for_windows_of_a_power_of_2",
    ],
    "gblm.maths.stats": [
        "tests/test_stats.py",
        f"{KERNELS}::test_statistics_are_summed_alike_with_and_without",
    ],
    "gblm.maths.sparsegpt": ["tests/test_sparsegpt.py"],
    "gblm.maths.admm": ["tests/test_admm.py"],
}
DECLARED = ("annotation", "returns", "decorator_list")  # nothing that a formula computes
SECONDS = 20  # of the processor for the tests of one fault: many times what they take

OTHER: dict[type[ast.AST], type[Any]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr},
    **{ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.USub: ast.UAdd},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is},
}


@dataclass
class Mutant:
    """One planted fault, and what became of it: caught, in time or not, or survived."""

    module: str
    line: int
    before: str
    after: str
    source: str
    end: str = ""


def mutants(module: str) -> Iterator[Mutant]:
    """Yield every fault that can be planted in a module."""
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text())
    for number, node in enumerate(ast.walk(tree)):
        node.number = number  # type: ignore[attr-defined]
    for node in list(_code(tree)):
        for before, other in _faults(node):
            changed = copy.deepcopy(tree)
            _Replace(node.number, other).visit(changed)  # type: ignore[attr-defined]
            ast.fix_missing_locations(changed)
            after = ast.unparse(other) if other is not None else "nothing"
            line = getattr(node, "lineno", 0)
            yield Mutant(module, line, before, after, ast.unparse(changed))


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that compute: not docstrings, imports, messages, or what is `DECLARED`."""
    for field, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            words = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not isinstance(child, ast.AST) or words or field in DECLARED:
                continue
            yield child
            if not isinstance(child, ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Raise):
                yield from _code(child)


def _faults(node: Any) -> Iterator[tuple[str, ast.AST | None]]:
    """Yield what a node is, and what it could be instead; None for nothing."""
    text = ast.unparse(node)
    changed = copy.deepcopy(node)
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp | ast.UnaryOp):
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
            yield text, changed.operand
        elif other := OTHER.get(type(node.op)):
            changed.op = other()
            yield text, changed
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[i] = OTHER[type(op)]()
            yield text, changed
    if isinstance(node, ast.Constant) and node.value is not None:
        values = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: 2 * x or 1.0}
        values[str] = lambda x: f"{x}x"
        if make := values.get(type(node.value)):
            yield text, ast.Constant(make(node.value))
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        for truth in (True, False):
            changed = copy.deepcopy(node)
            changed.test = ast.Constant(truth)
            if not (truth and isinstance(node, ast.While)):
                yield f"if {ast.unparse(node.test)}", changed
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Break | ast.Continue):
        yield text, None
    if isinstance(node, ast.Return) and text not in ("return", "return None"):
        yield text, ast.Return(ast.Constant(None))


class _Replace(ast.NodeTransformer):
    """Put a node into the place of the one with a number; `pass` for None."""

    def __init__(self, number: int, other: ast.AST | None) -> None:
        self.number, self.other = number, other

    def visit(self, node: ast.AST) -> ast.AST:
        if getattr(node, "number", None) == self.number:
            return self.other or ast.Pass()
        return self.generic_visit(node)


class Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Let a module be imported from a source that is not its file's."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, f"<planted {self.module}>", "exec"), module.__dict__)


def start(mutant: Mutant | None, module: str) -> int:
    """Run the tests of a module, with a fault or without, in a process; return its number."""
    if process := os.fork():
        return process
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    import pytest
    from hypothesis import Phase, settings

    # Without a memory and a seed of its own, so that a survivor survives again; a first failure
    # is all there is to know, so that none is made smaller, or shown.
    settings.register_profile(
        "planted",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
    )
    settings.load_profile("planted")
    if mutant:
        sys.meta_path.insert(0, Planted(mutant.module, mutant.source))
    quiet = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:cov"]
    code = pytest.main([*quiet, *TESTS[module]])
    os._exit(int(code))


def wait(running: dict[int, Mutant]) -> None:
    """Wait for a process to end, and say of its fault how."""
    process, status = os.waitpid(-1, 0)
    mutant = running.pop(process)
    if os.WIFSIGNALED(status):
        mutant.end = "not in time" if os.WTERMSIG(status) == signal.SIGXCPU else "caught"
    else:
        mutant.end = "caught" if os.WEXITSTATUS(status) else "survived"
    if mutant.end == "survived":
        after = mutant.after.partition("\n")[0]
        print(f"{mutant.module}:{mutant.line}: {mutant.before}  →  {after}", flush=True)


def _fault(row: dict[str, Any]) -> list[str]:
    """Return what a fault is known by, wherever its line has moved."""
    return [row[key] for key in ("module", "before", "after")]


def main() -> None:
    """Plant all faults, print the survivors and a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="modules whose name ends so")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", type=Path, help="what `--json` wrote: plant its survivors only")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    sys.path.insert(0, str(ROOT))
    import datasets  # noqa: F401  what takes long to import is imported once, before any fork
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import timm  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import triton  # noqa: F401

    gc.freeze()  # else every process goes through all of it again, and copies it

    assert not any(name.startswith("gblm") for name in sys.modules), (
        "gblm must be imported after the fork"
    )
    rows = json.loads(args.again.read_text()) if args.again else []
    again = [_fault(row) for row in rows if row["end"] == "survived"]
    found: list[Mutant] = []
    began = time.perf_counter()
    for module in (name for name in TESTS if name.endswith(args.only)):
        process = start(None, module)
        assert os.waitpid(process, 0)[1] == 0, f"the tests of {module} fail without a fault"
        own, running = list(mutants(module)), dict[int, Mutant]()
        if args.again:
            own = [mutant for mutant in own if _fault(asdict(mutant)) in again]
        for mutant in own:
            if len(running) == args.jobs:
                wait(running)
            running[start(mutant, module)] = mutant
        while running:
            wait(running)
        found += own
        ends = [mutant.end for mutant in own]
        counts = [f"{ends.count(end)} {end}" for end in ("caught", "not in time", "survived")]
        print(f"{module}: {len(own)} faults, {', '.join(counts)}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        rows = [{k: v for k, v in asdict(mutant).items() if k != "source"} for mutant in found]
        args.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
