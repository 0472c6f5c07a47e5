"""To the Hub and back, with the real client and a local server."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from p2d_peft import HeadSet
from p2d_peft.report import P2DReport

from ..hub_server import LocalHub
from ..test_docs import ROOT


# A process that follows the card without this library, and compares the answers.
WITHOUT_OUR_LIBRARY = """
import json, sys, torch
sys.modules["p2d_peft"] = None
expected = json.load(open("expected.json"))
lines = [line for line in expected["block"].splitlines() if not line.startswith(("import p2d_peft", "model ="))]
exec("\\n".join(line.removeprefix("# ") if line.startswith("# model =") else line for line in lines))
with torch.no_grad():
    logits = model.eval()(input_ids=torch.tensor(expected["ids"])).logits
torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)
assert type(model.peft_config["default"]).__name__ == "LoraConfig"
"""


def run(hub, folder, *arguments):
    environment = {**os.environ, **hub.environment, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def messages(hub, repo_id):
    return [commit.message for commit in hub.repo(repo_id).commits[1:]]


@pytest.mark.slow
def test_to_the_hub_and_back(tmp_path):
    with LocalHub() as hub:
        run(hub, tmp_path, "-m", "tests.trainer.hub_worker")
        run(hub, tmp_path, "-c", WITHOUT_OUR_LIBRARY)
    # a question that the client asks once, which has no bearing on repositories
    assert set(hub.unknown) <= {"GET /api/agent-harnesses"}

    files = hub.files("user/adapter")
    # weights went to LFS storage, and nothing else did but what the Trainer keeps of its state
    large = {path for path, content in files.items() if hashlib.sha256(content).hexdigest() in hub.lfs}
    assert {"adapter_model.safetensors", "lora/adapter_model.safetensors"} <= large
    assert {path.rpartition(".")[2] for path in large} <= {"safetensors", "bin", "pt", "pth"}
    assert set(files) >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
        "p2d_head_scores.json",
        "p2d_heads.json",
        "p2d_heads.png",
        "p2d_report.json",
        "p2d_selection.json",
        "p2d_costs.png",
        "p2d_data.png",
        "p2d_state.json",
        "tokenizer.json",
        "last-checkpoint/p2d_state.json",
        "last-checkpoint/p2d_heads.json",
    }
    assert "last-checkpoint/README.md" not in files  # PEFT's draft, which the Hub may refuse
    assert not any(path.endswith(".tmp") or path.startswith("last-checkpoint/lora") for path in files)
    # what quotes the data stays here, in all repositories and in all of their commits
    local = json.loads((tmp_path / "user-adapter" / "_p2d_samples.json").read_text())
    texts = [sample["text"].encode() for sample in local["best"] + local["worst"]]
    assert len(texts) == 20 and b"copy" in b"".join(texts)
    for repo_id in ("user/adapter", "user/all", "user/end"):
        for commit in hub.repo(repo_id).commits:
            assert not any("samples" in path for path in commit.files)
            assert not any(text in content for text in texts for content in commit.files.values())
    (tmp_path / "report.json").write_bytes(files["p2d_report.json"])
    report = P2DReport.load(tmp_path / "report.json")
    assert HeadSet.from_layers(report.heads) == HeadSet.from_dict(json.loads(files["p2d_heads.json"]))
    assert f"is {report.aer:.3g}: a speed-up of {report.speedup:.3g}." in files["README.md"].decode()

    steps = ["Training in progress, step 2", "Training in progress, step 4"]
    both = [message for step in steps for message in (step, f"{step}, checkpoint")]
    assert messages(hub, "user/adapter") == [*both, "End of training"]
    assert messages(hub, "user/all") == both
    assert messages(hub, "user/end") == ["Model save"]
    # of a push in the midst of training, the card tells what is known by then
    early = hub.repo("user/all").commits[1].files
    assert {"README.md", "adapter_model.safetensors", "p2d_heads.json", "p2d_heads.png"} <= set(early)
    assert "The training was not finished" in early["README.md"].decode() and "lora" not in early["README.md"].decode()
    assert {"checkpoint-2/p2d_state.json", "checkpoint-4/p2d_state.json"} <= set(hub.files("user/all"))

    assert hub.repo("user/heads").private and not hub.repo("user/adapter").private
    assert messages(hub, "user/heads")[:2] == ["Upload heads", "Other heads"]
