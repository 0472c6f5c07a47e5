"""The peak of the memory that a stretch of work takes, on the accelerator or, without one, in the process."""

from __future__ import annotations

import threading
from typing import Literal

import psutil
import torch


MemoryKind = Literal["accelerator", "process"]
# Often enough for what a training step allocates on a CPU, and too seldom to be felt.
SAMPLE_SECONDS = 0.05


def memory_kind() -> MemoryKind:
    """
    What [`PeakMemory`] looks at.

    `"accelerator"`: the bytes that torch's allocator has handed out on the accelerator, the most on any one of this
    process's devices. torch counts them itself, so the peak is exact.

    `"process"`: the resident set of the process, with all that is in it, libraries and datasets too. Without an
    accelerator, and with one whose memory torch does not count (or with torch before 2.9), there is nothing better. It
    is sampled, so that a short peak may go unseen, and what an earlier stage left behind is in it.
    """
    if not torch.accelerator.is_available() or not hasattr(torch.accelerator, "max_memory_allocated"):
        return "process"
    try:
        torch.accelerator.max_memory_allocated()
    except RuntimeError:
        return "process"
    return "accelerator"


class PeakMemory:
    """
    Watches the memory of this process, with breaks.

    torch keeps one peak for each device, which is set back whenever watching begins.
    """

    def __init__(self) -> None:
        self._watch = _AcceleratorPeak() if memory_kind() == "accelerator" else _ResidentPeak()
        self._peak = 0
        self._watching = False

    def resume(self) -> None:
        """Begin to watch, or go on."""
        self._watch.start()
        self._watching = True

    def pause(self) -> None:
        """Take a break."""
        if self._watching:
            self._peak = max(self._peak, self._watch.stop())
            self._watching = False

    @property
    def bytes(self) -> int:
        """The peak so far, in bytes."""
        if self._watching:
            self._peak = max(self._peak, self._watch.peak())
        return self._peak


class _AcceleratorPeak:
    def start(self) -> None:
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.reset_peak_memory_stats(index)

    def peak(self) -> int:
        return max(torch.accelerator.max_memory_allocated(index) for index in range(torch.accelerator.device_count()))

    stop = peak


class _ResidentPeak:
    def __init__(self) -> None:
        self._process = psutil.Process()

    def start(self) -> None:
        self._largest = self._now()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(self._end,), daemon=True)
        self._thread.start()

    def _sample(self, end: threading.Event) -> None:
        while not end.wait(SAMPLE_SECONDS):
            self._largest = max(self._largest, self._now())

    def peak(self) -> int:
        self._largest = max(self._largest, self._now())
        return self._largest

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self.peak()

    def _now(self) -> int:
        resident: int = self._process.memory_info().rss
        return resident
