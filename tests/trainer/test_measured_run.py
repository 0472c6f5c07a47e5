import dataclasses
import json

import pytest
import transformers

from p2d_peft.report import P2DReport
from p2d_peft.trainer.measured_run import MeasuredRun

from ..tiny_models import tiny_model


FULL = P2DReport(
    stage_seconds={"train": 30.0},
    stage_tokens={"train": 300},
    stage_peak_memory={"train": 10},
    peak_memory_kind="process",
    device="cpu",
    processes=2,
    epochs=2.0,
    reference_seconds=None,
    reference_source=None,
    reference_relative_error=None,
    aer=None,
    speedup=None,
    model="org/name",
    seed=0,
    n_heads=None,
    layer_heads=None,
    heads=None,
    localize_method=None,
    pool_rows=100,
    pool_tokens=1000,
    selected_rows=100,
    selected_tokens=1000,
    scorer=None,
    scoring_heads=None,
    trainable_parameters=1000,
    total_parameters=1000,
    arguments={},
)
# 100 rows an epoch
METRICS = {"train_runtime": 40.0, "train_samples_per_second": 5.0, "train_steps_per_second": 0.5, "epoch": 2.0}


def written(path, data):
    path.write_text(json.dumps(data))
    return path


def test_reads_a_report(tmp_path):
    FULL.save(tmp_path / "p2d_report.json")
    expected = MeasuredRun(tmp_path / "p2d_report.json", 15.0, 100, model="org/name", device="cpu", processes=2)
    assert MeasuredRun.read(tmp_path / "p2d_report.json") == MeasuredRun.read(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "affinity"}, "is of a run of P2D, but the reference is full-parameter"),
        ({"stage_seconds": {"select": 1.0, "train": 1.0}}, "is of a run of P2D.*Run the same script with `p2d=False`"),
        ({"trainable_parameters": 900}, "trained 900 of 1,000 weights.*give its time as `reference_seconds`"),
        ({"stage_seconds": {"train": 0.0}}, r"must hold a positive stage_seconds\['train'\], got 0\.0"),
        ({"epochs": 0.0}, r"must hold a positive epochs, got 0\.0"),
    ],
)
def test_a_report_that_is_no_reference_is_refused(changes, message, tmp_path):
    dataclasses.replace(FULL, **changes).save(tmp_path / "p2d_report.json")
    with pytest.raises(ValueError, match=message):
        MeasuredRun.read(tmp_path)


@pytest.mark.parametrize("name", ["train_results.json", "all_results.json"])
def test_reads_the_metrics_of_a_trainer(name, tmp_path):
    run = MeasuredRun.read(written(tmp_path / name, {"eval_runtime": 9.0, **METRICS}))
    assert (run.seconds_per_epoch, run.pool_rows, run.pool_rows_error) == (20.0, 100.0, pytest.approx(0.010125))
    assert MeasuredRun.read(tmp_path) == run


def test_reads_the_state_of_a_trainer_and_leaves_evaluation_out(tmp_path):
    history = [
        {"loss": 1.0, "epoch": 1.0},
        {"eval_loss": 1.0, "eval_runtime": 3.0, "epoch": 1.0},
        {"eval_b_runtime": 7.0, "epoch": 2.0},
        METRICS,
        {"eval_runtime": 100.0, "epoch": 2.0},  # after the training
    ]
    state = {"epoch": 2.0, "global_step": 20, "log_history": history}
    written(tmp_path / "trainer_state.json", state)
    written(tmp_path / "all_results.json", {**METRICS, "train_runtime": 1.0})
    assert MeasuredRun.read(tmp_path).seconds_per_epoch == (40.0 - 10.0) / 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"log_history": [{"loss": 1.0}], "epoch": 1.0}, "a checkpoint is written before the training ends"),
        ({"log_history": [METRICS], "global_step": 40}, "was resumed: its 40 s are those of about 20 of its 40 steps"),
        ({"log_history": [{"eval_runtime": 50.0}, METRICS]}, "positive train_runtime without evaluation, got -10"),
        ({**METRICS, "train_runtime": "40"}, "must hold a positive train_runtime, got '40'"),
        ({"train_runtime": 40.0}, "must hold a positive epoch, got None"),
        ({**METRICS, "train_p2d_aer": 0.1}, "is of a run of P2D"),
        ({"eval_loss": 1.0}, "holds no training time"),
        ([1], "holds no training time"),
    ],
)
def test_what_tells_no_training_time_is_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MeasuredRun.read(written(tmp_path / "file.json", data))


def test_rounding_does_not_make_a_slow_run_a_resumed_one(tmp_path):
    metrics = {**METRICS, "train_runtime": 10_000.0, "train_steps_per_second": 0.001}  # 14 steps, rounded to 10
    path = written(tmp_path / "trainer_state.json", {"log_history": [metrics], "global_step": 14})
    assert MeasuredRun.read(path).seconds_per_epoch == 5000.0


def test_files_that_are_not_there_or_no_json_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json' does not exist"):
        MeasuredRun.read(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"is a folder without any of p2d_report\.json, trainer_state\.json"):
        MeasuredRun.read(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer_state\.json' is not a JSON file"):
        MeasuredRun.read(tmp_path)


def test_reads_what_transformers_writes(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 12
    trainer = transformers.Trainer(
        tiny_model(),
        transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, report_to="none", save_strategy="no", disable_tqdm=True
        ),
        train_dataset=rows,
    )
    metrics = trainer.train().metrics
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    for name in ("trainer_state.json", "train_results.json", "all_results.json"):
        run = MeasuredRun.read(tmp_path / name)
        assert run.seconds_per_epoch == metrics["train_runtime"] / 2
        assert abs(run.pool_rows - 12) <= run.pool_rows_error + 1e-9
