"""Measure what this library costs on this machine, and print one table.

    python -m benchmarks [training recording at_once search distillation] [--repeats 3]

The table goes to standard output, the numbers to results/benchmarks/. Run it on a quiet machine.
"""

import argparse
import dataclasses
import json
import platform
import re
import sys
import time
from pathlib import Path

from benchmarks.distillation import distillation
from benchmarks.machine import Machine
from benchmarks.measure import table
from benchmarks.search import search
from benchmarks.training import recording, side_by_side, throughput
from fmnlib.files import write_whole
from fmnlib.recorder import provenance
from fmnlib.training import pick_device

SECTIONS = {
    "training": throughput,
    "recording": recording,
    "at_once": side_by_side,
    "search": search,
    "distillation": distillation,
}
FOLDER = Path(__file__).parent.parent / "results" / "benchmarks"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each measurement")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the numbers")
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; choose of {', '.join(SECTIONS)}")
    started = time.perf_counter()
    machine = Machine.measure(pick_device(given.device))
    rows = []
    for name in given.sections or SECTIONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += SECTIONS[name](machine, given.repeats, given.small)
        about = provenance(machine.device, time.perf_counter() - started)
        about |= {"cpu": platform.processor() or platform.machine(), "small": given.small}
        about |= {"operations_per_s": machine.operations, "bytes_per_s": machine.bytes}
        numbers = {"provenance": about, "rows": [dataclasses.asdict(row) for row in rows]}
        slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        given.out.mkdir(parents=True, exist_ok=True)  # now: the machine may be lent for minutes
        write_whole(given.out / f"{slug}.json", (json.dumps(numbers, indent=1) + "\n").encode())
    print(table(rows))
    rates = f"{machine.operations / 1e12:.3g} TFLOP/s and {machine.bytes / 1e9:.3g} GB/s"
    print(f"\n{machine}: measured {rates}.")


if __name__ == "__main__":
    main()
