"""
Run PEFT's own tests with HeadSparse in the place of PEFT's methods.

The tests are those of the installed version of PEFT. They come with its source distribution, which is downloaded and
unpacked into a temporary folder; nothing of it is kept. All test functions that PEFT runs for each of its methods are run
with the cases below, on models that are built from configs instead of downloaded: the tests name models on the Hub, and a
folder of that name in the current directory is what `from_pretrained` finds first.

```bash
python scripts/peft_test_matrix.py
python scripts/peft_test_matrix.py --json peft_test_matrix.json -k "merge and OPT"
```

Tests that PEFT parametrizes over something else than its methods are about one method and are left out. Each skip is
printed with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import pytest
import torch
import transformers
from torch import nn

from p2d_peft import HeadSparseConfig
from p2d_peft.heads import AttentionLayout, register_attention_layout


def method_cases(task_type: str | None) -> list[tuple[type, dict[str, Any]]]:
    """The cases of HeadSparse, as PEFT's tests give those of its methods: a config class and its arguments."""
    task = {} if task_type is None else {"task_type": task_type}
    return [
        (HeadSparseConfig, {**task}),
        (HeadSparseConfig, {**task, "heads": [0, 1], "projections": ["q", "v", "o"]}),
        (HeadSparseConfig, {**task, "heads": [0], "r": 2}),
        (HeadSparseConfig, {**task, "trainable_token_indices": [0, 1, 3]}),
    ]


_RANDOM = {"init_weights": False}

# For each file of PEFT's tests: the lists of methods that its tests are parametrized over, and what they hold instead.
LISTS: dict[str, dict[str, list[Any]]] = {
    "test_decoder_models": {"ALL_CONFIGS": method_cases("CAUSAL_LM")},
    "test_encoder_decoder_models": {"ALL_CONFIGS": method_cases("SEQ_2_SEQ_LM")},
    "test_feature_extraction_models": {"ALL_CONFIGS": method_cases("FEATURE_EXTRACTION")},
    "test_seq_classifier": {"ALL_CONFIGS": method_cases("SEQ_CLS")},
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": method_cases("TOKEN_CLS"),
        "QA_CONFIGS": method_cases("QUESTION_ANS"),
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(HeadSparseConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(HeadSparseConfig, {})],
    },
    "test_custom_models": {
        "TEST_CASES": [
            ("Attention, all heads", "Attention", HeadSparseConfig, {}),
            ("Attention, some heads", "Attention", HeadSparseConfig, {"heads": {0: [1], 1: [0, 3]}}),
            ("Attention, queries and values", "Attention", HeadSparseConfig, {"projections": ["q", "v"]}),
            ("Attention, low rank", "Attention", HeadSparseConfig, {"heads": [0, 2], "r": 2}),
            ("Attention, one layer", "Attention", HeadSparseConfig, {"layers_to_transform": [0]}),
            ("Attention, module names", "Attention", HeadSparseConfig, {"target_modules": ["q_proj", "o_proj"]}),
            ("Attention and a classifier", "Attention", HeadSparseConfig, {"modules_to_save": ["lin0"]}),
        ],
        "ALL_PEFT_CONFIG_CLASSES": [HeadSparseConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            (f"HeadSparse, {name}", "head_sparse", HeadSparseConfig, first | _RANDOM, second | _RANDOM)
            for name, first, second in (
                ("the same heads", {"heads": [0]}, {"heads": [0]}),
                ("other heads", {"heads": [0, 1]}, {"heads": [2]}),
                ("overlapping heads", {"heads": [0, 1]}, {"heads": {0: [1, 2]}}),
                ("other projections", {"projections": ["k", "v"]}, {"projections": ["q", "o"]}),
                ("low rank and full", {"heads": [0], "r": 2}, {"heads": [0, 3]}),
            )
        ],
        "MIXED_ADAPTER_TEST_CASES": [
            (
                "HeadSparse, other heads",
                HeadSparseConfig(heads=[0], init_weights=False),
                HeadSparseConfig(heads=[1, 2], init_weights=False),
            ),
            (
                "HeadSparse, the same heads",
                HeadSparseConfig(heads=[0], init_weights=False),
                HeadSparseConfig(heads=[0], init_weights=False),
            ),
            (
                "HeadSparse, other layers and a low rank",
                HeadSparseConfig(heads={0: [0]}, init_weights=False),
                HeadSparseConfig(heads={1: [2]}, r=2, init_weights=False),
            ),
        ],
    },
    "test_quantization": {
        "TEST_CASES": [
            (HeadSparseConfig, {"target_modules": ["q_proj", "v_proj"]}),
            (HeadSparseConfig, {"target_modules": ["q_proj", "v_proj"], "heads": [0], "r": 2}),
        ]
    },
    # not a list of the file's own: what these tests call it
    "test_low_level_api": {"config": [HeadSparseConfig(), HeadSparseConfig(heads=[0], r=2)]},
    "test_torch_compile": {
        "settings": [
            (HeadSparseConfig(task_type="CAUSAL_LM"), {}),
            (HeadSparseConfig(task_type="CAUSAL_LM", heads=[0], r=2), {}),
        ]
    },
}

_TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
_LLAMA = {**_TINY, "vocab_size": 1000, "num_key_value_heads": 2, "max_position_embeddings": 128, **_SPECIAL}
_BERT = {**_TINY, "vocab_size": 1000, "max_position_embeddings": 128, "pad_token_id": 0}
_OPT = {
    **_TINY,
    "vocab_size": 1000,
    "ffn_dim": 32,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "n_positions": 128, **_SPECIAL}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 1000,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
}
# PEFT's tests expect differences between outputs that the usual 0.02 would bury in a model this small
_SPREAD = {"initializer_range": 0.2}

# name on the Hub -> (class of the model, class of the config, its arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", {**_OPT, "init_std": 0.2}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, **_SPREAD}),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, **_SPREAD}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**_GPT2, "rotary_dim": 4, **_SPREAD},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, **_SPREAD}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (
        "MistralForCausalLM",
        "MistralConfig",
        {**_LLAMA, **_SPREAD},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, **_SPREAD}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA, "head_dim": 8, **_SPREAD},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**_BART, "init_std": 0.2},
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        {**_BERT, **_SPREAD},
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_BERT, "pad_token_id": 1, **_SPREAD},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**_LLAMA, "num_labels": 1, **_SPREAD},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", {**_BERT, **_SPREAD}),
    "peft-internal-testing/tiny-random-RobertaModel": (
        "RobertaModel",
        "RobertaConfig",
        {**_BERT, "pad_token_id": 1, **_SPREAD},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        "DebertaConfig",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], **_SPREAD},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], **_SPREAD},
    ),
    # the quantization tests count its layers, and quantize in blocks of 64
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **_OPT,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
        },
    ),
}


_ALIASES = {
    "peft-internal-testing/tiny-dummy-qwen2": "tiny-dummy-q2",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "tiny-random-G3ForCausalLM",
}


class _Layer(nn.Module):
    """Attention with four heads, and a residual connection."""

    head_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (4, 4)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o_proj(output.transpose(1, 2).flatten(-2))


class AttentionModel(nn.Module):
    """A custom model with attention, since those of PEFT's tests have none: (B, 10) numbers to (B, 2) log softmax."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 16)
        self.layers = nn.ModuleList(_Layer() for _ in range(2))
        self.lin0 = nn.Linear(16, 2, bias=bias)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        # from 0 to 90 in PEFT's tests
        x = self.embed((X.to(self.embed.weight.dtype) / 30).unsqueeze(-1))
        for layer in self.layers:
            x = layer(x)
        return self.sm(self.lin0(x.mean(1)))


class DeepAttentionModel(nn.Module):
    """PEFT's `DeepMLP` has three layers with a `lin0` and a `lin1`: here the former are the queries of attention."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_NamedAsInDeepMLP(size) for _ in range(3))


class _NamedAsInDeepMLP(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.lin0, self.key, self.value, self.out, self.lin1 = (nn.Linear(size, size) for _ in range(5))


register_attention_layout(_NamedAsInDeepMLP, AttentionLayout("lin0", "key", "value", "out", head_dim=64))


def make_models(folder: Path) -> None:
    """Build the models from their configs and save them under their names on the Hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, 1000)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.model_max_length = 32
    for name, (model_class, config_class, arguments) in MODELS.items():
        transformers.set_seed(0)
        config = getattr(transformers, config_class)(**arguments)
        model = getattr(transformers, model_class)(config)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    for name, alias in _ALIASES.items():
        (folder / name).with_name(alias).symlink_to(folder / name, target_is_directory=True)
    # what the tests of the configs read from the Hub
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(folder / "peft-internal-testing/tiny-opt-lora-revision")


def get_tests(folder: Path) -> Path:
    """Download the source distribution of the installed PEFT and unpack it; returns the folder with the tests."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*command, f"peft=={peft.__version__}", "--dest", str(folder)], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    tests = folder / f"peft-{peft.__version__}" / "tests"
    if importlib.util.find_spec("diffusers") is None:
        # testing_common.py imports it, for tests of other files
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder / "diffusers"),
        ]
        subprocess.run([*command, "diffusers"], check=True)
        sys.path.append(str(folder / "diffusers"))
    (tests / "__init__.py").touch()  # the files import one another relatively, and the archive lacks it
    (folder / "pytest.ini").write_text("[pytest]\n")  # and not PEFT's own, which measures the coverage
    return tests


class Matrix:
    """The plugin for pytest that puts HeadSparse's cases in, and counts."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.by_file: dict[str, Counter[str]] = {}
        self.skipped: Counter[tuple[str, str]] = Counter()
        self.failed: list[str] = []
        self.left_out: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Put our cases into the marks before pytest reads them."""
        lists = LISTS[metafunc.module.__name__.rpartition(".")[2]]
        for mark in metafunc.definition.iter_markers("parametrize"):
            for name, cases in lists.items():
                if mark.args[1] is getattr(metafunc.module, name, None) or mark.args[0] == name:
                    object.__setattr__(mark, "args", (mark.args[0], cases))
                    object.__setattr__(mark, "kwargs", {})  # names of PEFT's cases

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left_out = [], []
        for item in items:
            arguments = item.callspec.params.values() if hasattr(item, "callspec") else ()
            ours = any(
                value is HeadSparseConfig
                or isinstance(value, HeadSparseConfig)
                or (isinstance(value, tuple) and value and isinstance(value[0], HeadSparseConfig))
                for value in arguments
            )
            (kept if ours else left_out).append(item)
            if not ours:
                self.left_out[_file_of(item.nodeid)] += 1
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        # these tests are skipped for all methods but LoRA before their common part is asked
        with pytest.MonkeyPatch.context() as patch:
            if getattr(item, "originalname", "").endswith("mixed_adapter_batches"):
                patch.setattr(item.module, "LoraConfig", HeadSparseConfig)  # type: ignore[attr-defined]
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        counts = self.by_file.setdefault(_file_of(report.nodeid), Counter())
        counts[report.outcome] += 1
        self.outcomes[report.outcome] += 1
        if report.outcome == "failed":
            self.failed.append(report.nodeid.partition("/tests/")[2])
        if report.outcome == "skipped":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            test = report.nodeid.rpartition("::")[2].partition("[")[0]
            self.skipped[test, reason.removeprefix("Skipped: ")] += 1

    def summary(self) -> dict[str, Any]:
        return {
            "peft": peft.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "outcomes": dict(self.outcomes),
            "by_file": {name: dict(counts) for name, counts in sorted(self.by_file.items())},
            "skipped": [
                {"test": test, "reason": reason, "count": count}
                for (test, reason), count in sorted(self.skipped.items())
            ],
            "failed": sorted(self.failed),
            "left_out_as_about_one_method": dict(sorted(self.left_out.items())),
        }


def _file_of(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).name


def adapt_common_tests(tests: Path) -> None:
    """
    Say to PEFT's tests what HeadSparse supports. They know it from lists of PEFT's own methods: mixed batches are run for
    LoRA and RoAd only, the weighted combination for LoRA and IA3, Conv1D for LoRA and three more. HeadSparse takes the
    place of RoAd and IA3 in those, which are the tests that fit it, and that of LoRA in the one with beam search.
    """
    sys.path.insert(0, str(tests.parent))
    from tests import test_custom_models, test_decoder_models, testing_common, testing_utils  # type: ignore[import-not-found]

    # looks for biases to train, for BEFT; meant to do nothing for other methods, it takes every method for BEFT
    test_decoder_models.check_beft_config = lambda *args: None

    testing_common.RoadConfig = testing_common.IA3Config = HeadSparseConfig
    tester = testing_common.PeftCommonTester
    beam_search = tester._test_generate_with_mixed_adapter_batches_and_beam_search
    combination = tester._test_weighted_combination_of_adapters

    def beam_search_with_head_sparse(self: Any, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(testing_common, "LoraConfig", HeadSparseConfig)
            beam_search(self, *args)

    def combination_of_heads(self: Any, model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
        if "trainable_token_indices" in config_kwargs:
            pytest.skip("HeadSparse refuses to combine adapters with trainable tokens, whose training would be lost.")
        # under another name, as Qwen2 and Gemma are skipped for LoRA's singular value decomposition
        combination(
            self, f"./{Path(model_id).parent}/{_ALIASES.get(model_id, Path(model_id).name)}", config_cls, config_kwargs
        )

    tester._test_generate_with_mixed_adapter_batches_and_beam_search = beam_search_with_head_sparse
    tester._test_weighted_combination_of_adapters = combination_of_heads

    wrapper = test_custom_models.MockTransformerWrapper
    theirs = wrapper.from_pretrained

    def from_pretrained(model_id: str, dtype: torch.dtype | None = None) -> nn.Module:
        if model_id != "Attention":
            return theirs(model_id, dtype)
        torch.manual_seed(0)
        return AttentionModel().to(dtype or torch.float32)

    wrapper.from_pretrained = staticmethod(from_pretrained)
    # the models of the tests that are about several adapters
    test_custom_models.MLP = AttentionModel
    test_custom_models.DeepMLP = DeepAttentionModel

    def quotes() -> Any:
        from datasets import Dataset, DatasetDict

        generator = torch.Generator().manual_seed(0)
        words = torch.randint(3, 1000, (40, 12), generator=generator).tolist()
        rows = {"quote": [" ".join(f"w{word}" for word in row) for row in words]}
        rows.update(author=["-"] * 40, tags=["-"] * 40)
        return DatasetDict(train=Dataset.from_dict(rows))

    testing_utils.load_dataset_english_quotes = quotes


def main() -> int:
    """Run the tests; returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--tests", nargs="+", choices=sorted(LISTS), default=None, help="only these files of tests")
    parser.add_argument("--compile", action="store_true", help="also test torch.compile, which takes minutes")
    parser.add_argument("-k", dest="expression", help="only tests that match, as in pytest")
    parser.add_argument("-x", dest="stop", action="store_true", help="stop at the first failure")
    arguments = parser.parse_args()
    names = arguments.tests or [name for name in LISTS if arguments.compile or name != "test_torch_compile"]
    if "test_torch_compile" in names:
        os.environ["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"
    output = arguments.json.resolve() if arguments.json else None

    matrix = Matrix()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tests = get_tests(folder)
        models = folder / "models"
        make_models(models)
        os.chdir(models)
        adapt_common_tests(tests)
        command = [str(tests / f"{name}.py") for name in names]
        command += ["-c", str(folder / "pytest.ini"), "-p", "no:cacheprovider", "-q", "--tb=short", "-W", "ignore"]
        command += ["-k", arguments.expression] if arguments.expression else []
        command += ["-x"] if arguments.stop else []
        code = pytest.main(command, plugins=[matrix])
        os.chdir(folder.parent)

    summary = matrix.summary()
    print(json.dumps(summary, indent=2))
    if output is not None:
        output.write_text(json.dumps(summary, indent=2) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
