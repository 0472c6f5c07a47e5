import time

import pytest
import torch

from p2d_peft import memory
from p2d_peft.memory import PeakMemory, memory_kind


class Accelerator:
    """Two devices that count their memory as torch does."""

    def __init__(self, monkeypatch):
        self.now, self.peak = [0, 0], [0, 0]
        for name, function in {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "max_memory_allocated": lambda index=0: self.peak[index],
            "reset_peak_memory_stats": lambda index=0: self.peak.__setitem__(index, self.now[index]),
        }.items():
            monkeypatch.setattr(torch.accelerator, name, function)

    def hold(self, *sizes):
        self.now = list(sizes)
        self.peak = [max(pair) for pair in zip(self.peak, self.now, strict=True)]


def test_an_accelerator_counts_itself(monkeypatch):
    accelerator = Accelerator(monkeypatch)
    assert memory_kind() == "accelerator"
    accelerator.hold(900, 0)
    accelerator.hold(100, 10)
    peak = PeakMemory()
    peak.resume()
    assert peak.bytes == 100  # what was there before it began is not its own
    accelerator.hold(150, 200)
    accelerator.hold(50, 50)
    assert peak.bytes == 200
    peak.pause()
    accelerator.hold(700, 700)
    accelerator.hold(10, 10)
    peak.resume()
    accelerator.hold(20, 20)
    peak.pause()
    peak.pause()
    assert peak.bytes == 200


@pytest.mark.parametrize("error", [RuntimeError("not for this device"), None])
def test_an_accelerator_that_does_not_count_leaves_the_process(error, monkeypatch):
    Accelerator(monkeypatch)

    def fail():
        raise error

    if error is None:
        monkeypatch.delattr(torch.accelerator, "max_memory_allocated")
    else:
        monkeypatch.setattr(torch.accelerator, "max_memory_allocated", fail)
    assert memory_kind() == "process"


def test_a_peak_of_the_process_between_two_looks_is_sampled(monkeypatch):
    looks = []

    def resident(self):
        looks.append(1)
        return 300 if len(looks) == 2 else 100

    monkeypatch.setattr(memory._ResidentPeak, "_now", resident)
    monkeypatch.setattr(memory, "SAMPLE_SECONDS", 0.001)
    peak = PeakMemory()
    peak.resume()
    deadline = time.monotonic() + 10
    while len(looks) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    peak.pause()
    assert peak.bytes == 300


def test_the_process_holds_what_it_holds():
    peak = PeakMemory()
    peak.resume()
    before = peak.bytes
    ballast = torch.ones(50_000_000, dtype=torch.uint8)
    assert peak.bytes >= before + 40_000_000
    peak.pause()
    del ballast
    assert peak.bytes >= before + 40_000_000
