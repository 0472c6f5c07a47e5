"""
What `import p2d_peft` takes beyond `import peft`, which a user of adapters pays anyway.

    python benchmarks/import_time.py --output benchmarks/results/import_time.json

Each round starts a fresh interpreter that imports peft, then p2d_peft, and times both; the median counts. Both of the wall
and of the processor, as the wall's time of an import is also that of a machine's other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import load_average, machine, versions

from p2d_peft.files import write_json


_TIMED = """
import json, sys, time
taken, loaded = {}, {}
for name in ("peft", "p2d_peft"):
    before, wall, cpu = set(sys.modules), time.perf_counter(), time.process_time()
    __import__(name)
    taken[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    loaded[name] = len(set(sys.modules) - before)
print(json.dumps([taken, loaded]))
"""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Time the imports; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    rounds = []
    for _ in range(args.rounds + 1):
        run = subprocess.run([sys.executable, "-c", _TIMED], capture_output=True, text=True, check=True)
        rounds.append(json.loads(run.stdout.splitlines()[-1]))
    rounds = rounds[1:]  # the first may write bytecode
    result = {
        "command": f"python benchmarks/import_time.py --rounds {args.rounds}",
        "machine": machine(),
        "versions": versions(),
        "load_average": load_average(),
        "seconds": {
            name: {
                clock: {
                    "median": round(statistics.median(taken[name][clock] for taken, _ in rounds), 4),
                    "least": round(min(taken[name][clock] for taken, _ in rounds), 4),
                }
                for clock in ("wall", "cpu")
            }
            for name in ("peft", "p2d_peft")
        },
        "modules": rounds[0][1],
    }
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
