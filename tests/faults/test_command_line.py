"""Bad inputs on the command line: one line, exit code 2, nothing run and nothing written."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft.cli import main

from ..tiny_data import prompt_completion
from .inputs import HEADS, OF_ANOTHER_MODEL, model, tokenizer, without_attention
from .refusal import assert_command_refused, contents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with good and bad files of each kind."""
    folder = tmp_path_factory.mktemp("command_line")
    for name, network in (("model", model()), ("mamba", without_attention()), ("cut", model())):
        network.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    prompt_completion(8).to_json(folder / "pool.jsonl")
    prompt_completion(4, seed=1).to_json(folder / "target.jsonl")
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.jsonl").write_text("{not json\n")
    (folder / "bad.parquet").write_text("x")
    (folder / "bad.yaml").write_text("a: [1")
    HEADS.save(folder / "heads.json")
    OF_ANOTHER_MODEL.save(folder / "other.json")
    config = HeadSparseConfig(heads=HEADS, task_type="CAUSAL_LM", init_weights=False)
    adapted = get_peft_model(type(model())(model().config), config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")
    for damage in ("cut", "less", "nan", "pickled", "elsewhere"):
        shutil.copytree(folder / "adapter", folder / f"adapter-{damage}")
    weights = folder / "adapter-cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    first = min(tensors)
    save_file({k: v for k, v in tensors.items() if k != first}, folder / "adapter-less" / "adapter_model.safetensors")
    save_file({**tensors, first: tensors[first] * torch.nan}, folder / "adapter-nan" / "adapter_model.safetensors")
    (folder / "adapter-pickled" / "adapter_model.safetensors").rename(folder / "adapter-pickled" / "adapter_model.bin")
    path = folder / "adapter-elsewhere" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "../../nowhere"}))
    return folder


MODEL = ["--model", "model", "--dtype", "float32"]
LOCALIZE = ["heads", *MODEL, "--data", "target.jsonl", "--method", "proxy", "--output", "out.json"]
SELECT = ["select", *MODEL, "--pool", "pool.jsonl", "--target", "target.jsonl", "--output", "out.jsonl"]
SFT = ["sft", "--model_name_or_path", "model", "--dataset_name", "pool.jsonl", "--output_dir", "out", "--use_cpu"]
SFT += ["--bf16", "false", "--report_to", "none"]
LOST = ("out", "heads.json/out", "could not be written: Not a directory", "give a place that can be written to")

COMMANDS = {
    "an option that nobody knows": ([*LOCALIZE, "--colour", "blue"], ("unrecognized arguments: --colour blue",)),
    "no data": (
        ["heads", *MODEL, "--data", "no.jsonl", "--method", "proxy", "--output", "out.json"],
        ("no file 'no.jsonl'",),
    ),
    "empty data": (
        ["heads", *MODEL, "--data", "empty.jsonl", "--method", "proxy", "--output", "out.json"],
        ("'empty.jsonl' is empty",),
    ),
    "bad JSON lines": (
        ["heads", *MODEL, "--data", "bad.jsonl", "--method", "proxy", "--output", "out.json"],
        ("'bad.jsonl' cannot be read", " 0"),  # "in row 0" or, of old versions of datasets, "at position 0"
    ),
    "bad Parquet": (
        ["heads", *MODEL, "--data", "bad.parquet", "--method", "proxy", "--output", "out.json"],
        ("'bad.parquet' cannot be read",),
    ),
    "a ratio of 0": (
        [*LOCALIZE, "--ratio", "0"],
        ("--ratio: must be a number in (0, 1], got '0'", "p2d heads --help"),
    ),
    "a ratio of NaN": ([*LOCALIZE, "--ratio", "nan"], ("--ratio: must be a number in (0, 1], got 'nan'",)),
    "no samples": ([*LOCALIZE, "--samples", "0"], ("--samples: must be an integer of at least 1, got '0'",)),
    "no heads a layer": ([*LOCALIZE, "--per-layer", "0"], ("--per-layer: must be an integer of at least 1, got '0'",)),
    "a batch of 0": ([*LOCALIZE, "--batch-size", "0"], ("--batch-size: must be an integer of at least 1, got '0'",)),
    "a dtype that is not there": ([*LOCALIZE, "--dtype", "float99"], ("--dtype", "'float99'", "bfloat16")),
    "a device that is not there": ([*LOCALIZE, "--device", "warp"], ("--device 'warp' is not there",)),
    "a model that is not there": ([*LOCALIZE, "--model", "nowhere"], ("--model 'nowhere' cannot be loaded",)),
    "a model that was cut off": ([*LOCALIZE, "--model", "cut"], ("--model 'cut' cannot be loaded",)),
    "a model without attention": ([*LOCALIZE, "--model", "mamba"], ("MambaForCausalLM", "no attention heads")),
    "an output beneath a file": ([*LOCALIZE, "--output", "heads.json/out"], LOST),
    "an output that is a folder": (
        [*LOCALIZE, "--output", "model"],
        ("'model' could not be written: Is a directory",),
    ),
    "one file for two": ([*LOCALIZE, "--scores", "out.json"], ("--output, --scores and --plot", "out.json, out.json")),
    "a plot of no kind": ([*LOCALIZE, "--plot", "out.xyz"], ("--plot 'out.xyz'", ".png, .svg or .pdf")),
    "heads missing": (SELECT, ("--scorer affinity needs --heads, what `p2d heads` wrote",)),
    "heads of a file that is not there": (
        [*SELECT, "--heads", "no.json"],
        ("no file 'no.json'", "`p2d heads` writes one"),
    ),
    "heads of another file": ([*SELECT, "--heads", "model/config.json"], ("'model/config.json' holds no head set",)),
    "heads of another model": ([*SELECT, "--heads", "other.json"], ("(77, 0)", "layers: 0 to 2")),
    "heads of a name that leads elsewhere": ([*SELECT, "--heads", "../../etc"], ("no folder '../../etc'",)),
    "target missing": ([*SELECT[:-4], "--output", "out.jsonl", "--heads", "heads.json"], ("needs --target",)),
    "more rows than there are": (
        [*SELECT, "--scorer", "random", "--num-samples", "99"],
        ("--num-samples 99", "8 rows of --pool 'pool.jsonl'"),
    ),
    "two sizes": (
        [*SELECT, "--ratio", "0.1", "--num-samples", "3"],
        ("--num-samples: not allowed with argument --ratio",),
    ),
    "an output that exists": ([*SELECT[:-1], "pool.jsonl"], ("'pool.jsonl' exists already; give another name",)),
    "an output without a name": ([*SELECT[:-1], ""], ("'' is no name for a file or a folder",)),
    "an output that nobody can write": (
        [*SELECT[:-1], "/proc/out.jsonl"],
        ("'/proc/out.jsonl' could not be written",),
    ),
    "an output that is read only": ([*SELECT[:-1], "out.json"], ("not written as .json", ".jsonl, .parquet, .csv")),
    "a cache beneath a file": ([*SELECT, "--heads", "heads.json", "--cache-dir", "pool.jsonl"], ("pool.jsonl/run",)),
    "no report": (["report", "model"], ("There is no 'model/p2d_report.json'", "P2DTrainer writes it")),
    "a report of another kind": (["report", "model/config.json"], ("'model/config.json' is not a P2D report",)),
    "an adapter that is not there": (["export", "../../nowhere", "--output", "out"], ("no folder '../../nowhere'",)),
    "no adapter": (["export", "model", "--output", "out"], ("'model' has no adapter_config.json",)),
    "a rank of 0": (
        ["export", "adapter", "--output", "out", "--max-rank", "0"],
        ("--max-rank", "at least 1, got '0'"),
    ),
    "an adapter that was cut off": (
        ["export", "adapter-cut", "--output", "out"],
        ("adapter-cut/adapter_model.safetensors' is damaged or cut off", "Take another checkpoint"),
    ),
    "an adapter that lacks weights": (
        ["export", "adapter-less", "--output", "out"],
        ("'adapter-less' cannot be loaded on its base model", "missing adapter keys", "head_sparse_delta"),
    ),
    "an adapter with NaN": (["export", "adapter-nan", "--output", "out"], ("holds NaN", "Take an earlier checkpoint")),
    "an adapter to unpickle": (["export", "adapter-pickled", "--output", "out"], ("no adapter_model.safetensors",)),
    "a base that is elsewhere": (
        ["export", "adapter-elsewhere", "--output", "out"],
        ("'adapter-elsewhere' cannot be loaded on its base model '../../nowhere'",),
    ),
    "nothing to train on": ([*SFT[:3], *SFT[5:]], ("no training data: give `dataset_name`",)),
    "a flag that nobody knows": ([*SFT, "--nope", "3"], ("Neither `p2d sft` nor `accelerate launch` knows --nope",)),
    "a share of text": ([*SFT, "--data_ratio", "x"], ("data_ratio", "invalid float value: 'x'", "p2d sft --help")),
    "a share of 0": ([*SFT, "--data_ratio", "0"], ("`data_ratio` must be in (0, 1], got 0.0",)),
    "training heads of another model": ([*SFT, "--heads_file", "other.json"], ("(77, 0)", "layers: 0 to 2")),
    "a recipe that is not there": (["sft", "--config", "no.yaml"], ("no.yaml",)),
    "a recipe that is no YAML": (["sft", "--config", "bad.yaml"], ("bad.yaml", "line 1")),
    "a checkpoint that is not there": ([*SFT, "--resume_from_checkpoint", "no"], ("`resume_from_checkpoint`='no'",)),
    "a run beneath a file": ([*SFT, "--output_dir", "heads.json/out"], LOST),
}


@pytest.mark.parametrize(("arguments", "said"), COMMANDS.values(), ids=list(COMMANDS))
def test_is_one_line(folder, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "out").mkdir(exist_ok=True)  # Trainer makes it, and leaves it empty
    if arguments[0] == "export":
        (folder / "out").rmdir()
    before = contents(folder)
    assert_command_refused(arguments, said, capsys)
    assert contents(folder) == before


def test_debug_shows_where_an_error_comes_from(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"exists already"):
        main(["--debug", *SELECT[:-1], "pool.jsonl"])


def test_an_error_without_words_has_its_class(folder, monkeypatch, capsys):
    def fail(path):
        raise KeyError("\x1b[2Jx")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(HeadSet, "load", fail)
    assert_command_refused([*SELECT, "--heads", "heads.json"], (r"KeyError: '\x1b[2Jx'",), capsys)
