"""What scripts/trl_test_matrix.py puts in the place of the Hub, and how it reads TRL's tests; all without TRL's tests."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import trl
from datasets import IterableDataset, load_dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import is_conversational

from p2d_peft import HeadSet, HeadSparseConfig, P2DTrainer

from .tiny_models import tiny_model


sys.path.append(str(Path(__file__).parent.parent / "scripts"))  # no package: scripts are run by their path
pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="the stand-ins are made for the tests of TRL 1.16"
)
matrix = importlib.import_module("trl_test_matrix")
models = importlib.import_module("trl_stand_in_models")
pools = importlib.import_module("trl_stand_in_datasets")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    models.make_models(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in models.MODELS if name != models.VISION_MODEL])
def test_models_are_found_by_their_names(name, cache):
    kwargs = {"cache_dir": cache, "trust_remote_code": "Remote" in name}
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    text = pools.aphorisms()[3]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 3
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    assert max(tokenizer.get_vocab().values()) < model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        assert model(input_ids=torch.tensor([ids])).logits.isfinite().all()
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good evening."}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert "Good evening." in rendered
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token) in rendered]
        assert special and all(len(tokenizer(token)["input_ids"]) == 1 for token in special)


def test_a_revision_has_a_chat_template_of_its_own(cache):
    name, revision, length = models.OTHER_REVISION
    main, other = (AutoTokenizer.from_pretrained(name, cache_dir=cache, revision=r) for r in ("main", revision))
    assert len(other.chat_template) == length != len(main.chat_template)
    numbers = main.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert numbers == list(models.TOKEN_NUMBERS.values())


def test_code_beside_a_model_is_asked_for(cache):
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained("trl-internal-testing/tiny-RemoteForCausalLM", cache_dir=cache)


def test_datasets_are_found_by_their_names(tmp_path, monkeypatch):
    pools.make_datasets(tmp_path)
    monkeypatch.chdir(tmp_path)
    seen = Counter()
    for name, make in pools.DATASETS.items():
        for config in make():
            splits = load_dataset(name, config, cache_dir=tmp_path / "cache")
            assert {split: len(rows) for split, rows in splits.items()} == {"train": 17, "test": 2}
            assert is_conversational(splits["train"][0]) == ("standard" not in config)
            seen[name] += 1
    assert seen["trl-internal-testing/zen"] == 5
    stream = load_dataset("trl-internal-testing/zen", "standard_language_modeling", split="train", streaming=True)
    assert isinstance(stream, IterableDataset) and next(iter(stream))["text"] == pools.aphorisms()[0]
    tools = load_dataset("trl-internal-testing/toolcall", "language_modeling", cache_dir=tmp_path / "cache")["train"]
    assert len(json.loads(tools[0]["tools"])) == 2
    images = load_dataset("trl-internal-testing/zen-multi-image", cache_dir=tmp_path / "cache")["train"]
    assert [len(row) for row in images["images"][:4]] == [0, 1, 2, 0]


# -- "all weights have changed"


def trainer_of(model):
    return type("Trainer", (), {"model": model})


def weights(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def test_only_heads_changed():
    model = tiny_model()
    before = weights(model)
    adapted = get_peft_model(model, HeadSparseConfig(heads=HeadSet([(0, 1)]), init_weights=False))
    assert matrix.only_heads_changed(trainer_of(adapted), before)
    # what was adapted before the training, too
    assert matrix.only_heads_changed(trainer_of(adapted), weights(adapted))
    with torch.no_grad():
        adapted.base_model.model.lm_head.weight[0, 0] += 1
    with pytest.raises(AssertionError, match=r"lm_head\.weight has changed"):
        matrix.only_heads_changed(trainer_of(adapted), before)


def test_only_heads_changed_wants_a_change():
    model = tiny_model()
    before = weights(model)
    adapted = get_peft_model(model, HeadSparseConfig(heads=HeadSet([(0, 1)])))
    with pytest.raises(AssertionError, match="has not changed"):
        matrix.only_heads_changed(trainer_of(adapted), before)
    adapted.requires_grad_(False)
    with pytest.raises(AssertionError, match="Nothing was trained"):
        matrix.only_heads_changed(trainer_of(adapted), before)


def test_added_tokens_are_an_adapters_own_weights():
    model = tiny_model()
    before = weights(model)
    config = {"modules_to_save": ["lm_head"], "trainable_token_indices": [5, 6], "init_weights": False}
    adapted = get_peft_model(model, HeadSparseConfig(heads=HeadSet([(0, 1)]), **config))
    for name in ("trainable_tokens_delta", "lm_head.modules_to_save"):  # in the order of the modules
        with pytest.raises(AssertionError, match=rf"{name}\S+ has not changed"):
            matrix.only_heads_changed(trainer_of(adapted), before)
        (weight,) = (weight for key, weight in adapted.named_parameters() if name in key)
        weight.data += 1
    assert matrix.only_heads_changed(trainer_of(adapted), before)


def test_other_models_get_the_tests_own_check():
    lora = get_peft_model(tiny_model(), LoraConfig())
    for model in (tiny_model(), lora):
        assert not matrix.only_heads_changed(trainer_of(model), {})


# -- the plugin

TESTS = """
import pytest
from trl import SFTTrainer


class TestSFTTrainer:
    def test_which(self):
        assert SFTTrainer.__name__ == "P2DTrainer"

    @pytest.mark.parametrize("case", ["a", "b"])
    def test_weights(self, case):
        trainer, previous_trainable_params = None, {"weight": 1}
        for name, weight in previous_trainable_params.items():
            raise AssertionError(f"{name} has not changed")

    def test_number(self):
        assert 151644 == 1644

    @pytest.mark.parametrize("case", ["a", "b"])
    def test_refused(self, case):
        if case == "a":
            raise ValueError("This has images.")

    def test_left_out(self):
        raise AssertionError

    def test_unavailable(self):
        raise AssertionError

    def test_skipped(self):
        pytest.skip("no GPU")
"""


@pytest.fixture
def summary(tmp_path, monkeypatch):
    """Of a run of tests that have all that TRL's have."""
    path = tmp_path / "test_sft_trainer.py"
    path.write_text(TESTS)
    monkeypatch.setattr(matrix, "EXCLUDED", {"test_left_out": "by intent"})
    monkeypatch.setattr(matrix, "UNAVAILABLE", {"test_unavailable": "not made"})
    monkeypatch.setattr(matrix, "REFUSED", {"test_refused": ("has images", "by text")})
    monkeypatch.setattr(matrix, "only_heads_changed", lambda trainer, before: True)
    matrix.adapt(path, "P2DTrainer")
    plugin = matrix.Matrix("P2DTrainer")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    pytest.main([str(path), "-c", str(tmp_path / "pytest.ini"), "-q", "-p", "no:cacheprovider"], plugins=[plugin])
    return plugin.summary()


def test_plugin_counts_each_test_once(summary):
    assert summary["outcomes"] == {
        "excluded": 1,
        "failed": 1,
        "passed": 4,
        "refused": 1,
        "skipped": 1,
        "unavailable": 1,
    }
    assert summary["passed_with_the_weights_checked_as_p2d_means"] == 2
    assert list(summary["failed"]) == ["test_refused[b]"]  # it was not refused
    assert summary["refused"] == [{"test": "test_refused", "reason": "by text", "count": 1}]
    assert summary["skipped"] == [{"test": "test_skipped", "reason": "no GPU", "count": 1}]
    assert summary["excluded"][0]["reason"] == "by intent" and summary["unavailable"][0]["reason"] == "not made"


def test_tests_are_read_differently_for_p2d_trainer_only(tmp_path):
    (theirs, ours, _), *_ = matrix.SAID_DIFFERENTLY.values()
    name = next(iter(matrix.SAID_DIFFERENTLY))
    code = f"def {name}():\n    return {theirs!r}\n\ndef test_other():\n    return {theirs!r}\n"
    code += "for n, p in previous_trainable_params.items():\n    pass\n"
    results = {}
    for trainer in matrix.TRAINERS:
        path = tmp_path / f"{trainer}.py"
        path.write_text(code)
        matrix.adapt(path, trainer)
        results[trainer] = path.read_text()
    assert results["SFTTrainer"].count(theirs) == 2 and "only_heads_changed" not in results["SFTTrainer"]
    assert results["P2DTrainer"].count(theirs) == results["P2DTrainer"].count(ours) == 1
    assert "if not only_heads_changed(trainer, previous_trainable_params):" in results["P2DTrainer"]
    assert matrix.TRAINERS["P2DTrainer"] is P2DTrainer


def test_docs_name_what_is_left_out_and_read_differently():
    page = (Path(__file__).parent.parent / "docs" / "drop-in.md").read_text(encoding="utf-8")
    for table in (matrix.UNAVAILABLE, matrix.EXCLUDED, matrix.REFUSED, matrix.SAID_DIFFERENTLY):
        for name in table:
            assert f"`{name.partition('[')[0]}" in page, name


def test_a_folder_without_the_tests_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        matrix.main(["--tests", str(tmp_path)])
    assert f"'{tmp_path}' has no test_sft_trainer.py" in capsys.readouterr().err
