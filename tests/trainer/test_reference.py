import json
from types import SimpleNamespace

import pytest
import torch

from p2d_peft.efficiency import Reference
from p2d_peft.trainer import reference as module
from p2d_peft.trainer.reference import check_reference, find_reference

from .test_measured_run import FULL, METRICS
from .test_p2d_trainer import trainer


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
    reference = find_reference(fake_trainer(reference_report=str(tmp_path)), None, 100, 1000)
    assert reference == Reference(15.0, "measured")
    assert not caplog.text


def test_a_report_of_another_run_is_refused_or_warned_of(tmp_path, caplog):
    FULL.save(tmp_path / "p2d_report.json")
    for function in (check_reference, lambda trainer, n_rows: find_reference(trainer, None, n_rows, 1000)):
        with pytest.raises(ValueError, match="is of a run on 100 rows, but `train_dataset` has 99"):
            function(fake_trainer(reference_report=str(tmp_path)), 99)
        function(fake_trainer(reference_report=str(tmp_path)), None)  # a stream that was not read
    other = fake_trainer(reference_report=str(tmp_path), world_size=1, device=torch.device("meta"), packing=True)
    other.model.config.name_or_path = "org/other"
    assert not caplog.text
    find_reference(other, None, 99, 1000)
    for words in ("model 'org/name', this one has 'org/other'", "device 'cpu'", "processes 2, this one has 1"):
        assert words in caplog.text


@pytest.mark.parametrize(("rows", "warns"), [(100, False), (85, False), (60, True), (200, True)])
def test_a_run_at_the_speed_of_another_pool_is_warned_of(rows, warns, tmp_path, caplog):
    (tmp_path / "train_results.json").write_text(json.dumps(METRICS))
    find_reference(fake_trainer(reference_report=str(tmp_path)), None, rows, 1000)
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
    find_reference(run, pool, len(pool), n_tokens)
    assert seen["pool_tokens"] == n_tokens / 2
    rows = -(-n_tokens // 40) if packing else 32
    assert seen["steps_per_epoch"] == -(-rows // (4 * 2 * 2))
    assert len(seen["batches"]) == 2
    shapes = {tuple(batch["input_ids"].shape) for batch in seen["batches"]}
    assert (shapes == {(4, 40)}) == packing
