"""A process that is killed while it chooses heads and rows: what the same run, started again, takes over."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2d_peft.selection import engine
from p2d_peft.trainer import choosing

from ..trainer.test_p2d_trainer import assert_same_weights, deltas, trainer


CHANGES = {"reference_steps": 0, "num_train_epochs": 1, "localize_method": "gate"}

# Each place is where the child stops to be killed.
CHILD = """
import sys, time
from pathlib import Path
from p2d_peft.selection import engine
from p2d_peft.trainer import choosing
from tests.faults.test_killed import CHANGES
from tests.tiny_models import tiny_model
from tests.trainer.test_p2d_trainer import trainer

folder, place = sys.argv[1:]
engine.SHARD_ROWS = 8
passes = []

def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(300)

model = tiny_model()
if place == "localizing":
    # 6 samples of the target are 2 batches
    model.register_forward_pre_hook(lambda *_: wait() if passes else passes.append(1))
elif place == "between":
    choosing.make_selector = wait
else:
    save = engine.ShardStore.save
    engine.ShardStore.save = lambda *args: wait() if passes else passes.append(save(*args))
trainer(Path(folder), model, changes=CHANGES).train()
"""


def kill_while(place, folder):
    root = Path(__file__).parent.parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), place],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert "waiting\n" in iter(child.stdout.readline, ""), child.stderr.read()
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("place", "kept"), [("localizing", 0), ("between", 0), ("selecting", 8)])
def test_the_same_run_ends_as_if_it_had_not_been_killed(place, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SHARD_ROWS", 8)
    kill_while(place, tmp_path / "killed")
    shards = list((tmp_path / "killed").rglob("shard-*.arrow"))
    assert len(shards) == kept / 8

    again, whole = (trainer(tmp_path / name, changes=CHANGES) for name in ("killed", "whole"))
    for run in (again, whole):
        run.train()
        run.save_model()
    assert again.selector.report.n_resumed == kept and whole.selector.report.n_resumed == 0
    assert again.head_scores.values.equal(whole.head_scores.values) and again.heads == whole.heads
    assert again._p2d_state.rows == whole._p2d_state.rows and again._p2d_state.scores == whole._p2d_state.scores
    assert again.train_dataset.to_list() == whole.train_dataset.to_list()
    assert_same_weights(deltas(again.model), deltas(whole.model))

    # what is taken over is charged with what it took; what died with the process is not
    report, select = again.selector.report, "select"
    assert (report.resumed_seconds > 0) == (report.resumed_tokens > 0) == (kept > 0)
    assert again.report.stage_seconds[select] > report.resumed_seconds
    # the sample that `affinity` reads first, here the whole pool, is read again
    expected = whole.report.stage_tokens
    assert again.report.stage_tokens == {**expected, select: expected[select] + report.resumed_tokens}

    left = ({path.name for path in (tmp_path / name).iterdir()} for name in ("killed", "whole"))
    assert next(left) == next(left) and not (tmp_path / "killed" / choosing.SCORES_FOLDER).exists()
