import copy
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import pack_dataset

from p2d_peft import HeadSet, P2DTrainer
from p2d_peft.efficiency import Reference
from p2d_peft.trainer import reference as module
from p2d_peft.trainer.reference import (
    check_reference,
    count_tokens,
    epochs_of_run,
    find_reference,
    random_rows,
    steps_of_an_epoch,
)

from ..tiny_data import prompt_completion
from .plain_sft import plain_sft
from .test_measured_run import FULL, METRICS
from .test_p2d_trainer import config, trainer


def fake_trainer(**changes):
    args = {
        "reference_seconds": None,
        "reference_report": None,
        "packing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "world_size": 2,
        "device": torch.device("cpu"),
    }
    return SimpleNamespace(
        args=SimpleNamespace(**{**args, **changes}),
        model=SimpleNamespace(config=SimpleNamespace(name_or_path="org/name")),
    )


def test_a_report_of_the_same_run_says_nothing(tmp_path, caplog):
    FULL.save(tmp_path / "p2d_report.json")
    reference = find_reference(fake_trainer(reference_report=str(tmp_path)), None, 100, 1000, 1.0)
    assert reference == Reference(15.0, "measured")
    assert not caplog.text


def test_a_report_of_another_run_is_refused_or_warned_of(tmp_path, caplog):
    FULL.save(tmp_path / "p2d_report.json")
    for function in (check_reference, lambda trainer, n_rows: find_reference(trainer, None, n_rows, 1000, 1.0)):
        with pytest.raises(ValueError, match="is of a run on 100 rows, but `train_dataset` has 99"):
            function(fake_trainer(reference_report=str(tmp_path)), 99)
        function(fake_trainer(reference_report=str(tmp_path)), None)  # a stream that was not read
    other = fake_trainer(reference_report=str(tmp_path), world_size=1, device=torch.device("meta"), packing=True)
    other.model.config.name_or_path = "org/other"
    assert not caplog.text
    find_reference(other, None, 99, 1000, 1.0)
    for words in ("model 'org/name', this one has 'org/other'", "device 'cpu'", "processes 2, this one has 1"):
        assert words in caplog.text


@pytest.mark.parametrize(("rows", "warns"), [(100, False), (85, False), (60, True), (200, True)])
def test_a_run_at_the_speed_of_another_pool_is_warned_of(rows, warns, tmp_path, caplog):
    (tmp_path / "train_results.json").write_text(json.dumps(METRICS))
    find_reference(fake_trainer(reference_report=str(tmp_path)), None, rows, 1000, 1.0)
    assert ("took about 100 rows an epoch" in caplog.text) == warns


@pytest.mark.parametrize(("error", "warns"), [(0.2, 1), (0.05, 0), (None, 0)])
def test_a_wide_estimate_is_warned_of_and_its_spread_is_a_metric(error, warns, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "estimate_reference", lambda *_, **__: Reference(100.0, "estimated", error))
    run = trainer(tmp_path, changes={"localize_method": "random", "scorer": "random", "max_steps": 1})
    metrics = run.train().metrics
    assert caplog.text.count("The reference is an estimate with a standard error of") == warns
    assert metrics.get("train_p2d_reference_relative_error") == error


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_is_shared_by_the_processes(packing, tmp_path, monkeypatch):
    changes = {"packing": packing, "packing_strategy": "wrapped", "max_length": 40, "gradient_accumulation_steps": 2}
    run = trainer(tmp_path, changes=changes)
    pool, seen = run.train_dataset, {}
    n_tokens = sum(map(len, pool["input_ids"]))

    def estimate(model, batches, loss, make_optimizer, **kwargs):
        seen.update(kwargs, batches=batches)
        return Reference(1.0, "estimated")

    monkeypatch.setattr(module, "estimate_reference", estimate)
    monkeypatch.setattr(type(run.args), "world_size", 2)
    find_reference(run, pool, len(pool), n_tokens, 1.0)
    assert seen["pool_tokens"] == n_tokens / 2
    rows = -(-n_tokens // 40) if packing else 32
    assert seen["steps_per_epoch"] == -(-rows // (4 * 2 * 2))
    assert len(seen["batches"]) == 2
    shapes = {tuple(batch["input_ids"].shape) for batch in seen["batches"]}
    assert (shapes == {(4, 40)}) == packing


def long_rows(n, n_tokens):
    """Rows of so many tokens, of which the tokenizer adds the last."""
    return Dataset.from_dict({"text": ["a" * (n_tokens - 1)] * n})


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_what_a_packing_strategy_drops_is_not_counted(strategy, tmp_path):
    lengths = [57, 30, 3, 281, 12, 31] * 4
    rows = Dataset.from_dict({"input_ids": [[5] * length for length in lengths]})
    args = config(tmp_path, packing=True, packing_strategy=strategy, max_length=30)
    packed = pack_dataset(rows, 30, strategy)
    assert count_tokens(rows, args) == sum(map(len, packed["input_ids"]))
    assert (count_tokens(rows, args) == sum(lengths)) == (strategy != "bfd")
    assert count_tokens(rows, config(tmp_path, packing_strategy=strategy, max_length=30)) == sum(lengths)


@pytest.mark.parametrize("n_tokens", [57, 281])
def test_of_packed_rows_the_reference_takes_what_sft_trainer_trains_on(n_tokens, tmp_path, monkeypatch, caplog):
    changes = {"packing": True, "max_length": 30, "num_train_epochs": 1, "scorer": "random", "data_ratio": 0.25}
    run = trainer(tmp_path, pool=long_rows(32, n_tokens), changes=changes, heads=HeadSet([(0, 1)]))
    seen, estimate = {}, module.estimate_reference

    def spy(model, batches, *args, **kwargs):
        seen.update(kwargs, shapes=[tuple(batch["input_ids"].shape) for batch in batches])
        return estimate(model, batches, *args, **kwargs)

    monkeypatch.setattr(module, "estimate_reference", spy)
    run.train()
    plain = plain_sft(run, long_rows(32, n_tokens))
    assert (seen["steps_per_epoch"], seen["pool_tokens"]) == (len(plain.train_dataset) / 4, 32 * 30)
    assert seen["shapes"] == [(4, 30)] * 2 and "could not be estimated" not in caplog.text
    assert run.report.pool_tokens == sum(map(len, plain.train_dataset["input_ids"]))
    assert run.report.selected_tokens == run.report.stage_tokens["train"] == 8 * 30


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_steps": 2},
        {"max_steps": 5},
        # 3 of an epoch's 4 batches, and one of its 2 steps
        {"max_steps": 1, "gradient_accumulation_steps": 3},
        {"max_steps": 2, "packing": True, "packing_strategy": "wrapped", "max_length": 40},
    ],
    ids=str,
)
def test_seconds_that_are_given_are_those_of_the_whole_reference(changes, tmp_path):
    changes = {"scorer": "random", "reference_seconds": 100.0, **changes}
    run = trainer(tmp_path, changes=changes, heads=HeadSet([(0, 1)]))
    assert run.estimate().reference_seconds == pytest.approx(100)
    run.train()
    assert run.report.reference_seconds == pytest.approx(100) and run.report.reference_source == "given"
    per_epoch = run._p2d_state.reference.seconds_per_epoch  # for a resumed run that is given none
    assert per_epoch * run.report.epochs == pytest.approx(100, rel=0.5)


def test_of_a_run_that_stops_early_the_reference_is_as_much(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    changes = {"scorer": "random", "reference_seconds": 100.0}
    run = trainer(tmp_path, changes=changes, heads=HeadSet([(0, 1)]), callbacks=[Stop()])
    run.train()
    assert (run.state.max_steps, run.report.reference_seconds) == (8, 25)


class OwnLoss(P2DTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model(**inputs)  # of a teacher, say
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("loss", ["plain", "label smoothing", "a function", "a subclass"])
def test_the_reference_passes_as_often_through_the_model_as_the_training(loss, tmp_path):
    # before 1.16 TRL's default could do with neither
    changes = {"max_steps": 2, "scorer": "random", "loss_type": "nll"}
    changes["label_smoothing_factor"] = 0.1 if loss == "label smoothing" else 0.0

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    given = {"compute_loss_func": compute_loss} if loss == "a function" else {}
    kind = OwnLoss if loss == "a subclass" else P2DTrainer
    run = trainer(tmp_path, changes=changes, heads=HeadSet([(0, 1)]), kind=kind, **given)
    passes = []
    run.model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    metrics = copy.deepcopy(run._metrics)
    assert find_reference(run, run.train_dataset, 32, 1000, 1.0).source == "estimated"
    estimated = list(passes)
    assert run._metrics == metrics and run._total_train_tokens == 0
    passes.clear()
    run.args.reference_steps = 0
    run.train()
    assert passes == estimated and len(passes) >= (4 if loss == "a subclass" else 2)


def test_the_reference_pads_as_the_training_does(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "estimate_reference", lambda model, batches, *_, **__: seen.extend(batches) or Reference(1.0, "given")
    )
    run = trainer(tmp_path, changes={"pad_to_multiple_of": 64})
    find_reference(run, run.train_dataset, 32, 1000, 1.0)
    assert [tuple(batch["input_ids"].shape) for batch in seen] == [(4, 64)] * 2


def test_rows_that_are_grouped_by_length_are_so_in_the_reference(tmp_path):
    pool = prompt_completion(64)
    lengths = torch.randint(10, 150, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    pool = pool.map(lambda row, i: {"prompt": "a" * lengths[i]}, with_indices=True)

    def spread(changes):
        run = trainer(tmp_path, pool=pool, changes=changes)
        rows = random_rows(run, run.train_dataset, 32, 64, 1000)
        sizes = list(map(len, rows["input_ids"]))
        assert len(sizes) == 32
        return sum(max(batch) - min(batch) for batch in zip(*[iter(sizes)] * 4, strict=True))

    assert spread({"train_sampling_strategy": "group_by_length"}) < 0.6 * spread({})


def test_of_a_compiled_training_there_is_no_estimate(tmp_path, caplog):
    run = trainer(tmp_path)
    run.args.torch_compile = True
    assert find_reference(run, run.train_dataset, 32, 1000, 1.0) is None
    assert "could not be estimated, so there will be no AER: The training is compiled" in caplog.text


def test_a_last_batch_that_is_dropped_is_no_step(tmp_path):
    args = config(tmp_path, dataloader_drop_last=True, gradient_accumulation_steps=2)
    assert [steps_of_an_epoch(args, n_rows, 1000) for n_rows in (8, 11, 12, 15, 16)] == [1, 1, 2, 2, 2]


def test_a_stream_has_one_epoch_of_steps(tmp_path):
    args = config(tmp_path, max_steps=6)
    assert epochs_of_run(args, None, None) == 1 and epochs_of_run(args, 16, 100.0) == 1.5
    assert epochs_of_run(config(tmp_path), 16, 100.0) == 2


def test_of_a_model_of_which_a_part_is_offloaded_there_is_no_estimate(tmp_path, caplog):
    run = trainer(tmp_path, changes={"reference_steps": 1})
    run.model.offloaded = torch.nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)
    assert find_reference(run, run.train_dataset, 32, 1000, 1.0) is None
    assert "could not be estimated, so there will be no AER: Some of the weights are offloaded" in caplog.text


def test_of_a_model_that_is_yet_to_be_brought_to_its_device_there_is_no_estimate(tmp_path, caplog, monkeypatch):
    run = trainer(tmp_path, changes={"reference_steps": 1})
    monkeypatch.setattr(module, "model_device", lambda model: torch.device("meta"))
    run.is_fsdp_enabled = True
    assert find_reference(run, run.train_dataset, 32, 1000, 1.0) is None
    assert "so there will be no AER: The model is brought to where it is trained only then." in caplog.text
