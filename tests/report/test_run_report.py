import dataclasses
import json

import pytest

from p2d_peft.report import P2DReport
from p2d_peft.report.data_records import Group, Histogram, Sample, SamplesRecord, SelectionRecord

from ..test_docs import ROOT


def report(**changes):
    values = {
        "stage_seconds": {"localize": 1.0, "train": 2.0},
        "stage_tokens": {"localize": 100, "train": 270},
        "stage_peak_memory": {"localize": 10**9, "train": 2 * 10**9},
        "peak_memory_kind": "accelerator",
        "device": "cuda",
        "processes": 2,
        "epochs": 3.0,
        "reference_seconds": 30.0,
        "reference_source": "estimated",
        "reference_relative_error": 0.05,
        "aer": 0.1,
        "speedup": 10.0,
        "model": "org/name",
        "seed": 42,
        "n_heads": 12,
        "layer_heads": {"0": 4, "1": 4, "2": 4},
        "heads": {"0": [1]},
        "localize_method": "proxy",
        "pool_rows": 100,
        "pool_tokens": 1000,
        "selected_rows": 10,
        "selected_tokens": 90,
        "scorer": "affinity",
        "scoring_heads": {"0": [2]},
        "trainable_parameters": 10,
        "total_parameters": 1000,
        "arguments": {"learning_rate": 0.001, "bf16": True, "optim": "adamw"},
    }
    return P2DReport(**{**values, **changes})


def test_round_trip(tmp_path):
    report().save(tmp_path / "p2d_report.json")
    assert P2DReport.load(tmp_path / "p2d_report.json") == report()
    data = json.loads((tmp_path / "p2d_report.json").read_text())
    assert data["schema"] == 4 and set(data["versions"]) >= {"p2d_peft", "python", "torch", "peft", "trl"}
    assert {field.name for field in dataclasses.fields(P2DReport)} == set(data) - {"format", "schema"}


def test_the_docs_have_every_field():
    text = (ROOT / "docs" / "reading-the-report.md").read_text(encoding="utf-8")
    for record in (P2DReport, SelectionRecord, Histogram, SamplesRecord, Group, Sample):
        for field in dataclasses.fields(record):
            assert f"`{field.name}`" in text, field.name
    assert f"The schema is {P2DReport.schema}." in text


def test_a_report_without_a_reference_round_trips(tmp_path):
    without = report(
        reference_seconds=None, reference_source=None, reference_relative_error=None, aer=None, speedup=None
    )
    without.save(tmp_path / "r.json")
    assert P2DReport.load(tmp_path / "r.json") == without


def test_a_report_of_schema_1_lacks_tokens_and_memory(tmp_path):
    report().save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    new = ("stage_tokens", "stage_peak_memory", "peak_memory_kind", "device", "processes", "layer_heads", "arguments")
    new += ("scoring_heads",)
    (tmp_path / "r.json").write_text(json.dumps({**{k: v for k, v in data.items() if k not in new}, "schema": 1}))
    lacking = {"stage_tokens": {}, "stage_peak_memory": {}, "arguments": {}}
    assert P2DReport.load(tmp_path / "r.json") == report(**{**dict.fromkeys(new), **lacking})


def test_a_report_of_schema_2_lacks_arguments(tmp_path):
    report().save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    del data["layer_heads"], data["arguments"], data["scoring_heads"]
    (tmp_path / "r.json").write_text(json.dumps({**data, "schema": 2}))
    assert P2DReport.load(tmp_path / "r.json") == report(layer_heads=None, arguments={}, scoring_heads=None)


def test_a_report_of_schema_3_lacks_the_heads_that_scored(tmp_path):
    report().save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    del data["scoring_heads"]
    (tmp_path / "r.json").write_text(json.dumps({**data, "schema": 3}))
    assert P2DReport.load(tmp_path / "r.json") == report(scoring_heads=None)


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_what_is_no_report_is_refused(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=r"r\.json' is not a P2D report"):
        P2DReport.load(tmp_path / "r.json")


def test_a_schema_to_come_is_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"format": "p2d_peft.P2DReport", "schema": 99}')
    with pytest.raises(ValueError, match="of schema 99, but this version of p2d_peft reads 1 to 4"):
        P2DReport.load(tmp_path / "r.json")


def test_a_value_of_another_type_is_named(tmp_path):
    report().save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    for changes, message in (
        ({"seed": "x"}, "'seed' must be int"),
        ({"heads": {"0": "1"}}, r"'heads\['0'\]' must be"),
    ):
        (tmp_path / "r.json").write_text(json.dumps({**data, **changes}))
        with pytest.raises(ValueError, match=rf"r\.json' is damaged: {message}"):
            P2DReport.load(tmp_path / "r.json")
