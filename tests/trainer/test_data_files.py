import json

import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from transformers import TrainerCallback

from p2d_peft import P2DDataSelector
from p2d_peft.report.data_records import SamplesRecord, SelectionRecord
from p2d_peft.report.run_folder import Run
from p2d_peft.selection.policies import Quotas
from p2d_peft.trainer.data_files import LONGEST_TEXT, samples_record, selection_record

from ..tiny_data import prompt_completion, rows
from ..tiny_models import tiny_model, tiny_tokenizer
from .test_model_card import trainer


def chosen(scores, kept, n_tokens=None, policies=()):
    """A selector that has selected, without a model to run."""
    selector = P2DDataSelector(tiny_model(), tiny_tokenizer(), scorer="random", policies=policies)
    selector.scores = torch.tensor(scores, dtype=torch.float64)
    selector.n_tokens = torch.tensor(n_tokens or [5] * len(scores))
    selector.rows = kept
    return selector


def pool_of(n, **columns):
    return Dataset.from_dict({"input_ids": [[7 + row % 60] * 4 for row in range(n)], **columns})


def test_a_selection_in_numbers():
    nan = float("nan")
    record = selection_record(
        chosen([0.1, 0.9, nan, 0.5, 0.8], [1, 3], [3, 9, 0, 50, 9], [Quotas("task", {"a": 1.0})])
    )
    assert (record.pool_rows, record.kept_rows, record.unscored_rows) == (5, 2, 1)
    assert (record.cut, record.passed_over, record.policies) == (0.5, 1, ["Quotas"])
    for histogram, low, high in ((record.scores, 0.1, 0.9), (record.lengths, 3, 50)):
        assert histogram.edges[0] == pytest.approx(low) and histogram.edges[-1] >= high
        assert (sum(histogram.kept), sum(histogram.left_out)) == (2, 2)
    assert all(edge == int(edge) for edge in record.lengths.edges)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [3.0, 3.0], [1e-12, 2e-12], [1.0, 1.0 + 2**-52], [-1e9, -1e9]])
def test_scores_that_hardly_differ_have_a_histogram(scores):
    histogram = selection_record(chosen(scores, [1])).scores
    assert (sum(histogram.kept), sum(histogram.left_out)) == (1, 1)


def test_samples_are_the_best_and_the_worst_once_each():
    selector = chosen([0.3, 0.1, float("nan"), 0.2, 0.9], [0, 4])
    record = samples_record(selector, pool_of(5), tiny_tokenizer(), 10)
    assert [sample.row for sample in record.best] == [4, 0] and [sample.row for sample in record.worst] == [1, 3]
    assert [sample.kept for sample in record.best + record.worst] == [True, True, False, False]
    assert samples_record(selector, pool_of(5), tiny_tokenizer(), 1).best == record.best[:1]
    none = samples_record(selector, pool_of(5), tiny_tokenizer(), 0)
    assert none.best == none.worst == []


def test_long_texts_are_shortened():
    pool = Dataset.from_dict({"input_ids": [[7], [8] * (3 * LONGEST_TEXT)]})
    best, worst = (
        samples[0]
        for samples in vars(samples_record(chosen([0.0, 1.0], [1]), pool, tiny_tokenizer(), 1)).values()
        if isinstance(samples, list)
    )
    assert best.shortened and 0 < len(best.text) <= LONGEST_TEXT and not worst.shortened


def test_columns_with_a_few_values_are_counted():
    pool = pool_of(
        30,
        source=["web", "books", "web"] * 10,
        label=[0, 1] * 15,
        good=[True, None] * 15,
        text=[f"row {row}" for row in range(30)],
        same=["x"] * 30,
        number=[1, 2, 3] * 10,
    ).cast_column("label", ClassLabel(names=["no", "yes"]))
    record = samples_record(chosen([float(row) for row in range(30)], list(range(15, 30))), pool, tiny_tokenizer(), 1)
    assert {
        name: [(group.value, group.pool_rows, group.kept_rows) for group in groups]
        for name, groups in record.columns.items()
    } == {
        "source": [("web", 20, 10), ("books", 10, 5)],
        "label": [("no", 15, 7), ("yes", 15, 8)],
        "good": [("True", 15, 7), ("None", 15, 8)],
    }


def test_a_label_that_is_missing_is_counted_as_it_stands_there():
    pool = pool_of(8, label=[0, 1, -1, None] * 2).cast_column("label", ClassLabel(names=["no", "yes"]))
    record = samples_record(chosen([float(row) for row in range(8)], [0, 2]), pool, tiny_tokenizer(), 1)
    found = {group.value: (group.pool_rows, group.kept_rows) for group in record.columns["label"]}
    assert found == {"no": (2, 1), "yes": (2, 0), "-1": (2, 1), "None": (2, 0)}


def test_a_column_with_quotas_is_counted_whatever_it_holds():
    pool = pool_of(60, number=[0] * 20 + list(range(1, 41)))
    selector = chosen([float(row) for row in range(60)], list(range(10)), policies=[Quotas("number", {0: 0.5})])
    groups = samples_record(selector, pool, tiny_tokenizer(), 1).columns["number"]
    assert (groups[0].value, groups[0].pool_rows, groups[0].kept_rows) == ("0", 20, 10)
    assert len(groups) == 21 and groups[-1].value is None and sum(group.pool_rows for group in groups) == 60


def test_a_run_leaves_all_that_its_page_needs(tmp_path):
    run = trainer(tmp_path, changes={"localize_method": "taylor", "scorer": "length", "report_samples": 3})
    run.train()
    read = Run.read(tmp_path)
    assert read.report == run.report and read.heads == run.heads
    assert torch.equal(read.scores.values, run.head_scores.values)
    assert read.selection.kept_rows == 16 and read.selection.cut == float(run.selector.scores[run.selector.rows].min())
    assert len(read.samples.best) == len(read.samples.worst) == 3
    best = rows(32)[read.samples.best[0].row]
    assert best["prompt"] in read.samples.best[0].text and best["completion"] in read.samples.best[0].text
    assert {group.value for group in read.samples.columns["task"]} == {"copy", "count"}
    assert read.curves[0].title == "Loss" and read.report.layer_heads == {"0": 4, "1": 4, "2": 4}
    arguments = read.report.arguments
    assert (arguments["learning_rate"], arguments["max_steps"], arguments["scorer"]) == (1e-2, 1, "length")
    assert not {"output_dir", "report_to", "hub_token", "report_samples"} & set(arguments)


def test_no_text_where_none_is_wanted_and_none_of_an_earlier_run(tmp_path):
    trainer(tmp_path, changes={"scorer": "length"}).train()
    assert SamplesRecord.load(tmp_path / "_p2d_samples.json").best
    trainer(tmp_path, changes={"scorer": "length", "report_samples": 0}).train()
    # "copy" and "count" are the values of a column
    quoted = ['"copy"', '"count"', *(row["prompt"] for row in rows(32))]
    files = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    assert {"p2d_selection.json", "p2d_report.json", "trainer_state.json"} <= set(files)
    assert not [name for name, words in files.items() if any(quote in words for quote in quoted)]
    assert "_p2d_samples.json" not in files
    trainer(tmp_path, changes={"data_ratio": 1.0}).train()
    assert not list(tmp_path.glob("*p2d_s[ea]*.json"))


def test_a_stream_is_not_read_again_for_samples(tmp_path):
    reads = []

    def stream():
        reads.append(0)
        yield from rows(32)

    pool = IterableDataset.from_generator(stream)
    run = trainer(tmp_path, changes={"scorer": "length"})
    run = type(run)(
        tiny_model(),
        run.args,
        train_dataset=pool,
        target_dataset=prompt_completion(6, seed=1),
        processing_class=tiny_tokenizer(),
    )
    run.train()
    assert SelectionRecord.load(tmp_path / "p2d_selection.json").pool_rows == 32
    assert not (tmp_path / "_p2d_samples.json").exists()


def test_a_secret_is_no_argument_of_the_report(tmp_path):
    run = trainer(tmp_path, changes={"hub_token": "hf_secret", "hub_model_id": "me/x", "run_name": "mine"})
    run.train()
    words = (tmp_path / "p2d_report.json").read_text()
    assert "hf_secret" not in words and "me/x" not in words and "mine" not in words and str(tmp_path) not in words
    assert json.loads(words)["arguments"]["max_steps"] == 1


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def interrupt(run):
    run.add_callback(Stops)
    with pytest.raises(KeyboardInterrupt):
        run.train()


def test_files_that_cannot_be_written_end_no_run(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SelectionRecord, "save", full)
    run = trainer(tmp_path)
    run.train()
    assert run.report is not None and "No space left on device" in caplog.text


OF_A_RUN = {"p2d_report.json", "trainer_state.json", "p2d_selection.json", "_p2d_samples.json"}


def left(folder):
    return {path.name for path in folder.iterdir()} & OF_A_RUN


def test_a_run_that_is_interrupted_has_no_report_of_another(tmp_path):
    trainer(tmp_path).train()
    assert left(tmp_path) == OF_A_RUN
    interrupt(trainer(tmp_path, changes={"data_ratio": 0.25}))
    assert left(tmp_path) == {"p2d_selection.json", "_p2d_samples.json"}
    with pytest.raises(ValueError, match="There is no"):
        Run.read(tmp_path)
    trainer(tmp_path).train()
    interrupt(trainer(tmp_path, changes={"p2d": False}))
    assert left(tmp_path) == set()


def test_a_resumed_run_keeps_its_files_until_they_are_replaced(tmp_path):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = trainer(tmp_path, changes=changes)
    first.train()
    resumed = trainer(tmp_path, changes=changes)
    resumed.add_callback(Stops)
    with pytest.raises(KeyboardInterrupt):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert left(tmp_path) == OF_A_RUN and Run.read(tmp_path).report == first.report
    assert Run.read(tmp_path).selection is not None


@pytest.mark.parametrize("name", ["p2d_report.json", "trainer_state.json", None])
def test_the_report_of_the_reference_stays(name, tmp_path):
    trainer(tmp_path, changes={"p2d": False}).train()
    given = str(tmp_path if name is None else tmp_path / name)
    interrupt(trainer(tmp_path, changes={"reference_report": given}))
    assert left(tmp_path) == {name or "p2d_report.json", "p2d_selection.json", "_p2d_samples.json"}
    run = trainer(tmp_path, changes={"reference_report": given})
    run.train()
    assert run.report.reference_source == "measured"
