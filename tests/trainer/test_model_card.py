import ast

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from p2d_peft import HeadSet, HeadSparseConfig, P2DTrainer, efficiency
from p2d_peft.trainer.model_card import inline, is_repo_id, link, literal

from ..tiny_data import prompt_completion
from ..tiny_models import tiny_model, tiny_tokenizer
from .test_p2d_trainer import config


LORA = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
QUICK = {"max_steps": 1, "reference_steps": 0, "localize_method": "random", "scorer": "random"}


def trainer(folder, model=None, name="org/base", changes=None, **kwargs):
    model = tiny_model() if model is None else model
    model.config._name_or_path = name
    return P2DTrainer(
        model,
        config(folder, **{**QUICK, **(changes or {})}),
        train_dataset=prompt_completion(32),
        target_dataset=prompt_completion(6, seed=1),
        processing_class=tiny_tokenizer(),
        **kwargs,
    )


def card_of(run, **kwargs):
    run.create_model_card(**kwargs)
    return ModelCard.load(f"{run.args.output_dir}/README.md")


def first_block(card):
    code = card.text.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    return code


def test_a_run_is_told_as_it_was(tmp_path):
    run = trainer(tmp_path / "run", changes={"reference_seconds": 8.0, "localize_method": "taylor"})
    run.train()
    run.save_model()
    card = card_of(run, model_name="My model", dataset_name="org/data", tags="mine")
    data = card.data
    assert (data.base_model, data.datasets, data.library_name) == ("org/base", "org/data", "peft")
    assert {"p2d", "p2d_peft", "trl", "mine"} <= set(data.tags)
    code = first_block(card)
    assert "import p2d_peft" in code and 'PeftModel.from_pretrained(base, "run")' in code
    assert '# model = PeftModel.from_pretrained(base, "run", subfolder="lora")' in code
    text, report = card.text, run.report
    assert text.startswith("\n# My model\n")
    assert "| heads | 3 | 12 | 25.0 % | `taylor` |" in text and f"`{run.heads.by_layer()}`" in text
    assert "| rows | 16 | 32 | 50.0 % | random |" in text
    assert f"| tokens | {report.selected_tokens} | {report.pool_tokens} |" in text
    assert f"| localize | {report.stage_seconds['localize']:.1f} |" in text
    assert f"measured | {report.reference_seconds:.1f} |" in text
    assert f"is {report.aer:.3g}: a speed-up of {report.speedup:.3g}." in text
    assert f"{report.trainable_parameters:,} of {report.total_parameters:,} weights" in text
    assert "](p2d_heads.png)" in text and (tmp_path / "run" / "p2d_heads.png").is_file()
    assert "drawn at random" not in text
    assert f"- transformers {transformers.__version__}" in text
    assert "eprint    = {arXiv:2605.21558}," in text.split("```bibtex")[1]


def test_heads_that_only_score_are_told(tmp_path):
    run = trainer(tmp_path, changes={"scorer": "affinity", "localize_method": "taylor", "reference_steps": 0})
    run.train()
    text = card_of(run).text
    assert (
        "| heads | 3 | 12 | 25.0 % | `taylor` |\n| heads that score | 3 | 12 | 25.0 % | `taylor` |\n| rows |" in text
    )


def test_without_a_reference_or_localization_it_says_so(tmp_path):
    run = trainer(tmp_path, heads=HeadSet([(0, 1)]))
    run.train()
    text = card_of(run).text
    assert "There is no AER, since the reference" in text and "speed-up" not in text
    assert "| heads | 1 | 12 | 8.3 % | given |" in text
    assert "lora" not in first_block(ModelCard(text))  # nothing was saved yet


def test_names_of_users_break_neither_yaml_nor_markdown(tmp_path):
    nasty = "a `b` | *c*\n---\n# d: [e](f) <g>\n```"
    run = trainer(tmp_path / "x|y `z`", name=nasty)
    run.train()
    card = card_of(run, model_name=nasty, dataset_name=nasty, tags=[nasty])
    # the Hub would refuse what cannot be a repository
    assert card.data.base_model is None and card.data.datasets is None
    assert nasty in card.data.tags and card.data.model_name == nasty
    assert yaml.safe_load(card.data.to_yaml()) == card.data.to_dict()
    lines = card.text.splitlines()
    assert "---" not in lines and [line for line in lines if line.startswith("# ")][1:] == [
        line for line in lines if line.startswith("# The same") or line.startswith("# model")
    ]
    assert lines[1] == r"# a \`b\` \| \*c\* --- \# d: \[e\](f) \<g\> \`\`\`"
    code = first_block(card)
    assert 'AutoTokenizer.from_pretrained("x|y `z`")' in code
    assert 'AutoModelForCausalLM.from_pretrained("path/to/the/base/model")' in code
    assert all(line.count("|") == 6 for line in lines if line.startswith("| heads"))
    assert "Here the heads were drawn at random." in card.text


def test_another_adapter_is_called_what_it_is(tmp_path):
    run = trainer(tmp_path, peft_config=LORA, changes={"localize_method": "random"})
    run.train()
    run.save_model()
    card = card_of(run)
    assert "A PEFT (LORA) adapter for [org/base]" in card.text
    assert "in the place of the heads" in card.text and "| rows | 16 | 32 |" in card.text
    code = first_block(card)
    assert "p2d_peft" not in code and "lora" not in code and "PeftModel.from_pretrained(base" in code


def test_without_heads_none_are_told(tmp_path):
    run = trainer(tmp_path, peft_config=LORA, changes={"scorer": "length"})
    run.train()
    text = card_of(run).text
    assert run.heads is None
    assert "| heads |" not in text and "HeadSet" not in text and "p2d_heads.png" not in text
    assert "| length |" in text


def test_where_nothing_was_selected_all_rows_are_told(tmp_path):
    run = trainer(tmp_path, changes={"data_ratio": 1.0})
    run.train()
    text = card_of(run).text
    assert "| rows | all | 32 | 100.0 % |  |" in text and "\n| tokens |" not in text


def test_an_adapter_with_a_name_is_loaded_from_its_subfolder(tmp_path):
    model = get_peft_model(tiny_model(), HeadSparseConfig(heads=[0], task_type="CAUSAL_LM"), adapter_name="mine")
    run = trainer(tmp_path, model)
    run.train()
    run.save_model()
    code = first_block(card_of(run))
    assert 'subfolder="mine")' in code and 'subfolder="mine/lora")' in code
    assert (tmp_path / "mine" / "lora" / "adapter_config.json").is_file()


def test_a_model_that_the_adapter_was_merged_into_keeps_the_card_of_trl(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.model = run.model.merge_and_unload()
    run.save_model()
    text = card_of(run).text
    assert "This model was trained with P2D" in text and "What was chosen" not in text


def test_in_training_a_card_of_one_process_waits_for_no_other(tmp_path, monkeypatch):
    waited = []

    class MakesCard(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(efficiency, "settle", lambda everyone=True: waited.append(everyone))
                run.create_model_card()

    run = trainer(tmp_path, callbacks=[MakesCard()])
    run.train()
    assert waited == [False, False]


@pytest.mark.parametrize("adapter", ["lora", None])
def test_switched_off_it_is_the_card_of_sft_trainer(adapter, tmp_path):
    run = trainer(tmp_path, changes={"p2d": False}, peft_config=LORA if adapter else None)
    run.train()
    card = card_of(run)
    assert "This model was trained with SFT." in card.text
    assert "P2D" not in card.text and not {"p2d", "p2d_peft"} & set(card.data.tags)


def test_switched_off_a_head_sparse_adapter_still_says_how_to_load_it(tmp_path):
    adapter = HeadSparseConfig(heads=[0], task_type="CAUSAL_LM")
    run = trainer(tmp_path, changes={"p2d": False}, peft_config=adapter)
    run.train()
    run.save_model()
    card = card_of(run)
    assert "import p2d_peft" in first_block(card) and 'subfolder="lora"' in first_block(card)
    assert "2605.21558" not in card.text and "What was chosen" not in card.text
    assert "p2d" not in card.data.tags


def test_before_training_there_is_nothing_to_tell(tmp_path):
    assert "What was chosen" not in card_of(trainer(tmp_path)).text


def test_a_saved_model_has_the_card_of_the_finished_run(tmp_path):
    run = trainer(tmp_path / "run", changes={"reference_seconds": 8.0, "save_strategy": "steps", "save_steps": 1})
    run.train()
    assert "was not finished" in (tmp_path / "run" / "README.md").read_text()
    run.save_model(tmp_path / "elsewhere")
    assert "was not finished" in (tmp_path / "run" / "README.md").read_text()
    run.save_model()
    text = (tmp_path / "run" / "README.md").read_text()
    assert f"is {run.report.aer:.3g}: a speed-up" in text and "# run" in text and 'subfolder="lora"' in text


def test_in_training_the_costs_are_left_open(tmp_path):
    run = trainer(tmp_path, changes={"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    run.train()
    text = ModelCard.load(tmp_path / "README.md").text  # the last checkpoint's
    assert "The training was not finished when this card was written." in text
    assert "| heads | 3 | 12 |" in text and "](p2d_heads.png)" in text
    run.save_model()
    run.train()  # anew: neither the LoRA nor the report of the first training is this one's
    text = ModelCard.load(tmp_path / "README.md").text
    assert "lora" not in text and "The training was not finished" in text
    assert "The training was not finished" not in card_of(run).text


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/name", True),
        ("gpt2", True),
        ("/models/x", False),
        ("a/b/c", False),
        ("", False),
        (None, False),
        (3, False),
    ],
)
def test_what_may_be_a_repository(name, is_one):
    assert is_repo_id(name) is is_one
    assert ("](https://huggingface.co/" in link(name)) is is_one


def test_texts_are_escaped_for_where_they_go():
    assert inline("a_b\n\n c|d") == r"a\_b c\|d"
    assert link("org/a_b", "datasets/") == r"[org/a\_b](https://huggingface.co/datasets/org/a_b)"
    assert ast.literal_eval(literal('a"b\\\n```é')) == 'a"b\\\n```é'
