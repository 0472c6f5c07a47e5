import time

import pytest
import torch

from p2d_peft import efficiency, processes
from p2d_peft.efficiency import StageClock, StageCosts, alignment_efficiency_ratio, estimate_reference

from .model_checks import assert_unchanged, mixed_state, snapshot
from .tiny_models import random_batch, tiny_model


def test_aer_charges_every_stage():
    assert alignment_efficiency_ratio({"localize": 1.0, "select": 2.0, "train": 3.0}, 60.0) == pytest.approx(0.1)
    assert alignment_efficiency_ratio({"train": 30.0}, 60.0) == 0.5


@pytest.mark.parametrize("reference", [0.0, -1.0, float("nan")])
def test_aer_needs_a_positive_reference(reference):
    with pytest.raises(ValueError, match=r"`reference_seconds` must be positive"):
        alignment_efficiency_ratio({"train": 1.0}, reference)


@pytest.mark.parametrize("stages", [{"sleep": 1.0}, {"train": -1.0}, {"train": float("nan")}])
def test_aer_refuses_what_is_no_stage_time(stages):
    with pytest.raises(ValueError, match="`stage_seconds` must hold"):
        alignment_efficiency_ratio(stages, 1.0)


class Time:
    """A clock that moves when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(efficiency.time, "perf_counter", lambda: self.now)


def test_stage_clock_adds_up(monkeypatch):
    watch, clock = Time(monkeypatch), StageClock()
    with clock.stage("select"):
        watch.now += 2
    with clock.stage("train"):
        watch.now += 5
        assert clock.costs.seconds == {"select": 2, "train": 5}  # a running stage counts so far
        watch.now += 1
    watch.now += 50  # nobody's time
    with pytest.raises(RuntimeError), clock.stage("train"):
        watch.now += 4
        raise RuntimeError
    assert clock.costs.seconds == {"select": 2, "train": 10}


def test_stage_clock_pauses_and_goes_on_from_an_earlier_run(monkeypatch):
    watch, clock = Time(monkeypatch), StageClock()
    clock.set(StageCosts({"localize": 7.0, "train": 0.5}, {"train": 30}, {"localize": 5, "train": 6}))
    with clock.stage("train"):
        watch.now += 1
        with pytest.raises(RuntimeError), clock.paused():
            watch.now += 100
            raise RuntimeError
        watch.now += 2
    with clock.paused():
        watch.now += 100
    assert clock.costs.seconds == {"localize": 7, "train": 3.5}
    assert clock.costs.tokens == {"train": 30}
    assert clock.costs.peak_memory["localize"] == 5 and clock.costs.peak_memory["train"] > 1e6
    assert clock.costs.without("train") == StageCosts({"localize": 7}, {}, {"localize": 5})


def test_what_is_taken_over_from_an_earlier_run_is_charged():
    clock = StageClock()
    clock.charge("select", 2.0, 30)
    clock.set(StageCosts({"localize": 1.0, "select": 2.0}, {"select": 30}, {"select": 5}))
    clock.charge("select", 3.0, 7)
    assert clock.costs == StageCosts({"localize": 1, "select": 5}, {"select": 37}, {"select": 5})


def test_a_pause_within_a_pause_counts_once(monkeypatch):
    """`evaluate` calls itself for each of several datasets."""
    watch, clock = Time(monkeypatch), StageClock()
    with clock.stage("train"):
        watch.now += 1
        with clock.paused():
            watch.now += 10
            with clock.paused():
                watch.now += 100
        watch.now += 2
    assert clock.costs.seconds == {"train": 3}


def test_stage_clock_counts_tokens():
    model, clock, seen = tiny_model(), StageClock(), [100]
    with clock.stage("localize", model):
        model(**random_batch(padding=2))  # 20 tokens
        assert clock.costs.tokens == {"localize": 20}
        model(**random_batch(padding=0))
    model(**random_batch())  # nobody's
    with clock.stage("train", tokens=lambda: seen[0]):
        seen[0] += 7
        assert clock.costs.tokens == {"localize": 42, "train": 7}
    with clock.stage("train", tokens=lambda: seen[0]):
        seen[0] += 3
    assert clock.costs.tokens == {"localize": 42, "train": 10}


def test_stage_clock_sees_the_memory_of_each_stage(monkeypatch):
    class Memory:
        """Holds what it is told to."""

        now = 0
        bytes = property(lambda self: Memory.now)

        def resume(self):
            pass

        pause = resume

    monkeypatch.setattr(efficiency, "PeakMemory", Memory)
    clock = StageClock()
    for stage, size in (("localize", 30), ("select", 10), ("localize", 20)):
        with clock.stage(stage):
            Memory.now = size
    assert clock.costs.peak_memory == {"localize": 30, "select": 10}


class Processes:
    """A group of two processes, of which the other one has its own answers ready."""

    def __init__(self, monkeypatch, theirs=()):
        self.waits, self.theirs = 0, iter(theirs)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(processes, "PartialState", lambda: self)
        monkeypatch.setattr(processes, "gather_object", lambda ours: [*ours, next(self.theirs)])

    def wait_for_everyone(self):
        self.waits += 1
        self.on_wait()

    def on_wait(self):
        pass


def test_stage_clock_charges_the_wait_for_other_processes(monkeypatch):
    watch, group, clock = Time(monkeypatch), Processes(monkeypatch, [{"train": 1}] * 2), StageClock()

    def other_is_slow():
        watch.now += 5

    with clock.stage("train"):
        assert group.waits == 1
        group.on_wait = other_is_slow
        watch.now += 2
        with clock.paused():
            watch.now += 100
        assert clock.costs.seconds == {"train": 2 + 5}  # the wait at the beginning of a pause is the stage's
        clock.costs_of_all()
    assert clock.costs.seconds == {"train": 2 + 5 + 5 + 5}
    assert group.waits == 5


def test_costs_of_all_processes_come_together(monkeypatch):
    theirs = [{"localize": 10**15}, 1000, {"localize": 10**15, "train": 10**15}]
    Processes(monkeypatch, theirs)
    model, clock = tiny_model(), StageClock()
    with clock.stage("localize", model):
        model(**random_batch(padding=0))
    assert clock.costs.tokens == {"localize": 22 + 1000}
    assert clock.costs.peak_memory == {"localize": 10**15}
    with pytest.raises(RuntimeError, match="boom"), clock.stage("train"):
        assert clock.costs_of_all().peak_memory["train"] == 10**15
        raise RuntimeError("boom")


def test_a_pause_of_one_process_waits_for_no_other(monkeypatch):
    watch, group, clock = Time(monkeypatch), Processes(monkeypatch, [{"train": 1}]), StageClock()
    with clock.stage("train"):
        with clock.paused(everyone=False):
            watch.now += 100
        assert group.waits == 1
        watch.now += 2
    assert clock.costs.seconds == {"train": 2}


def test_nobody_waits_where_something_went_wrong(monkeypatch):
    group, clock = Processes(monkeypatch), StageClock()
    with pytest.raises(RuntimeError, match="boom"), clock.stage("train"):
        raise RuntimeError("boom")
    assert group.waits == 1 and "train" in clock.costs.seconds


def loss_of(model):
    return lambda batch: model(**batch).loss


def sgd(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


def test_the_estimate_leaves_the_model_bit_for_bit():
    model = mixed_state(tiny_model())
    before = snapshot(model)
    batches = [random_batch(seed=seed) for seed in range(3)]
    reference = estimate_reference(model, batches, loss_of(model), sgd, pool_tokens=1000, steps_per_epoch=10)
    assert_unchanged(model, before)
    assert reference.source == "estimated" and reference.seconds_per_epoch > 0 and reference.relative_error >= 0


def test_the_estimate_leaves_the_model_bit_for_bit_also_after_an_exception():
    model = mixed_state(tiny_model())
    before, calls = snapshot(model), []

    def failing_loss(batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("boom")
        return model(**batch).loss

    with pytest.raises(RuntimeError, match="boom"):
        estimate_reference(model, [random_batch()] * 3, failing_loss, sgd, pool_tokens=1, steps_per_epoch=1)
    assert_unchanged(model, before)


def test_the_estimate_trains_all_weights():
    model, trained = tiny_model(), []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            trained.append(
                [parameter.grad is not None for group in self.param_groups for parameter in group["params"]]
            )
            return super().step(closure)

    model.requires_grad_(False)
    estimate_reference(
        model, [random_batch()] * 2, loss_of(model), lambda p: Spy(p, lr=0.1), pool_tokens=1, steps_per_epoch=1
    )
    assert len(trained) == 2 and all(trained[0]) and len(trained[0]) == len(list(model.parameters()))


def test_the_estimate_is_seconds_a_token_and_a_step(monkeypatch):
    """2 s for each pass over 22 tokens (10 s the first time, which warms up) and 1 s for each optimizer step."""
    model, watch = tiny_model(), Time(monkeypatch)
    calls = []

    def loss(batch):
        calls.append(1)
        watch.now += 10 if len(calls) == 1 else 2
        return model(**batch).loss

    class Slow(torch.optim.SGD):
        def step(self, closure=None):
            watch.now += 1
            return super().step(closure)

    reference = estimate_reference(
        model,
        [random_batch(padding=0)] * 4,
        loss,
        lambda p: Slow(p, lr=0.1),
        pool_tokens=2200,
        steps_per_epoch=7,
    )
    assert reference.seconds_per_epoch == pytest.approx(2200 * 2 / 22 + 7)
    assert reference.relative_error == pytest.approx(0)


def test_the_estimate_does_not_count_padding(monkeypatch):
    model, watch = tiny_model(), Time(monkeypatch)

    def loss(batch):
        watch.now += 2
        return model(**batch).loss

    batches = [random_batch(padding=2)] * 2  # 22 positions, 20 tokens
    reference = estimate_reference(
        model, batches, loss, lambda p: torch.optim.SGD(p, lr=0.1), pool_tokens=100, steps_per_epoch=1
    )
    assert reference.seconds_per_epoch == pytest.approx(100 * 2 / 20)
    assert reference.relative_error is None


def test_errors_of_the_estimate():
    model = tiny_model()
    with pytest.raises(ValueError, match="at least 2 batches"):
        estimate_reference(model, [random_batch()], loss_of(model), sgd, 1, 1)
    model.q = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized weights cannot be timed"):
        estimate_reference(model, [random_batch()] * 2, loss_of(model), sgd, 1, 1)


def test_time_is_wall_clock_time():
    clock = StageClock()
    with clock.stage("train"):
        time.sleep(0.02)
    assert 0.02 <= clock.costs.seconds["train"] < 5
