"""What a benchmark says about where its numbers come from."""

from __future__ import annotations

import os
import platform
import re
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from p2d_peft.report.run_report import library_versions


def machine() -> dict[str, Any]:
    """The machine, as far as it matters for the numbers."""
    found = {"cpu": _cpu(), "cpus": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    """The processor's name and, as a rented one may hide it, the numbers by which its kind is known."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    numbers = [f"{name.removeprefix('cpu ')} {said[name]}" for name in ("cpu family", "model") if name in said]
    return said["model name"] + (f" ({', '.join(numbers)})" if numbers else "")


def device() -> torch.device:
    """The accelerator, or the CPU without one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def processes_per_device(jobs: int) -> int:
    """How many of so many processes share an accelerator, or the CPU where there is none."""
    return -(-jobs // torch.accelerator.device_count()) if torch.accelerator.is_available() else jobs


def now() -> float:
    """Seconds of a clock, once the accelerator, if there is one, has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def versions() -> dict[str, str]:
    """The versions of this library, of Python and of the libraries that a result depends on."""
    return library_versions()


def load_average() -> float | None:
    """How many processes wanted to run over the last minute, where the system says so."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def command(script: str, arguments: list[str]) -> str:
    """The command line as it may be published: of each path only its last part."""
    return shlex.join(["python", f"benchmarks/{script}", *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    # a cell of a profile, such as `own gsm8k affinity:proxy/fifth`, is no path
    return argument if re.search(r"[\s:]", value) else name + equals + re.sub(r".*/(?=[^/])", "", value)
