"""Two real processes on the CPU, with gloo."""

import multiprocessing
import os
import time

import pytest
import torch
from accelerate import PartialState
from torch import nn

from p2d_peft.efficiency import StageClock
from p2d_peft.processes import of_all_processes


class Model(nn.Module):
    def forward(self, input_ids):
        return input_ids


def work(rank, store, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    PartialState._reset_state()  # the parent's, if it has one
    PartialState(cpu=True)  # as Trainer does
    model, clock = Model(), StageClock()
    with clock.stage("localize", model):
        model(torch.ones(1, 10 + rank, dtype=torch.long))
        time.sleep(0.3 * rank)
    with clock.stage("train", tokens=lambda: 5):
        time.sleep(0.3 * (1 - rank))
        costs = clock.costs_of_all()
    results.put((rank, costs, of_all_processes(rank)))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="spawning takes too long")
def test_a_stage_takes_as_long_as_the_slowest_process(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=work, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in both:
        process.start()
    (_, first, ranks), (_, second, _) = sorted((results.get(timeout=60) for _ in both), key=lambda found: found[0])
    for process in both:
        process.join(timeout=60)
    assert ranks == [0, 1]
    for costs in (first, second):
        assert min(costs.seconds.values()) >= 0.28  # the other one's 0.3, of which its start takes a little
        assert costs.tokens == {"localize": 10 + 11, "train": 0}
    assert first.peak_memory == second.peak_memory
