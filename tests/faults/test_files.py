"""Files that were cut off, changed, written for something else, or made to do harm."""

import json
import math
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from p2d_peft import HeadScores, HeadSet, HeadSparseConfig
from p2d_peft.efficiency import StageCosts
from p2d_peft.report import P2DReport
from p2d_peft.report.text import report_text
from p2d_peft.trainer.measured_run import MeasuredRun
from p2d_peft.trainer.state import P2DState
from p2d_peft.tuners.head_sparse import save_as_lora

from ..report.test_run_report import report
from ..tiny_models import LAYOUTS, tiny_model
from .inputs import HEADS, scores
from .refusal import Case, assert_refused, contents


HEADS_FORMAT = {"format": "p2d_peft.HeadSet"}
SCORES = scores().to_dict()
REPORT = "p2d_report.json"
STATE = "p2d_state.json"
WEIGHTS = "adapter_model.safetensors"


def changed(data, **changes):
    """A copy with other entries; those that are `...` are gone."""
    return {name: value for name, value in {**data, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a JSON file"),
        ('{"format": "p2d_peft.Hea', "it may be cut off"),
        ("[" * 100_000, "is not a JSON file"),
        ("9" * 5000, "is not a JSON file"),
        (json.dumps(SCORES), "expected a mapping with 'format': 'p2d_peft.HeadSet'"),
        (json.dumps({**HEADS_FORMAT}), "'heads'"),
        (json.dumps({**HEADS_FORMAT, "heads": {"0": 3}}), "3 for '0'"),
        (json.dumps({**HEADS_FORMAT, "heads": {"0": "123"}}), "'123' for '0'"),
        (json.dumps({**HEADS_FORMAT, "heads": {"0": [True]}}), "(0, True)"),
        (json.dumps({**HEADS_FORMAT, "heads": {"0": [1, 1]}}), "(0, 1) more than once"),
        (json.dumps({**HEADS_FORMAT, "heads": {"-1": [0]}}), "('-1', 0)"),
        (json.dumps({**HEADS_FORMAT, "heads": {"00": [0]}}), "('00', 0)"),
        (json.dumps({**HEADS_FORMAT, "heads": {"9" * 5000: [0]}}), "pairs of integers"),
        (json.dumps({**HEADS_FORMAT, "heads": {"../../x.0": [0]}}), "('../../x.0', 0)"),
        (json.dumps({**HEADS_FORMAT, "heads": {"\x1b[2J": [0]}}), r"\x1b[2J"),
    ],
)
def test_a_heads_file(text, said, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(text)
    assert_refused(Case("", lambda: HeadSet.load(path), ValueError, (str(path), said)), tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (changed(SCORES, values=...), "'values' must be a list of rows, got None"),
        (changed(SCORES, values="abc"), "'values' must be a list of rows, got 'abc'"),
        (changed(SCORES, values=[[1, 2], [3]]), "rows of one length, got [1, 2]"),
        (changed(SCORES, values=[["a"]]), "numbers and None, got 'a'"),
        (changed(SCORES, method=...), "'method' is missing"),
        (changed(SCORES, method=7), "'method' must be str, got 7"),
        (changed(SCORES, seed=True), "'seed' must be int | None, got True"),
        (changed(SCORES, layers=3), "'layers'"),
        (changed(SCORES, layers=[[0], [1], [2]]), "`layers` must hold numbers counted from 0"),
        (changed(SCORES, layers=["a", "b", "c"]), "strings like 'encoder.0'"),
        (changed(SCORES, layers=[0, 0, 1]), "each of the 3 rows of `values` once"),
        (changed(SCORES, n_kv_heads=[0, 0, 0]), "have [4, 4, 4] heads, got (0, 0, 0)"),
        (changed(SCORES, n_kv_heads=[-2, 2, 2]), "got (-2, 2, 2)"),
        (HEADS.to_dict(), "expected a mapping with 'format': 'p2d_peft.HeadScores'"),
        ([1], "expected a mapping"),
    ],
)
def test_a_file_of_scores(data, said, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    assert_refused(Case("", lambda: HeadScores.load(path), ValueError, (str(path), "holds no head scores", said)))


def test_an_entry_of_a_later_version_is_passed_over():
    assert torch.equal(HeadScores.from_dict({**SCORES, "later": 1}).values, scores().values)


@pytest.fixture(scope="module")
def of_report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / REPORT
    report().save(path)
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": ...}, ("seed", "is missing")),
        ({"stage_seconds": "<script>alert(1)</script>"}, ("stage_seconds", "dict[str, float]", "'<script>")),
        ({"stage_seconds": {"train": "1"}}, ("stage_seconds", "'1'")),
        ({"aer": "0.1"}, ("aer", "float", "'0.1'")),
        ({"aer": math.nan}, ("aer", "float", "nan")),
        ({"model": ["<img src=x onerror=alert(1)>"]}, ("model", "str", "<img")),
        ({"heads": {"0": ["<b>"]}}, ("heads", "int", "'<b>'")),
        ({"trainable_parameters": True}, ("trainable_parameters", "int", "True")),
        ({"versions": None}, ("versions", "dict[str, str]", "None")),
        ({"schema": 99}, ("schema 99, but this version of p2d_peft reads 1 to",)),
        ({"schema": "\x1b[31m"}, (r"schema '\x1b[31m'",)),
        ({"format": "other"}, ("is not a P2D report",)),
    ],
)
def test_a_report(of_report, changes, said, tmp_path):
    path = tmp_path / REPORT
    path.write_text(json.dumps(changed(of_report, **changes)))
    assert_refused(Case("", lambda: P2DReport.load(path), ValueError, (str(path), *said)))
    assert_refused(Case("", lambda: MeasuredRun.read(path), ValueError, (str(path),)))


def test_a_report_cannot_command_a_terminal(of_report, tmp_path):
    path = tmp_path / REPORT
    evil = "\x1b]0;owned\x07\x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}x\nseed  0"
    data = changed(of_report, model=evil, versions={evil: evil}, stage_seconds={evil: 1.0})
    path.write_text(json.dumps(data))
    printed = report_text(P2DReport.load(path))
    assert all(line.isprintable() for line in printed.splitlines())
    assert sum(line.startswith("seed ") for line in printed.splitlines()) == 1


@pytest.fixture(scope="module")
def of_state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    state = P2DState(HEADS, "proxy", "affinity", [1, 4], [0.5, 0.25], pool_rows=8, pool_tokens=80, selected_tokens=20)
    state.save(folder, StageCosts({"localize": 1.0}))
    return json.loads((folder / STATE).read_text())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": ...}, "'heads' is missing"),
        ({"heads": {"0": [1]}}, "is not a head set"),
        ({"rows": ...}, "'rows' is missing"),  # all rows would be trained on
        ({"rows": "14"}, "'rows' must be list[int], got '14'"),
        ({"rows": [4, 1]}, "'rows' must be ascending numbers of the pool's 8 rows"),
        ({"rows": [-1, 4]}, "'rows' must be ascending numbers"),
        ({"rows": [1, 8]}, "'rows' must be ascending numbers"),
        ({"reference": {"x": 1}}, "'seconds_per_epoch' is missing"),
        ({"reference": {"seconds_per_epoch": 1.0, "source": "guessed"}}, "'source' must be Literal["),
        ({"stage_seconds": {"localize": "1"}}, "'seconds['localize']' must be float, got '1'"),
    ],
)
def test_the_state_in_a_checkpoint(of_state, changes, said, tmp_path):
    (tmp_path / STATE).write_text(json.dumps(of_state))
    P2DState.load(tmp_path)
    (tmp_path / STATE).write_text(json.dumps(changed(of_state, **changes)))
    said = (str(tmp_path / STATE), said, "Resume from another checkpoint")
    assert_refused(Case("", lambda: P2DState.load(tmp_path), ValueError, said), tmp_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = HeadSparseConfig(heads=HEADS, task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(tiny_model(), config).save_pretrained(folder)
    return folder


def cut_off(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def other_heads(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "heads": {"0": [1]}}))


def no_heads(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "heads": {}}))


def more_weights(folder):
    key = "base_model.model.model.layers.0.mlp.up_proj.head_sparse_delta.weight"
    save_file({**load_file(folder / WEIGHTS), key: torch.ones(2)}, folder / WEIGHTS)


OF_ANOTHER = ("`state_dict` has a delta for", "belongs to another model, or its configuration was changed")


@pytest.mark.parametrize(
    ("damage", "base", "error", "said"),
    [
        (cut_off, tiny_model, SafetensorError, ("not fully covered",)),  # PEFT reads it
        (other_heads, tiny_model, ValueError, ("'model.layers.1.self_attn.", *OF_ANOTHER)),
        (more_weights, tiny_model, ValueError, ("'model.layers.0.mlp.up_proj'", *OF_ANOTHER)),
        (no_heads, tiny_model, ValueError, ("`heads` is empty",)),
        (None, lambda: tiny_model(num_hidden_layers=1), ValueError, ("(1, 0)", "layers: 0 to 0")),
        (None, LAYOUTS["gpt2"].model, ValueError, ("'model.layers.", *OF_ANOTHER)),
        (None, lambda: tiny_model(hidden_size=96), RuntimeError, ("size mismatch", "q_proj.head_sparse_delta")),
    ],
    ids=["cut off", "other heads", "more weights", "no heads", "fewer layers", "GPT-2", "wider"],
)
def test_an_adapter(adapter, damage, base, error, said, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    if damage is not None:
        damage(folder)
    assert_refused(Case("", lambda: PeftModel.from_pretrained(base(), str(folder)), error, said), tmp_path)


def test_an_adapter_that_lacks_weights_is_a_warning(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    del weights["base_model.model.model.layers.1.self_attn.q_proj.head_sparse_delta.weight"]
    save_file(weights, tmp_path / "adapter" / WEIGHTS)
    with pytest.warns(UserWarning, match=r"missing adapter keys .*layers\.1\.self_attn\.q_proj\.head_sparse_delta"):
        PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))


def test_an_adapter_that_diverged_is_not_exported(tmp_path):
    model = get_peft_model(tiny_model(), HeadSparseConfig(heads=HEADS))
    before = contents(tmp_path)
    delta = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    delta.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'default' holds NaN .* in 'model\.layers\.0\..*Take an earlier checkpoint"):
        save_as_lora(model, tmp_path / "lora")
    assert contents(tmp_path) == before
