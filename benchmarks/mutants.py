"""Change the library in one place at a time, and see whether its tests notice: `make mutants`.

A mutant has one operator, comparison, constant or condition changed, or lacks a statement. It is
killed where a test fails, or takes far too long. Of all mutants of the modules on which the
numbers rest, a seeded sample is tried; the survivors are written down, with the reason why each
may live where a person has found one (`REASONS`).
"""

import argparse
import ast
import copy
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results" / "mutants.json"
SAMPLE, SECONDS = 160, 240  # of mutants; of tests at most
TESTS = {
    "scores": "tests/test_scores.py tests/test_properties.py",
    "fusion": "tests/test_fusion.py tests/test_shares.py tests/test_selection.py"
    " tests/test_properties.py",
    "stats": "tests/test_stats.py tests/test_intervals.py tests/test_properties.py",
    "diagnosis": "tests/test_diagnosis.py",
    "checkpoint": "tests/test_checkpoint.py tests/test_kill.py -k 'not same_bits and not disk'",
}
"""The modules, each with the tests that concern it; its doctests run before them."""
REASONS = {
    "diagnosis: Not left out in `if not isinstance(probs, Columns):": (
        "a view of the same numbers, which takes less memory"
    ),
    "diagnosis: condition as False in `if not isinstance(probs, Col": (
        "a view of the same numbers, which takes less memory"
    ),
    "diagnosis: Mult as Div in `hidden_loss=mean_gain(known * 1.0": "the same numbers",
    "fusion: USub left out in `count[width <= _ROUNDING]": (
        "so narrow an interval is never the widest of the best"
    ),
    "checkpoint: statement left out in `lock.release()`": (
        "a lock that nothing refers to any more is released as well"
    ),
    "checkpoint: 2 as 3 in `warnings.warn(": "a warning names another line of the same code",
    "fusion: BitOr as BitAnd in `never &= ahead_before |": (
        "the interval of such a sample is empty all the same"
    ),
    "fusion: USub left out in `if (count, width, -row) > key:": (
        "two epochs would have to tie although their bounds differ, the later one tried last"
    ),
    "diagnosis: Pow as Mult in `_BLOCK = 2**22": "smaller blocks give the same numbers",
    "checkpoint: 0 as 1 in `lock.acquire(timeout=0)`": (
        "a process waits a second before it says that it waits"
    ),
    "stats: 1.0 as 2.0 in `return 1.0, math.inf`": (
        "of one group the interval is the widest, whatever the design effect"
    ),
    "stats: 0 as 1 in `if beyond(sign * (1 - _EDGE), sign) >= 0:": (
        "at the edge the statistic is 0 or in the thousands"
    ),
    "diagnosis: True as False in `@dataclasses.dataclass(frozen=True, kw_only": (
        "the library itself names every field"
    ),
    "fusion: Gt as GtE in `while (step := em_step(": "the bound is never the tolerance itself",
    "stats: Mult as Div in `differences = right * 1.0": "the same numbers",
    "scores: 1 as 2 in `classes = 1 + max(": "one more class that no sample has",
    "diagnosis: Sub as Add in `networks = sum(stop - start": (
        "the first mixture begins with the first epoch"
    ),
    "fusion: condition as False in `if values.dtype == np.float16:`": (
        "the same numbers, in three times the time"
    ),
    "fusion: 2 as 3 in `_HALVES =": "a longer table with the same beginning",
    "fusion: 16 as 17 in `_HALVES =": "a longer table with the same beginning",
    "fusion: 0.0 as 1.0 in `key, best = (-1": "any first candidate is better",
    "diagnosis: 2.0 as 3.0 in `later =": "any small weight decides between equal votes",
    "fusion: 0 as 1 in `key, best = (-1": "any first candidate is better",
    "diagnosis: 20 as 21 in `later =": "any small weight decides between equal votes",
    "diagnosis: condition as False in `if val.probs is not None:  # of": (
        "a view of the same numbers, which takes less memory"
    ),
    "diagnosis: statement left out in `refuse_test(record)`": (
        "the searches that it calls refuse a test half in the same words"
    ),
    "fusion: 0 as 1 in `if bounds[row] >= key[0]:`": "more epochs are tried, to the same end",
    "scores: Lt as LtE in `passes = bdtrc": "a probability of exactly the level",
    "diagnosis: 1 as 2 in `later = 1 +": "votes are compared, whatever each of them counts",
}
"""Why a survivor may live, by the beginning of its name."""

# Once, before the library, which each mutant loads anew.
_LOADED = (
    "hypothesis.extra.numpy pandas scipy.optimize scipy.stats sklearn.datasets torchvision".split()
)
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.UAdd: ast.USub},
}


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Every mutant of a module: what is changed, and the source that it has then.

    Texts, annotations and what messages say stay as they are.
    """
    tree = ast.parse(source)
    left_alone = set()
    for node in ast.walk(tree):
        inner: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            inner += [node.returns, *(arg.annotation for arg in node.args.args)]
            inner += [arg.annotation for arg in node.args.kwonlyargs]
        elif isinstance(node, ast.AnnAssign):
            inner += [node.annotation]
        elif isinstance(node, ast.JoinedStr | ast.Raise):
            inner += [node]
        left_alone |= {id(part) for one in inner if one is not None for part in ast.walk(one)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in left_alone or not hasattr(node, "lineno"):
            continue
        for what, change in _changes(node):
            changed = copy.deepcopy(tree)
            target = next(n for i, n in enumerate(ast.walk(changed)) if i == number)
            change(target)
            line = source.splitlines()[node.lineno - 1].strip()
            yield f"{what} in `{line}`", ast.unparse(ast.fix_missing_locations(changed))


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """The ways to change a node, and what each is called."""

    def swap(name: str, index: int | None = None) -> object:
        def change(target: ast.AST) -> None:
            old = getattr(target, name)
            if index is None:
                setattr(target, name, _SWAPS[type(old)]())
            else:
                old[index] = _SWAPS[type(old[index])]()

        return change

    def put(name: str, value: object) -> object:
        return lambda target: setattr(target, name, value)

    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPS:
        yield f"{type(node.op).__name__} as {_SWAPS[type(node.op)].__name__}", swap("op")
    elif isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            names = type(operator).__name__, _SWAPS[type(operator)].__name__
            yield " as ".join(names), swap("ops", index)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert | ast.USub):
        name = type(node.op).__name__
        yield f"{name} left out", lambda target: _become(target, target.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} as {not node.value}", put("value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"{node.value} as {node.value + 1}", put("value", node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition as False", put("test", ast.Constant(False))
    elif isinstance(node, ast.Break | ast.Continue):
        yield f"{type(node).__name__} left out", lambda target: _become(target, ast.Pass())
    elif isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "statement left out", lambda target: _become(target, ast.Pass())


def _become(target: ast.AST, other: ast.AST) -> None:
    target.__class__, target.__dict__ = other.__class__, other.__dict__  # type: ignore[misc]


def killed(copy_of: Path, module: str) -> str:
    """How the tests of a module, run in the copy, end: failed, late, or passed."""
    sys.stdout.flush()
    child = os.fork()  # numpy, scipy and torch are loaded, and the library is not
    if not child:
        try:
            _test(copy_of, module)
        except BaseException:  # whatever it is, the child ends here
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    late = time.monotonic() + SECONDS
    while time.monotonic() < late:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "failed" if os.waitstatus_to_exitcode(status) else "passed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def _test(copy_of: Path, module: str) -> None:
    os.setsid()
    os.chdir(copy_of)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W"]
    words += ["ignore::pytest.PytestAssertRewriteWarning", "-o"]
    words += ["addopts=--import-mode=importlib --doctest-modules", f"fmnlib/{module}.py"]
    code = pytest.main([*words, *shlex.split(TESTS[module])])
    sys.stdout.flush()
    os._exit(int(code))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; all if none")
    parser.add_argument("--sample", type=int, default=SAMPLE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"file for the outcome, such as {OUT.name}")
    given = parser.parse_args()
    for name in _LOADED:
        importlib.import_module(name)
    sources = {m: (ROOT / "fmnlib" / f"{m}.py").read_text() for m in given.modules or TESTS}
    every = [(m, *mutant) for m, source in sources.items() for mutant in mutants(source)]
    chosen = random.Random(given.seed).sample(every, min(given.sample, len(every)))
    counts = {m: {"mutants": 0, "killed": 0} for m in sources}
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        copy_of = Path(name) / "copy"
        ignored = shutil.ignore_patterns("__pycache__", "_build", "runs", "data", ".*")
        shutil.copytree(ROOT, copy_of, ignore=ignored)
        sys.path.insert(0, str(copy_of))
        sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != ROOT]
        os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path[:1]), "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True
        for module in sources:
            if killed(copy_of, module) != "passed":
                log = (copy_of / "log").read_text()[-3000:]
                sys.exit(f"{log}\nthe tests of {module} fail without any change")
        for number, (module, what, source) in enumerate(chosen, 1):
            file = copy_of / "fmnlib" / f"{module}.py"
            file.write_text(source)
            ended = killed(copy_of, module)
            file.write_text(sources[module])
            counts[module]["mutants"] += 1
            counts[module]["killed"] += ended != "passed"
            print(f"{number}/{len(chosen)} {ended:<7}{module}: {what}", flush=True)
            if ended == "passed":
                name = f"{module}: {what}"
                reason = next(
                    (why for start, why in REASONS.items() if name.startswith(start)), ""
                )
                survivors.append({"module": module, "change": what, "reason": reason})
            dead = sum(count["killed"] for count in counts.values())
            content = {"all": len(every), "sample": number, "seed": given.seed, "killed": dead}
            content |= {"modules": counts, "survivors": survivors}
            if given.out:  # what is known so far; any beginning of a sample is one
                given.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))
    sys.exit(dead < 0.9 * len(chosen))


if __name__ == "__main__":
    main()
