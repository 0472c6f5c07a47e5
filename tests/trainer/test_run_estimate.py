import dataclasses

import pytest

from p2d_peft.trainer.run_estimate import RunEstimate


ESTIMATE = RunEstimate(
    stage_seconds={"localize": 10.0, "select": 20.0, "train": 30.0},
    train_relative_error=0.04,
    reference_seconds=600.0,
    reference_source="estimated",
    reference_relative_error=0.12,
    stage_peak_memory={"localize": 2**30, "select": 2**29, "train": 3 * 2**30},
    peak_memory_kind="accelerator",
    epochs=3.0,
    pool_rows=100,
    selected_rows=10,
    measured_seconds=5.0,
)


def test_aer():
    assert ESTIMATE.aer == pytest.approx(0.1) and ESTIMATE.speedup == pytest.approx(10)
    without = dataclasses.replace(ESTIMATE, reference_seconds=None)
    assert without.aer is None and without.speedup is None


def test_it_prints_as_a_table():
    assert str(ESTIMATE) == repr(ESTIMATE)
    lines = [line.split() for line in str(ESTIMATE).splitlines()]
    assert ["localize", "10.0", "1.00", "GiB"] in lines
    assert ["train", "30.0", "3.00", "GiB", "+-", "4%"] in lines
    assert ["total", "60.0"] in lines
    assert ["reference", "600.0", "estimated", "+-", "12%"] in lines
    assert lines[-2][:2] == ["AER", "0.100"]
    assert "10 of 100 rows, 3 epochs; memory of the accelerator" in str(ESTIMATE)


def test_it_prints_without_a_reference():
    without = dataclasses.replace(ESTIMATE, reference_seconds=None, reference_source=None)
    assert "reference  none, so there will be no AER" in str(without)
