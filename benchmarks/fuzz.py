"""Damage files and arguments, and look at what the command makes of each: `make fuzz`.

Each case ends in what the undamaged file gives (*same*), in a refusal of one line
(*refused*), or, of files that carry no checksum and of arguments, in another valid outcome
(*other*). A traceback, a second line, a control character, a hang or a file that is lost or
changed is a *fault*.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from fmnlib import RunConfig, Tracker, __main__, runs
from fmnlib.config import Paused
from fmnlib.files import write_whole
from fmnlib.fusion import Fusion
from fmnlib.training import train

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results" / "fuzz.json"
CASES, SECONDS = 2000, 60  # of one case at most
OPTIONS = "--model mlp --width 0.5 --epochs 4 --train-samples 400 --eval-samples 100"
SMALL = {"model": "mlp", "width": 0.5, "epochs": 4, "train_samples": 400, "eval_samples": 100}
NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
"""
# What nobody means and somebody gives.
HOSTILE: list[Any] = [
    *("", " ", "nan", "inf", "-inf", "-1", "0", "1e400", "1e-400", "9" * 400, "0x10", "1_000"),
    *("None", "null", "[]", "{}", "--", "-", "..", "/", "/dev/null", "/dev/full", "~", "*", "["),
    *("\x1b[31mred", "a\nb", "é", "\udc80", "💥" * 300, "x" * 5000, "%s%n", "$(true)"),
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 7, 2**63, 10**400, -0.25, 1e308, float("nan"), float("inf")),
    *("", "kf", "\x1b[31mred", "\ud800", "x" * 5000, [], {}, [[]], {"a": 1}, [-1], [1.5]),
]


@dataclasses.dataclass(frozen=True)
class Target:
    """A file to damage, and the command that reads it; no file where the words are damaged."""

    kind: str
    file: str
    words: str
    checked: bool = True  #: A checksum tells that it was changed
    structured: bool = False  #: It is JSON, whose values are changed too


def targets() -> list[Target]:
    """What is damaged, below the folder of `prepare`."""
    fuse = "fuse --checkpoints other/{}*.{} --model net.py:build --data images --size 8"
    fuse += " --resize 8 --mean 0.5 --std 0.5 --json"
    every = [
        Target("record", "r/RUN/record.npz", "diagnose RUN --json"),
        Target("record", "whole.npz", "diagnose whole.npz --json"),
        Target("record", "whole.npz", "fuse whole.npz --json"),
        Target("record", "r/RUN/probs.npy", "diagnose RUN --json"),
        Target("record", "r/RUN/record.npz", "runs --json"),
        Target("tracker", "tracked/tracked.json", "diagnose tracked --json", True, True),
        Target("tracker", "tracked/probs.f16", "diagnose tracked --json"),
        Target("tracker", "tracked/checksums.u32", "diagnose tracked --json"),
        # Cut between two rows it is that of a loop which was killed.
        Target("tracker", "tracked/predicted.i32", "diagnose tracked --json", False),
        Target("config", "r/RUN/config.json", "runs --json", False, True),
        Target("config", "r/RUN/config.json", "train TRAIN --json", False, True),
        Target("fusion", "r/RUN/fusion.json", "distill RUN --json", False, True),
        Target("state", "r/PAUSED/state_0.safetensors", "train PAUSED_TRAIN --json"),
        Target("state", "r/PAUSED/state_1.safetensors", "train PAUSED_TRAIN --json"),
        Target("checkpoint", "r/RUN/checkpoints/USED", "distill RUN --json"),
        Target("results", "out/results.json", "grid cpu --status --out out --json", False, True),
        Target("foreign", "other/a3.pt", fuse.format("a", "pt"), False),
        Target("foreign", "other/b3.safetensors", fuse.format("b", "safetensors"), False),
        Target("image", "images/one/3.png", fuse.format("a", "pt"), False),
        Target("image", "images/two/3.jpg", fuse.format("a", "pt"), False),
    ]
    words = "diagnose RUN --split 0 --html page.html", "fuse RUN --window 1 --max-picks 2 --mix kf"
    words += "runs --json", "grid cpu --status --max-minutes 1 --workers 2 --out out"
    words += ("labels RUN --csv ranking.csv --split 0",)
    words += "train --model mlp --epochs 1 --train-samples 80 --width 0.1 --lr 0.1 --loss gce", ""
    words += (
        "distill RUN --temperature 2 --soft-share 0.5 --teacher-views 0",
        fuse.format("a", "pt"),
    )
    return every + [Target("arguments", "", line, False) for line in words if line]


def prepare(folder: Path) -> dict[str, str]:
    """Make the files to be damaged in a folder; the names of the two runs, and their options."""
    config, paused = RunConfig(**SMALL), RunConfig(**SMALL, seed=1)
    record = train(config, runs.folder(config), device="cpu", progress=False)
    for _ in range(config.epochs - 1):
        with contextlib.suppress(Paused):
            train(paused, runs.folder(paused), device="cpu", progress=False, deadline=0.0)
    record.save(folder / "whole.npz")
    tracker = Tracker(folder / "tracked", record.labels)
    for probs in np.asarray(record.probs, np.float64):
        tracker.note(np.log(probs + 1e-6))
    (folder / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    shades = rng.integers(0, 156, (40, 8, 8), dtype=np.uint8)
    shades[20:] += 100  # the second class is brighter
    for number, pixels in enumerate(shades):
        name, suffix = ("one", "png") if number < 20 else ("two", "jpg")
        path = folder / "images" / name / f"{number % 20}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "other").mkdir()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    inputs, labels = torch.from_numpy(shades) / 127.5 - 1, torch.arange(40) // 20
    for number in range(4):
        for _ in range(15):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
        state = net.state_dict()
        torch.save({"epoch": number, "state_dict": state}, folder / f"other/a{number}.pt")
        safetensors.torch.save_file(state, folder / f"other/b{number}.safetensors")
    (folder / "out").mkdir()
    shutil.copy(ROOT / "results" / "cpu" / "results.json", folder / "out")
    call(["fuse", config.id])
    names = {"PAUSED_TRAIN": f"{OPTIONS} --seed 1", "PAUSED": paused.id, "TRAIN": OPTIONS}
    used = int(Fusion.load(runs.folder(config) / "fusion.json").weights.argmax())
    return names | {"RUN": config.id, "USED": f"epoch_{used:04d}.safetensors"}


class Hang(BaseException):
    """No error that the library catches."""


def call(words: list[str]) -> tuple[int | str, str, str]:
    """The exit code of `fmn`, what it prints, and what it tells; the error that escaped it."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv

    def late(*_: object) -> None:
        raise Hang(f"no end after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        sys.argv = ["fmn", *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                __main__.main()
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as stop:
        return int(stop.code or 0), out.getvalue(), err.getvalue()
    except BaseException as error:  # what a user would see as a traceback
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}", out.getvalue(), err.getvalue()
    finally:
        signal.alarm(0)
        sys.argv = argv


def contents(folder: Path) -> dict[str, bytes]:
    """Every regular file below a folder but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != ".lock"}


def damaged(content: bytes, rng: random.Random, structured: bool) -> bytes:
    """The bytes of a file, damaged in one of many ways."""
    ways = ["flip", "byte", "cut", "zeros", "longer", "empty", "noise", "swap", "text", "deep"]
    way = rng.choice(ways + ["value"] * 10 * structured)
    at, other = rng.randrange(len(content)), rng.randrange(len(content))
    size = min(rng.choice([1, 8, 64, 1024]), len(content) - at)
    if way == "value":
        return _changed_json(content, rng)
    return {
        "flip": content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        "byte": content[:at] + rng.randbytes(1) + content[at + 1 :],
        "cut": content[:at],
        "zeros": content[:at] + bytes(size) + content[at + size :],
        "longer": content + rng.randbytes(size),
        "empty": b"",
        "noise": rng.randbytes(max(16, len(content) // 4)),
        "swap": content[:at] + content[other : other + size] + content[at + size :],
        "text": b"not what it was\n" * 3,
        "deep": rng.choice([b"[", b'{"a":']) * 100_000,
    }[way]


def _changed_json(content: bytes, rng: random.Random) -> bytes:
    """JSON in which one value is another, is gone, or has a neighbour."""
    tree = json.loads(content)
    node, path = tree, []
    while isinstance(node, dict | list) and node and (not path or rng.random() < 0.8):
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append((node, key))
        node = node[key]
    if not path:
        return json.dumps(rng.choice(VALUES)).encode()
    parent, key = path[-1]
    way = rng.random()
    if way < 0.15:
        del parent[key]
    elif way < 0.25 and isinstance(parent, dict):
        parent[rng.choice(["split", "weights", "", "\x1b[1m", "x" * 300])] = rng.choice(VALUES)
    else:
        parent[key] = rng.choice(VALUES)
    return json.dumps(tree).encode()


@contextlib.contextmanager
def in_place_of(path: Path, rng: random.Random, structured: bool) -> Iterator[str]:
    """Damage a file, or put what is not a file there, and say which; undone afterwards."""
    content = path.read_bytes()
    kind = rng.choices(["bytes", "pipe", "folder", "link", "device"], [40, 1, 1, 1, 1])[0]
    path.unlink()
    if kind == "bytes":
        path.write_bytes(damaged(content, rng, structured))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    try:
        yield kind
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def fault(code: int | str, out: str, err: str) -> str:
    """What is wrong with the way in which a command ended; nothing if it is well."""
    last = err.splitlines()[-1] if err.strip() else ""
    if isinstance(code, str):
        return f"traceback ({code})"
    if code and not (last.startswith("fmn: ") and len(last) < 6000):
        return f"code {code} and {last[:100]!r}"
    text = last if code else out
    if strange := {c for c in text if not c.isprintable() and c != "\n"}:
        return f"control characters {strange}"
    return ""


def run(
    cases: int, seed: int, note: Callable[[str], None] = print, late: float = math.inf
) -> dict[str, dict[str, int]]:
    """Damage, call, look; how many cases of each kind ended how. Faults are noted in words."""
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    rng, every, here = random.Random(seed), targets(), Path.cwd()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        os.environ |= {"FMN_RUNS": str(folder / "r"), "FMN_WORKERS": "0", "TQDM_DISABLE": "1"}
        names = prepare(folder)
        before = contents(folder)
        usual: dict[str, Any] = {}
        for number in tqdm(range(cases), "damaging", disable=None):
            if time.monotonic() > late:
                break
            target = every[number % len(every)]
            words, file = target.words, target.file
            for key, value in names.items():
                words, file = words.replace(key, value), file.replace(key, value)
            if words not in usual:
                usual[words] = call(words.split())
                if usual[words][0]:
                    raise RuntimeError(f"{words} fails without any damage: {usual[words]}")
                _restore(folder, before)
            given: list[str] = words.split()
            place: Any = contextlib.nullcontext("words")
            if file:
                place = in_place_of(folder / file, rng, target.structured)
            else:
                for _ in range(rng.choice([1, 1, 2])):
                    at = rng.randrange(1, len(given) + 1)
                    given[at : at + rng.choice([0, 1, 1, 1])] = [rng.choice(HOSTILE)]
            with place as what:
                harmed = contents(folder)
                ended = call(given)
                problem = fault(*ended) or _lost(harmed, contents(folder), given)
            told_so = ended[0] or '"state": "damaged"' in ended[1]
            same = ended[1] == usual[words][1]
            kind = "refused" if told_so else "same" if same else "other"
            # A link to nowhere is as good as no file.
            if not problem and kind == "other" and target.checked and what != "link":
                problem = f"{ended[1][:200]!r} instead of {usual[words][1][:200]!r}"
            if problem:
                kind = "fault"
                note(f"case {number} ({target.kind} {file}; {given!r:.300}): {problem}")
            found[target.kind][kind] += 1
            _restore(folder, before)
    os.chdir(here)
    return {kind: dict(sorted(counts.items())) for kind, counts in sorted(found.items())}


def _lost(before: dict[str, bytes], after: dict[str, bytes], words: list[str]) -> str:
    """Files that are gone or changed, but for what the command is there to write."""
    there = set(after.values())
    lost = [name for name, content in before.items() if content not in there]
    written = {"fuse": ("fusion.json", "fused.json")}.get(words[0] if words else "", ())
    passing = "r/" in "".join(lost) and words[0] == "train"  # a run that went on
    lost = [name for name in lost if not name.endswith(written or ("\0",)) and not passing]
    return f"lost {lost}" if lost else ""


def _restore(folder: Path, before: dict[str, bytes]) -> None:
    """What is new goes, pipes and folders too, and what is gone or changed is written again."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before it
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in before:
            path.unlink()
    after = contents(folder)
    for name, content in before.items():
        if after.get(name) != content:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-minutes", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, help=f"file for the counts, such as {OUT.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    faults: list[str] = []
    late = time.monotonic() + 60 * given.max_minutes
    found = run(given.cases, given.seed, lambda text: (faults.append(text), print(text))[0], late)
    total = sum((collections.Counter(c) for c in found.values()), collections.Counter())
    content = {"cases": total.total(), "seed": given.seed, "total": total, "kinds": found}
    print(json.dumps(content, indent=1))
    if given.out:
        write_whole(given.out, f"{json.dumps(content, indent=1)}\n".encode())
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
