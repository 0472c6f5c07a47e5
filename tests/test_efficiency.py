import time

import pytest
import torch

from p2d_peft import efficiency
from p2d_peft.efficiency import StageClock, alignment_efficiency_ratio, estimate_reference

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
        assert clock.seconds == {"select": 2, "train": 5}  # a running stage counts so far
        watch.now += 1
    watch.now += 50  # nobody's time
    with pytest.raises(RuntimeError), clock.stage("train"):
        watch.now += 4
        raise RuntimeError
    assert clock.seconds == {"select": 2, "train": 10}


def test_stage_clock_pauses_and_goes_on_from_an_earlier_run(monkeypatch):
    watch, clock = Time(monkeypatch), StageClock()
    clock.set({"localize": 7.0, "train": 0.5})
    with clock.stage("train"):
        watch.now += 1
        with pytest.raises(RuntimeError), clock.paused():
            watch.now += 100
            raise RuntimeError
        watch.now += 2
    with clock.paused():
        watch.now += 100
    assert clock.seconds == {"localize": 7, "train": 3.5}


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
    assert 0.02 <= clock.seconds["train"] < 5
