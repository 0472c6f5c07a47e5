"""To the Hub and back, with the real client and a local server."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load

from p2d_peft import HeadScores, HeadSet
from p2d_peft.report import P2DReport

from ..hub_server import LocalHub
from ..test_docs import ROOT


# The rest of the process that reads the card without this library: what the card says, and the same answers.
WITHOUT_OUR_LIBRARY = """
import json, sys, torch
sys.modules["p2d_peft"] = None
expected = json.load(open("expected.json"))
lines = [line for line in expected["block"].splitlines() if "p2d_peft" not in line or line.startswith("#")]
lines = [line for line in lines if not line.startswith("model =")]
exec("\\n".join(line.removeprefix("# ") if line.startswith("# model =") else line for line in lines))
with torch.no_grad():
    answer = model.eval()(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits
torch.testing.assert_close(answer, torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)
assert type(next(iter(model.peft_config.values()))).__name__ == "LoraConfig"
"""


def run(hub, folder, *arguments):
    environment = {**os.environ, **hub.environment, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_to_the_hub_and_back(tmp_path):
    with LocalHub() as hub:
        run(hub, tmp_path, "-m", "tests.trainer.hub_worker", str(tmp_path))
        run(hub, tmp_path, "-c", WITHOUT_OUR_LIBRARY)
        assert set(hub.unknown) <= {"GET /api/agent-harnesses"}
        print({k: [c.message for c in r.commits] for k, r in hub.repos.items()})
        print(sorted(hub.files("user/adapter")))
        print(hub.files("user/adapter")["README.md"].decode())
