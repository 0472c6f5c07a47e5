"""The files of benchmarks/ as modules; they are no package, as scripts are run by their path."""

import importlib
import sys
from pathlib import Path


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load_benchmark(name):
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))  # they import one another, too
    return importlib.import_module(name)
