"""Measure on a quiet machine what this library costs; what is known is kept after each section."""

import argparse
import json
import re
import sys
import time
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.report import report
from benchmarks.search import search
from benchmarks.training import at_once, distillation, recording, throughput
from fmnlib import InputError
from fmnlib.files import write_whole
from fmnlib.recorder import provenance
from fmnlib.training import pick_device

SECTIONS = {"training": throughput, "recording": recording, "at_once": at_once, "search": search}
SECTIONS |= {"distillation": distillation}
FOLDER = Path(__file__).parent.parent / "results" / "benchmarks"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each measurement")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    given = parser.parse_args()
    if unknown := ", ".join(set(given.sections) - set(SECTIONS)):
        parser.error(f"no section {unknown}; choose of {', '.join(SECTIONS)}")
    if given.out == FOLDER and (given.small or given.sections):
        parser.error("the book's table has every section at full size; give --out another folder")
    if given.repeats < 1:
        parser.error(f"repeats is {given.repeats}; take 1 or more")
    try:
        device = pick_device(given.device)
        given.out.mkdir(parents=True, exist_ok=True)
    except (InputError, OSError) as error:
        parser.error(str(error))
    started, machine = time.perf_counter(), Machine.of(device)
    rows: list[dict[str, object]] = []
    for name in given.sections or SECTIONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = SECTIONS[name](machine, given.repeats, given.small)
        rows += [{"section": name.replace("_", " ")} | row for row in found]
        about = provenance(device, time.perf_counter() - started)
        about |= {"small": given.small, "dtype": str(machine.dtype).removeprefix("torch.")}
        about |= {"operations_per_s": machine.operations, "bytes_per_s": machine.bytes}
        numbers = {"provenance": about, "rows": rows}
        path = given.out / re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        write_whole(path.with_suffix(".json"), f"{json.dumps(numbers, indent=1)}\n".encode())
        write_whole(path.with_suffix(".md"), report(numbers).encode())
    print(report(numbers), end="")


if __name__ == "__main__":
    main()
