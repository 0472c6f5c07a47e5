"""Ctrl-C: it ends what it ends, and what is kept and how to go on is said."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from transformers import TrainerCallback

from p2d_peft import localize_heads
from p2d_peft.cli import main
from p2d_peft.commands.sft import make_parser
from p2d_peft.selection import engine
from p2d_peft.trainer.deferred_adapter import BackwardEndsAtLowestHead

from ..model_checks import assert_unchanged, snapshot
from ..tiny_data import prompt_completion
from ..tiny_models import random_batch, tiny_model, tiny_tokenizer
from ..trainer.test_p2d_trainer import trainer
from .inputs import HEADS, select


def interrupted_after(n_passes):
    """A hook for modules that is Ctrl-C in the pass after `n_passes`."""
    passes = iter(range(n_passes))

    def hook(module, inputs):
        if next(passes, None) is None:
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize("method", ["proxy", "gate"])
def test_localizing(method, caplog):
    model = tiny_model()
    before = snapshot(model)
    hook = model.register_forward_pre_hook(interrupted_after(2))
    with pytest.raises(KeyboardInterrupt):
        localize_heads(model, [random_batch(seed=seed) for seed in range(4)], method)
    hook.remove()
    assert_unchanged(model, before)
    assert "Localizing stopped after 6 samples. Nothing of it is kept, and the model is as it was" in caplog.text


def test_selecting_with_and_without_a_cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engine, "SHARD_ROWS", 8)
    for cache_dir, said in (
        (None, "No scores are kept, and the model is as it was. With a `cache_dir` scores are kept for every 8 rows."),
        (tmp_path, f"The scores of 8 rows are kept in '{tmp_path}': the same run, started again, goes on from there."),
    ):
        caplog.clear()
        model = tiny_model()
        hook = model.register_forward_pre_hook(interrupted_after(1))
        with pytest.raises(KeyboardInterrupt):
            select(given=model, scorer="perplexity", cache_dir=cache_dir)
        hook.remove()
        assert said in caplog.text
    assert torch.equal(
        torch.tensor(select(scorer="perplexity", cache_dir=tmp_path)["p2d_score"][:]),
        torch.tensor(select(scorer="perplexity")["p2d_score"][:]),
    )


QUICK = {"reference_steps": 0, "num_train_epochs": 1, "localize_method": "gate"}


@pytest.mark.parametrize(
    ("n_passes", "changes", "said"),
    [
        (1, {}, "Interrupted while localizing. The model is as it was."),
        # 6 samples of the target in 2 batches, then the target and the pool
        (
            5,
            {},
            "Interrupted while selecting. The model is as it was. The scores of all heads are in `trainer.head_scores`",
        ),
        (
            10,
            {},
            "Interrupted while training, before the first checkpoint (see `save_steps`): no weights are kept; the scores",
        ),
        (
            10,
            {"save_strategy": "steps", "save_steps": 1},
            "checkpoint-3' is kept, with the chosen heads and rows: go on from there with `train(resume_from_checkpoint='",
        ),
    ],
    ids=["localizing", "selecting", "training", "training with checkpoints"],
)
def test_a_script_is_told_and_ends(n_passes, changes, said, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engine, "SHARD_ROWS", 8)
    model = tiny_model()
    model.register_forward_pre_hook(interrupted_after(n_passes))
    run = trainer(tmp_path, model, changes={**QUICK, **changes})
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert said in caplog.text


def checkpoint_on_the_command_line(said):
    """Which one the parser of `p2d sft` gets."""
    flags = shlex.split(re.search(r"on the command line with `(.*)`\.", said)[1])
    return make_parser().parse_args_and_config([*flags, "--use_cpu", "--output_dir", "x"])[1].resume_from_checkpoint


def test_the_checkpoint_is_that_of_the_run_itself(tmp_path, caplog):
    folder = tmp_path / "with a space"
    saving = {**QUICK, "save_strategy": "steps", "save_steps": 1}
    trainer(folder, changes=saving).train()  # leaves checkpoint-4

    def interrupted(step, changes, resume=None):
        class Interrupts(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    raise KeyboardInterrupt

        caplog.clear()
        run = trainer(folder, changes=changes, callbacks=[Interrupts()])
        before = list(run.callback_handler.callbacks)
        with pytest.raises(KeyboardInterrupt):
            run.train(resume_from_checkpoint=resume)
        assert [type(callback) for callback in run.callback_handler.callbacks if callback not in before] == [
            BackwardEndsAtLowestHead
        ]
        return caplog.text

    assert "before the first checkpoint" in interrupted(2, {**QUICK, "seed": 1})
    said = interrupted(2, {**saving, "seed": 1})
    assert checkpoint_on_the_command_line(said) == str(folder / "checkpoint-2")
    assert f"resume_from_checkpoint={str(folder / 'checkpoint-2')!r}" in said
    for resume, step in ((folder / "checkpoint-3", 3), (True, 4)):
        said = interrupted(step, {**QUICK, "num_train_epochs": 2}, resume)
        assert checkpoint_on_the_command_line(said) == str(folder / f"checkpoint-{step}")


def test_a_checkpoint_of_an_interrupted_run_goes_on(tmp_path):
    changes = {**QUICK, "save_strategy": "steps", "save_steps": 1}
    model = tiny_model()
    model.register_forward_pre_hook(interrupted_after(10))
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, model, changes=changes).train()
    resumed = trainer(tmp_path, changes=changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and not (tmp_path / "_p2d_scores").exists()


CHILD = """
import signal, sys, time
from p2d_peft import cli
from p2d_peft.selection import engine

engine.SHARD_ROWS = 8
save, saved = engine.ShardStore.save, []

def save_one_and_wait(*args):
    if saved:
        print("waiting", flush=True)
        time.sleep(60)
    save(*args)
    saved.append(1)

engine.ShardStore.save = save_one_and_wait
# what a shell starts in the background ignores the signal
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_signal_in_a_process_of_its_own(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prompt_completion().to_json(tmp_path / "pool.jsonl")
    HEADS.save(tmp_path / "heads.json")
    command = ["select", "--model", "model", "--dtype", "float32", "--pool", "pool.jsonl", "--target", "pool.jsonl"]
    command += ["--heads", "heads.json", "--cache-dir", "cache", "--output", "out.jsonl", "--device", "cpu"]
    paths = os.pathsep.join(sys.path)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "waiting\n", child.stderr.read()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    lines = errors.splitlines()
    assert child.returncode == 130 and "Traceback" not in errors
    assert lines[-1] == "p2d select: interrupted"
    assert "Scoring stopped. The scores of 8 rows are kept in 'cache'" in lines[-2]
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob(".out*"))


def test_the_exit_code_is_130(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("p2d_peft.commands.select.check_new_dataset", interrupt)
    command = ["select", "--model", "m", "--pool", "p", "--output", "o"]
    assert main(command) == 130
    assert capsys.readouterr().err == "p2d select: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        main(["--debug", *command])
