"""Disks that are full, and folders that cannot be written to."""

import errno
import resource
import signal
from contextlib import contextmanager

import numpy as np
import pytest
from peft import get_peft_model
from transformers import TrainerCallback, TrainerState

from p2d_peft import HeadSparseConfig
from p2d_peft.dataset_files import write_dataset
from p2d_peft.selection import engine
from p2d_peft.selection.progress import quiet_datasets
from p2d_peft.tuners.head_sparse import save_as_lora

from ..report.test_run_report import report
from ..tiny_data import prompt_completion
from ..tiny_models import tiny_model
from ..trainer.test_p2d_trainer import trainer
from .inputs import HEADS, scores, select
from .refusal import contents, no_forward_pass


@contextmanager
def full_disk(left: int = 64):
    """
    Context in which no file may grow beyond `left` bytes: a write fails in the middle, for root, too. Bars are off, as the
    tests' output is a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        with quiet_datasets():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def adapted():
    return get_peft_model(tiny_model(), HeadSparseConfig(heads=HEADS, init_weights=False))


WRITERS = {
    "heads.json": HEADS.save,
    "scores.json": lambda path: scores().save(path),
    "report.json": lambda path: report().save(path),
    "rows.jsonl": lambda path: write_dataset(prompt_completion(500), path),
    "rows.csv": lambda path: write_dataset(prompt_completion(500), path),
    "rows.parquet": lambda path: write_dataset(prompt_completion(500), path),
    "rows": lambda path: write_dataset(prompt_completion(500), path),
    "lora": lambda path: save_as_lora(adapted(), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing_and_is_named(name, tmp_path):
    (tmp_path / "before.json").write_text("precious")
    with full_disk(), pytest.raises(OSError, match=rf"{name}.*' could not be written: .*make room") as raised:
        WRITERS[name](tmp_path / name)
    assert raised.value.errno in (errno.EFBIG, None)
    left = {path for path, content in contents(tmp_path).items() if content is not None}
    assert left == {"before.json"}


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "heads.json"
    HEADS.save(path)
    before = contents(tmp_path)
    with full_disk(8), pytest.raises(OSError, match=r"heads\.json' could not be written: File too large"):
        scores().save(path)
    assert contents(tmp_path) == before


def test_scores_before_the_disk_was_full_are_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engine, "SHARD_ROWS", 8)
    save, saved = engine.ShardStore.save, []

    def save_one(store, shard, scored):
        if saved:
            with full_disk():
                save(store, shard, scored)
        save(store, shard, scored)
        saved.append(shard.index)

    with monkeypatch.context() as patch:
        patch.setattr(engine.ShardStore, "save", save_one)
        with pytest.raises(OSError, match=r"shard-000001\.arrow' could not be written: .*make room"):
            select(scorer="perplexity", cache_dir=tmp_path)
    assert f"The scores of 8 rows are kept in '{tmp_path}'" in caplog.text
    assert len(select(scorer="perplexity", cache_dir=tmp_path)) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_trained_model_outlives_a_report_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    run = trainer(tmp_path / "out", changes={"max_steps": 1, "reference_steps": 0, "scorer": "random"}, heads=HEADS)
    save = type(run)._save_report

    def save_on_full_disk(trainer, report):
        with full_disk():
            save(trainer, report)

    monkeypatch.setattr(type(run), "_save_report", save_on_full_disk)
    run.train()
    assert run.report is not None and not (tmp_path / "out" / "p2d_report.json").exists()
    assert "The report is in `trainer.report` alone" in caplog.text and "p2d_report.json" in caplog.text
    run.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to_is_told_of_before_anything_is_loaded(number, tmp_path, monkeypatch):
    # root may write where permissions say no, so the system's answer is put in
    def refuse(*args, **kwargs):
        raise OSError(number, "no")

    monkeypatch.setattr("p2d_peft.files.tempfile.TemporaryFile", refuse)
    with no_forward_pass(), pytest.raises(OSError, match=r"out/p2d_report\.json' could not be written") as raised:
        trainer(tmp_path / "out", model="no/such-model")
    assert raised.value.errno == number and not (tmp_path / "out").exists()


class LogsNumpy(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        state.log_history[-1]["mine"] = np.float32(1.5)


@pytest.mark.parametrize("p2d", [True, False])
@pytest.mark.parametrize("why", ["a number that is not JSON's", "a folder in its place", "a full disk"])
def test_a_trained_model_outlives_a_log_that_cannot_be_written(why, p2d, tmp_path, caplog, monkeypatch):
    changes = {"max_steps": 1, "reference_steps": 0, "scorer": "random", "p2d": p2d}
    callbacks = [LogsNumpy()] if "number" in why else []
    run = trainer(tmp_path, changes=changes, heads=HEADS if p2d else None, callbacks=callbacks)
    path, save = tmp_path / "trainer_state.json", TrainerState.save_to_json

    def save_on_full_disk(state, path):
        with full_disk():
            save(state, path)

    if "folder" in why:
        path.mkdir()
    elif "disk" in why:
        monkeypatch.setattr(TrainerState, "save_to_json", save_on_full_disk)
    assert run.train().training_loss > 0
    assert "The training's log is in `trainer.state` alone: " in caplog.text
    assert not path.is_file() and not list(tmp_path.glob("*.tmp"))
