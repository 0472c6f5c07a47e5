import json
import time
from unittest.mock import Mock

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from p2d_peft import HeadSet, HeadSparseConfig, P2DConfig, P2DDataSelector, P2DTrainer, efficiency, localize_heads
from p2d_peft.report import P2DReport
from p2d_peft.selection.policies import RoundRobin
from p2d_peft.trainer import arguments, choosing

from ..model_checks import assert_unchanged, snapshot
from ..tiny_data import KINDS, prompt_completion, text
from ..tiny_models import FEW, LAYOUTS, tiny_model, tiny_tokenizer
from .plain_sft import assert_trains_as, plain_sft


def config(tmp_path, **changes):
    values = {
        "bf16": False,
        "report_to": "none",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "data_ratio": 0.5,
        "head_ratio": 0.25,
        "localize_method": "proxy",  # a draw, the default, would leave out what is to be tested
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "reference_steps": 1,
        "disable_tqdm": True,
    }
    return P2DConfig(str(tmp_path), **{**values, **changes})


def trainer(tmp_path, model=None, pool=None, target=None, changes=None, kind=P2DTrainer, **kwargs):
    return kind(
        tiny_model() if model is None else model,
        config(tmp_path, **(changes or {})),
        train_dataset=prompt_completion(32) if pool is None else pool,
        target_dataset=prompt_completion(6, seed=1) if target is None else target,
        processing_class=tiny_tokenizer(),
        **kwargs,
    )


def deltas(model):
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if "head_sparse" in name}


def assert_same_weights(a, b):
    assert a.keys() == b.keys() and len(a) > 0
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_by_default_heads_are_drawn_with_the_runs_seed_and_the_model_is_not_asked(tmp_path, monkeypatch):
    default = P2DConfig.localize_method
    expected = localize_heads(tiny_model(), [], method="random", seed=7)
    model = tiny_model()
    run = trainer(
        tmp_path, model, changes={"localize_method": default, "seed": 7, "data_ratio": 1.0, "reference_steps": 0}
    )
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model was asked"))
    choosing.choose(run)
    assert run.head_scores.method == "random" and torch.equal(run.head_scores.values, expected.values)
    assert choosing.best_heads(run.head_scores, run) == expected.top(0.25, per_layer="even", last_layers=0.67)
    other = localize_heads(tiny_model(), [], method="random", seed=8)
    assert not torch.equal(other.values, expected.values)


@pytest.mark.parametrize("name", FEW)
def test_trains_the_chosen_heads_on_the_chosen_rows_and_nothing_else(name, tmp_path):
    base, model = tiny_model(name), tiny_model(name)
    run = trainer(tmp_path, model)
    pool = run.train_dataset
    run.train()
    # by default heads of the last two thirds of the layers are trained, and those of the first ones score
    assert len(run.heads) == 3 and run.head_scores.top(0.25, per_layer="even", last_layers=0.67) == run.heads
    assert run.heads.layers == (1, 2)
    assert run.selector.engine.heads == run.head_scores.top(0.25, first_layers=0.2)
    assert run.selector.engine.heads.layers == (0,)
    assert len(run.train_dataset) == 16
    assert all(row in pool["input_ids"][:] for row in run.train_dataset["input_ids"])
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == set(deltas(run.model))
    assert all((delta != 0).any() for delta in deltas(run.model).values())

    merged = run.model.merge_and_unload()
    assert merged is model  # the object that was passed is the one that got trained
    config_, by_layer = base.config, run.heads.by_layer()
    head_dim = getattr(config_, "head_dim", None) or config_.hidden_size // config_.num_attention_heads
    per_group = config_.num_attention_heads // config_.num_key_value_heads
    for weight_name, before in base.state_dict().items():
        changed = (before != merged.state_dict()[weight_name]).nonzero()
        parts = weight_name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        role = parts[-2]
        if layer not in by_layer or role not in ("q_proj", "k_proj", "v_proj", "o_proj") or parts[-1] == "bias":
            assert len(changed) == 0, weight_name
            continue
        units = {head if role in ("q_proj", "o_proj") else head // per_group for head in by_layer[layer]}
        lines = changed[:, 1 if role == "o_proj" else 0]
        assert {int(line) // head_dim for line in lines} == units, weight_name


def test_the_papers_form_is_one_set_of_heads_and_the_best_scores(tmp_path):
    paper = {"train_last_layers": 1.0, "score_first_layers": 1.0, "round_robin": False}
    run = trainer(tmp_path, changes=paper)
    run.train()
    assert run.heads == run.selector.engine.heads == run.head_scores.top(0.25, per_layer="even")
    best = run.selector.scores.argsort(descending=True, stable=True)[:16]
    assert run.selector.rows == sorted(best.tolist())
    assert run.report.heads == run.report.scoring_heads


def test_the_samples_of_the_target_take_turns_and_the_forward_pass_ends_early(tmp_path):
    model = tiny_model()
    run = trainer(tmp_path, model, changes={"num_train_epochs": 1, "train_last_layers": 0.33})
    passed, choose_rows = [], P2DDataSelector.select
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: passed.append(index))

    def selecting(selector, pool):
        passed.clear()
        rows = choose_rows(selector, pool)
        assert set(passed) == {0}
        passed.clear()
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P2DDataSelector, "select", selecting)
        run.train()
    assert set(passed) == {0, 1, 2}  # training went through all layers
    assert run.selector.policies == (RoundRobin(),)
    best = run.selector.scores.argsort(descending=True, stable=True)[:16]
    assert run.selector.rows != sorted(best.tolist())
    assert run.report.scoring_heads == {"0": run.selector.engine.heads.by_layer()[0]}
    assert run.report.heads == {"2": run.heads.by_layer()[2]}


def test_what_is_trained_scores_where_that_costs_no_more(tmp_path):
    by_gradient = trainer(tmp_path / "gradient", changes={"scorer": "gradient", "train_last_layers": 0.33})
    by_gradient.train()
    assert by_gradient.selector.engine.heads == by_gradient.heads and by_gradient.heads.layers == (2,)
    given = HeadSet([(0, 1), (2, 2)])
    with_heads = trainer(tmp_path / "given", heads=given)
    with_heads.train()
    assert with_heads.selector.engine.heads == with_heads.heads == given
    with_lora = trainer(tmp_path / "lora", peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    with_lora.train()
    assert with_lora.selector.engine.heads == with_lora.heads and with_lora.heads.layers == (0,)


def test_the_final_metrics_and_the_report_carry_the_aer(tmp_path):
    run = trainer(tmp_path)
    all_rows = run.train_dataset
    output = run.train()
    report = P2DReport.load(tmp_path / "p2d_report.json")
    assert report == run.report
    assert set(report.stage_seconds) == {"localize", "select", "train"}
    assert report.aer == pytest.approx(sum(report.stage_seconds.values()) / report.reference_seconds)
    assert report.speedup == pytest.approx(1 / report.aer)
    assert report.reference_source == "estimated" and report.epochs == 2
    assert (report.pool_rows, report.selected_rows, report.n_heads) == (32, 16, 12)
    assert report.heads == {str(layer): heads for layer, heads in run.heads.by_layer().items()}
    assert report.selected_tokens == sum(map(len, run.train_dataset["input_ids"]))
    assert report.trainable_parameters == sum(delta.numel() for delta in deltas(run.model).values())
    # one pass over the target's samples, and, for affinity, one over them and over the pool
    pool, target = (sum(map(len, data["input_ids"])) for data in (all_rows, run.target_dataset))
    tokens = {"localize": target, "select": target + pool, "train": 2 * report.selected_tokens}
    assert report.stage_tokens == tokens and report.pool_tokens == pool
    assert set(report.stage_peak_memory) == set(tokens) and min(report.stage_peak_memory.values()) > 1e6
    assert (report.peak_memory_kind, report.device, report.processes) == ("process", "cpu", 1)
    assert output.metrics["train_p2d_select_tokens"] == report.stage_tokens["select"]
    assert output.metrics["train_p2d_train_peak_memory_bytes"] == report.stage_peak_memory["train"]
    assert "train_p2d_reference_relative_error" not in output.metrics  # of one step there is none
    assert output.metrics["train_p2d_aer"] == report.aer == run.state.log_history[-1]["train_p2d_aer"]
    # one training, seen from outside: 16 rows, 4 a step, 2 epochs, and its own last entry
    assert [entry["step"] for entry in run.state.log_history] == [1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_the_reference_may_be_given_or_left_out(tmp_path):
    run = trainer(tmp_path, changes={"reference_seconds": 50.0})
    run.train()
    assert (run.report.reference_seconds, run.report.reference_source) == (50.0, "given")
    run = trainer(tmp_path, changes={"reference_steps": 0})
    metrics = run.train().metrics
    assert run.report.aer is None and "train_p2d_aer" not in metrics and "train_p2d_train_seconds" in metrics


@pytest.mark.parametrize("several", [False, True])
def test_evaluation_is_not_charged(several, tmp_path, monkeypatch):
    eval_dataset = prompt_completion(6, seed=2)
    eval_dataset = {"a": eval_dataset, "b": eval_dataset} if several else eval_dataset
    run = trainer(tmp_path, changes={"eval_strategy": "epoch"}, eval_dataset=eval_dataset)
    evaluate, waited = SFTTrainer.evaluate, 10_000.0  # far more than the training takes, however busy the machine
    real_time, extra = time.perf_counter, []

    def slow_evaluate(self, *args, **kwargs):
        extra.append(waited)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "evaluate", slow_evaluate)
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: real_time() + sum(extra))
    metrics = run.train().metrics
    assert len(extra) == (6 if several else 2)
    assert 0 < metrics["train_p2d_train_seconds"] < waited


@pytest.mark.parametrize("scorer", ["icl", "perplexity", "random"])
@pytest.mark.parametrize("method", ["taylor", "random"])
def test_methods_and_scorers_combine(method, scorer, tmp_path):
    run = trainer(tmp_path, changes={"localize_method": method, "scorer": scorer, "max_steps": 1})
    run.train()
    assert (run.report.localize_method, run.report.scorer) == (method, scorer)
    assert not run.selector.policies  # these do not compare a row with each of the target's samples
    assert len(run.train_dataset) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_takes_all_that_sft_trainer_takes(kind, tmp_path):
    run = trainer(tmp_path, pool=KINDS[kind](), target=KINDS[kind](4, seed=1), changes={"max_steps": 1})
    run.train()
    assert len(run.train_dataset) == 12


def test_the_same_seed_gives_the_same_heads_rows_and_weights(tmp_path):
    first, second = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    first.train()
    second.train()
    assert first.heads == second.heads
    assert first.train_dataset.to_list() == second.train_dataset.to_list()
    assert_same_weights(deltas(first.model), deltas(second.model))


def test_resuming_equals_an_uninterrupted_run_and_chooses_nothing_again(tmp_path, monkeypatch):
    changes = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path, changes=changes)
    whole.train()

    def never(*args, **kwargs):
        raise AssertionError("chosen again")

    monkeypatch.setattr(choosing, "localize_heads", never)
    monkeypatch.setattr(choosing.P2DDataSelector, "select", never)
    monkeypatch.setattr(choosing, "find_reference", never)
    resumed = trainer(tmp_path, changes=changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.heads == whole.heads
    assert resumed.train_dataset.to_list() == whole.train_dataset.to_list()
    assert_same_weights(deltas(resumed.model), deltas(whole.model))
    # what was spent before the interruption stays charged
    state = json.loads((tmp_path / "checkpoint-3" / "p2d_state.json").read_text())
    for stage in ("localize", "select"):
        assert resumed.report.stage_seconds[stage] == state["stage_seconds"][stage]
        assert resumed.report.stage_tokens[stage] == whole.report.stage_tokens[stage]
    assert resumed.report.stage_seconds["train"] > state["stage_seconds"]["train"] > 0
    assert resumed.report.stage_tokens == whole.report.stage_tokens
    assert resumed.report.reference_seconds == whole.report.reference_seconds

    latest = trainer(tmp_path, changes=changes)
    latest.train(resume_from_checkpoint=True)
    assert_same_weights(deltas(latest.model), deltas(whole.model))


def test_resuming_with_another_pool_or_checkpoint_is_refused(tmp_path):
    trainer(tmp_path, changes={"save_strategy": "epoch"}).train()
    other = trainer(tmp_path, pool=prompt_completion(20))
    with pytest.raises(ValueError, match="selected from 32 rows, but `train_dataset` has 20"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "p2d_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4' has no p2d_state\.json"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match="No checkpoint to resume from"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("other", ["heads", "rows"])
def test_a_trainer_that_has_chosen_does_not_go_on_from_another_ones_checkpoint(other, tmp_path):
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "reference_steps": 0}
    heads = {"heads": HeadSet([(1, 0)])}
    first = trainer(tmp_path / "first", changes=changes, **heads)
    if other == "rows":
        changes = {**changes, "scorer": "random", "seed": 3}
    else:
        heads = {"heads": HeadSet([(1, 2)])}
    second = trainer(tmp_path / "second", changes=changes, **heads)
    first.train()
    second.train()
    costs = second._clock.costs
    with pytest.raises(ValueError, match=rf"is of a run on other {other} than this trainer has chosen"):
        second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert second._clock.costs == costs
    second.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-1"))  # its own


def test_resuming_with_the_pool_in_another_order_is_refused(tmp_path):
    changes = {"save_strategy": "epoch", "reference_steps": 0, "localize_method": "random"}
    trainer(tmp_path, changes=changes).train()
    other = trainer(tmp_path, pool=prompt_completion(32).shuffle(seed=2), changes=changes)
    with pytest.raises(
        ValueError, match=r"selected from another `train_dataset`.* pass the same dataset in the same order"
    ):
        other.train(resume_from_checkpoint=True)
    assert (other.heads, other.head_scores) == (None, None) and not isinstance(other.model, PeftModel)
    # earlier versions did not write down what the rows are
    path = tmp_path / "checkpoint-8" / "p2d_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows_digest": None}))
    other.train(resume_from_checkpoint=True)


def test_tokens_are_counted_where_a_subclass_computes_the_loss(tmp_path):
    class OwnLoss(P2DTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())

    for changes in ({}, {"p2d": False}):
        changes |= {"max_steps": 3, "reference_steps": 0, "localize_method": "random"}
        expected, own = (
            trainer(tmp_path / "1", changes=changes),
            trainer(tmp_path / "2", changes=changes, kind=OwnLoss),
        )
        expected.train()
        own.train()
        assert own.report.stage_tokens == expected.report.stage_tokens and own.report.stage_tokens["train"] > 0


@pytest.mark.parametrize("packing", [False, True])
def test_a_pool_that_is_to_be_shuffled_keeps_its_numbers(packing, tmp_path):
    """The numbers of the selected rows are those of `train_dataset` as it was given."""
    changes = {"shuffle_dataset": True, "packing": packing, "max_length": 64, "reference_steps": 0}
    pool = prompt_completion(32)
    run, plain = trainer(tmp_path / "1", changes=changes), trainer(tmp_path / "2", changes={"reference_steps": 0})
    run.train()
    plain.train()
    assert run.selector.rows == plain.selector.rows
    if not packing:
        assert run.train_dataset["prompt"][:] != pool.select(run.selector.rows)["prompt"][:]
        assert sorted(run.train_dataset["prompt"]) == sorted(pool.select(run.selector.rows)["prompt"])


@pytest.mark.parametrize("packing", [False, True])
def test_a_shuffled_run_on_all_rows_is_that_of_sft_trainer(packing, tmp_path):
    changes = {"shuffle_dataset": True, "packing": packing, "max_length": 64, "data_ratio": 1.0, "max_steps": 3}
    adapter = HeadSparseConfig(heads=HeadSet([(0, 1)]), task_type="CAUSAL_LM")
    run = trainer(tmp_path, changes={**changes, "reference_steps": 0}, peft_config=adapter)
    run.train()
    assert_trains_as(run, plain_sft(run, prompt_completion(32), peft_config=adapter))


def test_rows_that_truncation_leaves_nothing_of_are_told_of(tmp_path, caplog):
    pool = prompt_completion(32).map(lambda row, i: {"prompt": "a" * 99} if i % 4 == 0 else {}, with_indices=True)
    run = trainer(tmp_path, pool=pool, changes={"max_length": 60})
    if len(run.train_dataset) == 32:
        pytest.skip(f"TRL {trl.__version__} does not leave them out")
    assert "8 of the 32 rows of `train_dataset` have no token that counts within `max_length`=60" in caplog.text
    assert len(run.train_dataset) == 24
    long = prompt_completion(32).map(lambda row: {"prompt": "a" * 99})
    for name, given in (("train_dataset", {"pool": long}), ("target_dataset", {"target": long})):
        with pytest.raises(ValueError, match=f"None of the 32 rows of `{name}` has a token that counts within .*=60"):
            trainer(tmp_path, **given, changes={"max_length": 60})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": None}, "`max_length` can't be `None`"),
        ({"max_length": 30, "packing_strategy": "bdf"}, "[Pp]acking"),
    ],
)
def test_what_packing_lacks_is_told_when_the_trainer_is_made(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, changes={"packing": True, **changes})


@pytest.mark.parametrize("max_steps", [-1, 3])
def test_a_batch_that_the_selected_rows_do_not_fill_is_refused_before_the_stages(max_steps, tmp_path, monkeypatch):
    changes = {"dataloader_drop_last": True, "per_device_train_batch_size": 20, "max_steps": max_steps}
    monkeypatch.setattr(choosing, "localize_heads", pytest.fail)
    with pytest.raises(ValueError, match=r"leaves no batch: 16 rows are to be trained on, and a batch .* has 20"):
        trainer(tmp_path, changes=changes).train()


def test_a_second_training_goes_on_with_the_same_rows_and_weights(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.train()
    heads, rows, first = run.heads, run.train_dataset.to_list(), run.report
    before = deltas(run.model)
    monkeypatch.setattr(choosing, "localize_heads", None)
    run.train()
    assert run.heads == heads and run.train_dataset.to_list() == rows
    assert any(not torch.equal(before[name], delta) for name, delta in deltas(run.model).items())
    assert run.report.stage_seconds["localize"] == first.stage_seconds["localize"]
    assert run.report.epochs == 2
    assert run.report.stage_tokens == first.stage_tokens


def test_switched_off_it_is_sft_trainer_step_for_step(tmp_path):
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    run = trainer(tmp_path, changes={"p2d": False}, peft_config=lora)
    run.train()
    plain = plain_sft(run, prompt_completion(32), peft_config=lora)
    assert_trains_as(run, plain)
    assert len(run.state.log_history) == 17
    assert set(run.state.log_history[-1]) == set(plain.state.log_history[-1])


def test_a_run_without_p2d_is_a_reference_for_those_with_it(tmp_path):
    plain = trainer(tmp_path / "full", changes={"p2d": False, "save_strategy": "epoch"})
    plain.train()
    full = P2DReport.load(tmp_path / "full" / "p2d_report.json")
    assert full == plain.report
    assert (full.scorer, full.heads, full.aer, full.reference_seconds) == (None, None, None, None)
    assert set(full.stage_seconds) == set(full.stage_tokens) == set(full.stage_peak_memory) == {"train"}
    assert (full.pool_rows, full.selected_rows, full.epochs) == (32, 32, 2)
    assert full.stage_tokens["train"] == 2 * full.pool_tokens
    assert full.trainable_parameters == full.total_parameters

    run = trainer(tmp_path / "p2d", changes={"reference_report": str(tmp_path / "full"), "num_train_epochs": 4})
    metrics = run.train().metrics
    assert run.report.reference_source == "measured"
    assert metrics["train_p2d_reference_seconds"] == pytest.approx(2 * full.stage_seconds["train"])
    assert run.report.aer == pytest.approx(sum(run.report.stage_seconds.values()) / 2 / full.stage_seconds["train"])

    # what the steps before the checkpoint took is not known
    (tmp_path / "full" / "p2d_report.json").unlink()
    resumed = trainer(tmp_path / "full", changes={"p2d": False})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.report is None and not (tmp_path / "full" / "p2d_report.json").exists()


def test_a_run_without_p2d_takes_models_and_data_that_p2d_does_not(tmp_path):
    config_ = transformers.PersimmonConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    run = trainer(
        tmp_path,
        transformers.AutoModelForCausalLM.from_config(config_),
        pool=text(8).to_iterable_dataset(),
        changes={"p2d": False, "max_steps": 1},
    )
    run.train()
    assert (run.report.pool_rows, run.report.pool_tokens, run.report.n_heads) == (None, None, None)
    assert run.report.stage_tokens["train"] > 0


def test_rows_are_chosen_as_samples_and_packed_afterwards(tmp_path):
    changes = {"packing": True, "packing_strategy": "wrapped", "max_length": 40}
    run = trainer(tmp_path, changes=changes)
    samples = trainer(tmp_path).train_dataset["input_ids"][:]
    assert run.train_dataset["input_ids"][:] == samples  # one row a sample, none cut
    run.train()
    assert run.report.selected_rows == 16 and run.report.pool_rows == 32
    lengths = [len(ids) for ids in run.train_dataset["input_ids"]]
    assert sum(lengths) == run.report.selected_tokens and set(lengths[:-1]) == {40}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_target_drawn_from_rows_to_pack_is_cut(streamed, tmp_path):
    pool = Dataset.from_dict({"text": ["abc de " * n for n in (3, 40) * 8]})
    args = config(tmp_path, packing=True, packing_strategy="wrapped", max_length=30, max_steps=1)
    model, lengths = LAYOUTS["gpt2"].model(), []  # which has 64 positions
    run = P2DTrainer(
        model,
        args,
        train_dataset=pool.to_iterable_dataset() if streamed else pool,
        processing_class=tiny_tokenizer(),
    )
    assert max(len(row["input_ids"]) for row in run.train_dataset) > 64
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run.train()
    assert max(lengths) == 30 and run.head_scores.n_samples == 16


def test_of_a_target_drawn_from_rows_to_pack_only_what_counts_is_taken(tmp_path):
    rows = [{"prompt": "abc " * n, "completion": "de"} for n in (3, 40) * 8]
    changes = {"packing": True, "max_length": 20, "max_steps": 1, "reference_steps": 0}

    def run(pool):
        return P2DTrainer(
            tiny_model(), config(tmp_path, **changes), train_dataset=pool, processing_class=tiny_tokenizer()
        )

    some = run(Dataset.from_list(rows))
    some.train()
    assert some.head_scores.n_samples == 8
    with pytest.raises(
        ValueError, match=r"None of the 8 rows drawn from `train_dataset`.* `max_length`=20. Give a `target_d"
    ):
        run(Dataset.from_list(rows[1::2])).train()


def test_another_adapter_is_trained_as_it_is_on_the_selected_rows(tmp_path):
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    for given in ({"peft_config": lora}, {"model": get_peft_model(tiny_model(), lora)}):
        run = trainer(tmp_path, **given)
        before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
        assert before and all("lora_" in name for name in before)
        run.train()
        assert len(run.heads) == 3 and len(run.train_dataset) == 16
        after = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
        assert after.keys() == before.keys()
        assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("where", ["argument", "config"])
def test_heads_that_are_given_are_not_looked_for(where, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "localize_heads", None)
    heads = HeadSet([(1, 2)])
    given = (
        {"heads": heads}
        if where == "argument"
        else {"peft_config": HeadSparseConfig(heads=heads, task_type="CAUSAL_LM", target_modules=["q_proj"])}
    )
    run = trainer(tmp_path, **given)
    assert run.heads == heads
    run.train()
    names = [name.split(".head_sparse")[0] for name in deltas(run.model)]
    roles = "q" if where == "config" else "qkvo"
    assert [name.split(".layers.")[1] for name in names] == [f"1.self_attn.{role}_proj" for role in roles]
    assert run.report.localize_method is None and "localize" not in run.report.stage_seconds


def test_without_a_target_one_is_drawn_from_the_pool(tmp_path):
    def run():
        made = P2DTrainer(
            tiny_model(),
            config(tmp_path, target_samples=5),
            train_dataset=text(20),
            processing_class=tiny_tokenizer(),
        )
        made.train()
        assert made.head_scores.n_samples == 5
        return made

    assert run().train_dataset.to_list() == run().train_dataset.to_list()


@pytest.mark.parametrize("args_class", [SFTConfig, TrainingArguments, None])
def test_takes_any_training_arguments(args_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class QuietConfig(P2DConfig):
        """The defaults ask for hardware with bf16."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"bf16": False, "report_to": "none", **kwargs})

    monkeypatch.setattr(arguments, "P2DConfig", QuietConfig)
    model = tiny_model()
    model.config._name_or_path = "org/tiny"
    args = args_class and args_class(
        str(tmp_path / "out"), bf16=False, report_to="none", learning_rate=0.5, disable_tqdm=True, hub_token="secret"
    )
    run = P2DTrainer(model, args, train_dataset=text(20), processing_class=tiny_tokenizer())
    assert isinstance(run.args, P2DConfig) and run.args.data_ratio == 0.1
    if args is not None:
        assert (run.args.learning_rate, run.args.hub_token) == (0.5, "secret")
        assert type(args) is args_class
    else:
        assert run.args.output_dir == "tiny-P2D"


def test_what_a_user_edits_after_the_constructor_is_selected_from(tmp_path):
    run = trainer(tmp_path, changes={"data_ratio": 1.0})
    run.train_dataset = run.train_dataset.select(range(10))
    run.train()
    assert len(run.train_dataset) == 10 and run.report.pool_rows == 10


def test_the_adapter_is_saved_and_loads_with_the_choices_beside_it(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        run.model.eval()
        assert torch.equal(loaded(input_ids=ids).logits, run.model(input_ids=ids).logits)
        assert not torch.equal(tiny_model()(input_ids=ids).logits, loaded(input_ids=ids).logits)
    state = json.loads((tmp_path / "adapter" / "p2d_state.json").read_text())
    assert HeadSet.from_dict(state["heads"]) == run.heads and len(state["rows"]) == 16


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradient_checkpointing_trains_to_the_same_weights(reentrant, tmp_path):
    plain = trainer(tmp_path / "a")
    plain.train()
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    checkpointed = trainer(
        tmp_path / "b", changes={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    )
    checkpointed.train()
    for name, delta in deltas(plain.model).items():
        torch.testing.assert_close(deltas(checkpointed.model)[name], delta, rtol=1e-3, atol=1e-5)


def test_evaluates_before_and_after(tmp_path):
    run = trainer(tmp_path, eval_dataset=prompt_completion(6, seed=2))
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    assert len(run.eval_dataset) == 6


@pytest.mark.parametrize("stage", ["localize", "select", "reference"])
def test_the_model_is_what_it_was_after_an_exception_in_a_stage(stage, tmp_path, monkeypatch):
    run = trainer(tmp_path)
    before = snapshot(run.model)

    def boom(*args, **kwargs):
        raise RuntimeError("boom")

    if stage == "localize":
        monkeypatch.setattr("p2d_peft.heads.proxy.weight_shift", boom)
    elif stage == "select":
        monkeypatch.setattr("p2d_peft.selection.affinity.functional.cosine_similarity", boom)
    else:
        monkeypatch.setattr(run, "optimizer_cls_and_kwargs", (_FailingOptimizer, {"lr": 1.0}))
    with pytest.raises(RuntimeError, match="boom"):
        run.train()
    assert_unchanged(run.model, before)
    assert not run.model.is_gradient_checkpointing
    monkeypatch.undo()
    run.train()  # and it can be done again
    assert run.report is not None


def test_a_second_attempt_is_made_with_the_arguments_of_now(tmp_path, monkeypatch):
    run = trainer(tmp_path, changes={"max_steps": 1, "reference_steps": 0})
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(P2DDataSelector, "select", out_of_memory)
        run.train()
    run.args.per_device_eval_batch_size, run.args.data_ratio, run.args.scorer = 1, 0.25, "perplexity"
    run.train()
    assert run.selector.engine.batch_size == 1 and run.report.scorer == "perplexity" and len(run.train_dataset) == 8


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory.")


class _FailingOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        raise RuntimeError("boom")


def test_a_reference_of_another_pool_is_told_of_before_any_stage(tmp_path, monkeypatch):
    trainer(tmp_path / "full", pool=prompt_completion(20), changes={"p2d": False, "max_steps": 1}).train()
    run = trainer(tmp_path, changes={"reference_report": str(tmp_path / "full")})
    monkeypatch.setattr(choosing, "localize_heads", None)
    with pytest.raises(ValueError, match="is of a run on 20 rows, but `train_dataset` has 32"):
        run.train()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "cpu"],
)
def test_a_reference_that_does_not_fit_is_reported_and_left_out(error, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("p2d_peft.trainer.reference.estimate_reference", Mock(side_effect=error))
    run = trainer(tmp_path)
    with caplog.at_level("WARNING", logger="p2d_peft"):
        run.train()
    assert run.report.aer is None
    assert f"could not be estimated, so there will be no AER: {error}" in caplog.text


def test_another_error_of_the_reference_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr("p2d_peft.trainer.reference.estimate_reference", Mock(side_effect=RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path).train()


def test_bad_arguments_are_errors_of_the_constructor(tmp_path):
    with pytest.raises(TypeError, match="`selector` must be a `P2DDataSelector`, got str"):
        trainer(tmp_path, selector="affinity")
    with pytest.raises(TypeError, match=r"`target_dataset` must be a `datasets\.Dataset`, got list"):
        trainer(tmp_path, target=[{"text": "a"}])
    with pytest.raises(TypeError, match="`heads` must be a `HeadSet`, got list"):
        trainer(tmp_path, heads=[(0, 1)])
    with pytest.raises(ValueError, match=r"\(9, 0\), but layer 9 has no heads"):
        trainer(tmp_path, heads=HeadSet([(9, 0)]))
    with pytest.raises(ValueError, match="as `heads` or in `peft_config`, not both"):
        trainer(tmp_path, heads=HeadSet([(0, 0)]), peft_config=HeadSparseConfig(heads=[0]))
    model = tiny_model()
    with pytest.raises(ValueError, match="Pass `optimizer_cls_and_kwargs` instead"):
        trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None))


def test_a_model_without_supported_heads_is_refused_before_the_pool_is_tokenized(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("tokenized")

    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", never)
    config_ = transformers.PersimmonConfig(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"PersimmonForCausalLM"):
        trainer(tmp_path, model=transformers.AutoModelForCausalLM.from_config(config_))


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_the_stages_show_bars_where_the_training_does(disable_tqdm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    run = trainer(tmp_path, changes={"max_steps": 1, "reference_steps": 0, "disable_tqdm": disable_tqdm})
    capsys.readouterr()
    run.train()
    printed = capsys.readouterr().err
    for name in ("Localize (proxy)", "Select (affinity)"):
        assert (name in printed) != disable_tqdm
    assert logging.is_progress_bar_enabled()
