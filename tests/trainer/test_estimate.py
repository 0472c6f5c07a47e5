import random
import time

import numpy as np
import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from p2d_peft import HeadSet, HeadSparseConfig, P2DDataSelector
from p2d_peft.efficiency import Reference
from p2d_peft.step_times import StepTimes
from p2d_peft.trainer import estimate as module

from ..model_checks import assert_unchanged, snapshot
from ..tiny_data import prompt_completion, text
from ..tiny_models import tiny_model, tiny_tokenizer
from .test_p2d_trainer import assert_same_weights, deltas, trainer


def modules(model):
    return [(name, child) for name, child in model.named_modules(remove_duplicate=False)]


def random_states():
    return random.getstate(), str(np.random.get_state())


def test_a_training_after_it_is_the_training_without_it(tmp_path):
    plain, run = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    model = run.model
    before, tree, states, attributes = snapshot(model), modules(model), random_states(), dict(vars(run))
    estimate = run.estimate()
    assert_unchanged(model, before)
    assert all(a is b for (_, a), (_, b) in zip(tree, modules(model), strict=True))
    assert random_states() == states and "peft_config" not in vars(model)
    assert vars(run).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(run).items())
    assert run.state.log_history == [] and not list((tmp_path / "b").glob("*"))

    assert set(estimate.stage_seconds) == set(estimate.stage_peak_memory) == {"localize", "select", "train"}
    assert min(estimate.stage_seconds.values()) > 0 and min(estimate.stage_peak_memory.values()) > 1e6
    assert (estimate.pool_rows, estimate.selected_rows, estimate.epochs) == (32, 16, 2)
    assert estimate.reference_source == "estimated" and estimate.aer > 0
    assert estimate.train_relative_error >= 0 and estimate.measured_seconds > 0

    plain.train()
    run.train()
    assert run.heads == plain.heads
    assert run.train_dataset.to_list() == plain.train_dataset.to_list()
    assert_same_weights(deltas(run.model), deltas(plain.model))
    with pytest.raises(ValueError, match=r"`estimate\(\)` is for before `train\(\)`"):
        run.estimate()


@pytest.mark.parametrize("place", ["train", "localize", "select", "reference"])
def test_everything_is_put_back_after_an_exception(place, tmp_path, monkeypatch):
    run = trainer(tmp_path)
    before, tree = snapshot(run.model), modules(run.model)

    def boom(*args, **kwargs):
        raise RuntimeError("boom")

    patched = {
        "train": ("p2d_peft.step_times.settle", lambda **_: boom()),
        "localize": ("p2d_peft.heads.proxy.weight_shift", boom),
        "select": ("p2d_peft.selection.affinity.similarity_to_target", boom),
        "reference": ("p2d_peft.trainer.reference.estimate_reference", boom),
    }
    monkeypatch.setattr(*patched[place])
    with pytest.raises(RuntimeError, match="boom"):
        run.estimate()
    assert_unchanged(run.model, before)
    assert all(a is b for (_, a), (_, b) in zip(tree, modules(run.model), strict=True))
    assert not run.model.is_gradient_checkpointing


def watch_training(monkeypatch, run):
    """What is trained, and on which batches, while the steps are timed."""
    seen = {}
    real = module.time_steps

    def spy(parameters, batches, training_loss, make_optimizer):
        seen["layers"] = {
            name: layer for name, layer in run.model.named_modules() if isinstance(layer, BaseTunerLayer)
        }
        seen.update(parameters=parameters, batches=batches, optimizer=make_optimizer(parameters))
        return real(parameters, batches, training_loss, make_optimizer)

    monkeypatch.setattr(module, "time_steps", spy)
    return seen


@pytest.mark.parametrize("heads", [None, HeadSet([(1, 2)])])
def test_an_adapter_on_as_many_heads_is_timed_on_the_longest_rows_and_on_random_ones(heads, tmp_path, monkeypatch):
    config = HeadSparseConfig(heads=heads, task_type="CAUSAL_LM", target_modules=["q_proj"])
    run = trainer(tmp_path, peft_config=config, changes={"scorer": "random", "learning_rate": 0.25})
    seen = watch_training(monkeypatch, run)
    estimate = run.estimate()
    assert ("localize" in estimate.stage_seconds) == (heads is None)
    head_dim = run.model.config.hidden_size // run.model.config.num_attention_heads
    size = head_dim * run.model.config.hidden_size
    assert sum(parameter.numel() for parameter in seen["parameters"]) == (3 if heads is None else 1) * size
    assert all("q_proj" in name for name in seen["layers"])
    assert heads is None or [name.split(".layers.")[1] for name in seen["layers"]] == ["1.self_attn.q_proj"]
    assert seen["optimizer"].defaults["lr"] == 0.25
    lengths = sorted(map(len, run.train_dataset["input_ids"]))[-4:]
    assert sorted(seen["batches"][0]["attention_mask"].sum(1).tolist()) == lengths
    assert [len(batch["input_ids"]) for batch in seen["batches"]] == [4] * 4
    assert config.heads == (None if heads is None else {1: [2]})


def test_another_adapter_is_timed_where_it_is(tmp_path, monkeypatch):
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    run = trainer(tmp_path, peft_config=lora)
    before = snapshot(run.model)
    seen = watch_training(monkeypatch, run)
    run.estimate()
    assert_unchanged(run.model, before)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    assert len(trained) > 0 and all(a is b for a, b in zip(trained, seen["parameters"], strict=True))


@pytest.mark.parametrize("changes", [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True},
    {"packing": True, "packing_strategy": "wrapped", "max_length": 40},
    {"per_device_train_batch_size": 1, "localize_method": "agreement"},
    {"reference_steps": 0, "scorer": "bm25", "localize_method": "magnitude"},
])  # fmt: skip
def test_other_trainings_are_estimated_too(changes, tmp_path):
    run = trainer(tmp_path, changes=changes)
    before = snapshot(run.model)
    estimate = run.estimate()
    assert_unchanged(run.model, before)
    assert (estimate.aer is None) == (changes.get("reference_steps") == 0)


def test_a_pool_of_one_row_is_estimated(tmp_path):
    estimate = trainer(tmp_path, pool=prompt_completion(1), changes={"reference_seconds": 5.0}).estimate()
    assert (estimate.selected_rows, estimate.aer) == (1, sum(estimate.stage_seconds.values()) / 5.0)


@pytest.mark.parametrize("max_steps", [-1, 2])
def test_what_was_timed_is_scaled_to_the_run(max_steps, tmp_path, monkeypatch):
    """3 s for each optimizer step, 0.25 s for each token."""
    run = trainer(tmp_path, changes={"max_steps": max_steps, "scorer": "random"})
    monkeypatch.setattr(module, "_training_steps", lambda *_: StepTimes([2.0, 3.0], [1.0, 5.0], [12, 8]))
    monkeypatch.setattr(module, "_localize_seconds", lambda *_: 7.0)
    monkeypatch.setattr(module, "find_reference", lambda *_: Reference(1000.0, "estimated", 0.2))
    estimate = run.estimate()
    epochs = 2 if max_steps == -1 else 2 / 4  # 16 rows, 4 a step
    tokens = sum(map(len, run.train_dataset["input_ids"])) / 2
    assert estimate.stage_seconds["train"] == pytest.approx(epochs * (tokens * 0.25 + 4 * 3))
    assert estimate.stage_seconds["localize"] == 7
    assert (estimate.reference_seconds, estimate.reference_relative_error) == (1000 * epochs, 0.2)


def test_localizing_is_what_comes_once_and_what_comes_for_each_token(tmp_path, monkeypatch):
    run = trainer(tmp_path, target=prompt_completion(24, seed=1))
    now, calls = [0.0], []
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def localize(model, batches, method, seed):
        calls.append(len(batches))
        now[0] += 30 + 2 * sum(int(batch["attention_mask"].sum()) for batch in batches)

    monkeypatch.setattr(module, "localize_heads", localize)
    tokens = sum(map(len, run.target_dataset["input_ids"]))
    assert module._localize_seconds(run, run.target_dataset) == pytest.approx(30 + 2 * tokens)
    assert sorted(calls) == [1, 3]
    few = run.target_dataset.select(range(13))
    assert module._localize_seconds(run, few) == pytest.approx(30 + 2 * sum(map(len, few["input_ids"])))
    assert calls[2:] == [4]


@pytest.mark.parametrize(("size", "rows"), [({"num_samples": 5}, 5), ({"ratio": 0.25}, 8), ({"max_tokens": 60}, None)])
def test_a_selector_says_how_many_rows(size, rows, tmp_path):
    selector = P2DDataSelector(tiny_model(), tiny_tokenizer(), scorer="perplexity", **size)
    run = trainer(tmp_path, selector=selector, changes={"reference_steps": 0})
    if rows is None:
        rows = round(60 / sum(map(len, run.train_dataset["input_ids"])) * 32)
    assert run.estimate().selected_rows == rows


def test_a_training_on_all_rows_selects_nothing(tmp_path):
    estimate = trainer(tmp_path, changes={"data_ratio": 1.0, "reference_steps": 0}).estimate()
    assert set(estimate.stage_seconds) == {"localize", "train"} and estimate.selected_rows == 32


def test_a_stream_is_refused(tmp_path):
    run = trainer(tmp_path, pool=text(8).to_iterable_dataset(), changes={"max_steps": 1})
    with pytest.raises(ValueError, match="but `train_dataset` is a IterableDataset"):
        run.estimate()


def test_without_p2d_there_is_nothing_to_estimate(tmp_path):
    with pytest.raises(ValueError, match="but `p2d` is False"):
        trainer(tmp_path, changes={"p2d": False}).estimate()


def test_time_goes_by():
    result, peak = module._watched(lambda: time.sleep(0.01) or 5)
    assert result == 5 and peak > 1e6
