"""Two ranks, on the CPU with gloo, under DDP, FSDP2 and, where DeepSpeed is installed, ZeRO-2 and ZeRO-3."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from p2d_peft.heads.hub import HEADS_NAME
from p2d_peft.trainer.state import STATE_NAME

from ..tiny_models import tiny_model
from .two_processes import main


def launch(*arguments):
    root = Path(__file__).parent.parent.parent
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + ["-m", "tests.trainer.two_processes", *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ
        | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random", "DS_ACCELERATOR": "cpu"},
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_ranks_hold_what_one_process_holds(how, tmp_path):
    if how.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    run = launch(str(tmp_path / "two"), how)
    assert run.returncode == 0, run.stderr[-5000:]
    # the same number of rows a step
    expected = json.loads(json.dumps(main(str(tmp_path / "one"), 4, is_chosen=how == "zero3")))
    weights = load_file(tmp_path / "one" / "rank0.safetensors")
    for rank in range(2):
        found = json.loads((tmp_path / "two" / f"rank{rank}.json").read_text())
        assert found.pop("processes") == 2 and found == expected
        mine = load_file(tmp_path / "two" / f"rank{rank}.safetensors")
        assert mine.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(mine[name], weight, atol=1e-5, rtol=1e-5)
    # what rank 0 alone wrote: as one process would, but for the LoRA, for which it has to have the whole model
    one, two = ({p.name for p in (tmp_path / run).glob("*") if "rank" not in p.name} for run in ("one", "two"))
    assert two == (one if how == "ddp" else one - {"lora"})
    saved = PeftModel.from_pretrained(tiny_model(), tmp_path / "two").state_dict()
    for name, weight in weights.items():
        assert torch.equal(saved[name], load_file(tmp_path / "two" / "rank0.safetensors")[name]) and weight.any()


@pytest.mark.slow
def test_a_checkpoint_in_shards_is_gone_on_from(tmp_path):
    run = launch(str(tmp_path / "whole"), "fsdp2 in shards")
    assert run.returncode == 0, run.stderr[-5000:]
    first, _ = sorted((tmp_path / "whole").glob("checkpoint-*"))
    assert {STATE_NAME, HEADS_NAME} <= {path.name for path in first.iterdir()}
    run = launch(str(tmp_path / "resumed"), f"fsdp2 in shards, resumed from {first}")
    assert run.returncode == 0, run.stderr[-5000:]
    whole, resumed = (load_file(tmp_path / name / "rank0.safetensors") for name in ("whole", "resumed"))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    saved = PeftModel.from_pretrained(tiny_model(), tmp_path / "resumed").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in whole.items())


@pytest.mark.slow
def test_a_failing_rank_ends_the_others_with_its_message(tmp_path):
    run = launch(str(tmp_path / "failed"), "1 fails")
    assert run.returncode != 0
    assert "no heads on this rank" in run.stderr
    assert not list((tmp_path / "failed").glob("rank*"))
