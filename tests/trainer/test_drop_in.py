"""What a script may do with `SFTTrainer`, done with `P2DTrainer`."""

import math
import time

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback

from p2d_peft import HeadSet, HeadSparseConfig, P2DDataSelector, P2DTrainer, efficiency
from p2d_peft.selection.engine import ScoringEngine
from p2d_peft.selection.policies import Quotas
from p2d_peft.trainer import choosing

from ..model_checks import snapshot
from ..quantized_models import load_quantized, save_base
from ..tiny_data import KINDS, TOOLS_TEMPLATE, conversational, prompt_completion, rows, text, with_tools
from ..tiny_models import tiny_model, tiny_tokenizer
from .plain_sft import assert_trains_as, plain_sft
from .test_p2d_trainer import assert_same_weights, config, deltas, trainer


OTHER_LOSSES = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"),
    reason="before TRL 1.15 SFTTrainer's chunked loss asks a model with another loss for what only its own gives",
)


HEADS = HeadSet([(0, 1), (2, 3)])


def short_run(tmp_path, changes=None, **kwargs):
    """A short run on given heads, without a reference."""
    return trainer(tmp_path, changes={"reference_steps": 0, "max_steps": 2, **(changes or {})}, heads=HEADS, **kwargs)


def test_with_given_heads_and_all_rows_it_is_sft_trainer_with_head_sparse_step_for_step(tmp_path):
    run = short_run(tmp_path, {"data_ratio": 1.0, "max_steps": -1})
    run.train()
    assert_trains_as(run, plain_sft(run, prompt_completion(32), peft_config=HeadSparseConfig(heads=HEADS)))
    assert len(run.state.log_history) == 17
    assert run.selector is None and run.report.scorer is None and run.report.selected_rows == 32
    assert set(run.report.stage_seconds) == {"train"}


def test_without_localizing_and_selecting_it_is_sft_trainer_with_ones_own_adapter(tmp_path):
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    run = trainer(tmp_path, changes={"data_ratio": 1.0}, peft_config=lora)
    run.train()
    assert_trains_as(run, plain_sft(run, prompt_completion(32), peft_config=lora))
    assert run.heads is None and set(run.report.stage_seconds) == {"train"}


def test_the_stages_leave_no_trace_in_the_training(tmp_path):
    # noise tells whether random numbers were drawn before
    run = trainer(tmp_path, changes={"neftune_noise_alpha": 5.0, "reference_steps": 2})
    given = run.args.to_dict()
    run.train()
    assert run.args.to_dict() == given
    assert set(run.report.stage_seconds) == {"localize", "select", "train"} and run.report.aer > 0
    rows = prompt_completion(32).select(run._p2d_state.rows)
    plain = plain_sft(run, rows, peft_config=HeadSparseConfig(heads=run.heads, task_type="CAUSAL_LM"))
    assert_trains_as(run, plain)
    ours, theirs = (snapshot(t.model.get_base_model()) for t in (run, plain))
    for part in ("requires_grad", "training", "hooks", "config", "attention"):
        assert ours[part] == theirs[part], part


@pytest.mark.parametrize("packing", [{}, {"packing": True, "packing_strategy": "wrapped", "max_length": 30}])
def test_evaluation_is_that_of_sft_trainer_before_in_and_after_the_training(packing, tmp_path):
    given = {
        "eval_dataset": {"train": prompt_completion(6, seed=2), "other": prompt_completion(5, seed=3)},
        "compute_metrics": lambda found: {"right": float((found.predictions == found.label_ids).mean())},
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }
    # all rows, so that what SFTTrainer trains on is known before; the loss of which every version of TRL has the logits
    changes = {"eval_strategy": "steps", "eval_steps": 1, "data_ratio": 1.0, "loss_type": "nll", **packing}
    run = short_run(tmp_path, changes, **given)
    plain = plain_sft(run, prompt_completion(32), peft_config=HeadSparseConfig(heads=HEADS), **given)
    names = {f"eval_{name}_{what}" for name in ("train", "other") for what in ("loss", "right")}
    evaluated = []
    for trained in (run, plain):
        metrics = [trained.evaluate(), trained.train().metrics, trained.evaluate()]
        logged = [entry for entry in trained.state.log_history if names & entry.keys()]
        predicted = trained.predict(trained.eval_dataset["other"])
        entries = [metrics[0], metrics[2], *logged]
        evaluated.append(
            (
                [{name: entry[name] for name in names & entry.keys()} for entry in entries],
                predicted.predictions.tolist(),
            )
        )
    (ours, our_predictions), (theirs, their_predictions) = evaluated
    assert ours == theirs and names <= ours[0].keys() and ours[0] != ours[1]
    assert our_predictions == their_predictions


class Tracker(TrainerCallback):
    """What trackers are: callbacks that get each entry of the log."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append((state.global_step, dict(logs)))


def test_trackers_get_the_aer_with_the_trainings_own_last_entry(tmp_path):
    tracker, plain_tracker = Tracker(), Tracker()
    run = trainer(tmp_path, callbacks=[tracker])
    run.train()
    rows = prompt_completion(32).select(run._p2d_state.rows)
    plain_sft(run, rows, peft_config=HeadSparseConfig(heads=run.heads), callbacks=[plain_tracker]).train()
    assert [step for step, _ in tracker.entries] == [step for step, _ in plain_tracker.entries]
    for (_, ours), (_, theirs) in zip(tracker.entries[:-1], plain_tracker.entries[:-1], strict=True):
        assert ours.keys() == theirs.keys()
    last, plain_last = tracker.entries[-1][1], plain_tracker.entries[-1][1]
    assert last["train_p2d_aer"] == run.report.aer and "train_runtime" in last
    assert {name for name in last if not name.startswith("train_p2d_")} == plain_last.keys()


@pytest.mark.parametrize("kind", ["text", "prompt_completion", "conversational"])
def test_a_stream_gives_the_rows_that_its_list_gives(kind, tmp_path):
    pool, target = KINDS[kind](24), KINDS[kind](4, seed=1)
    changes = {"max_steps": 3, "shuffle_dataset": False}
    whole = trainer(tmp_path / "a", pool=pool, target=target, changes=changes)
    whole.train()
    stream = trainer(tmp_path / "b", pool=pool.to_iterable_dataset(), target=target, changes=changes)
    stream.train()
    assert stream.heads == whole.heads
    assert isinstance(stream.train_dataset, Dataset)
    assert stream.train_dataset["input_ids"][:] == whole.train_dataset["input_ids"][:]
    assert (stream.report.pool_rows, stream.report.pool_tokens) == (24, whole.report.pool_tokens)
    assert stream.report.selected_tokens == whole.report.selected_tokens
    assert stream.report.aer is not None  # from steps on its first rows
    assert_same_weights(deltas(stream.model), deltas(whole.model))


def test_all_of_a_stream_is_trained_on_as_it_comes_and_a_target_is_drawn_from_it(tmp_path):
    pool = text(24).to_iterable_dataset()
    changes = {"max_steps": 2, "data_ratio": 1.0, "target_samples": 5}
    run = P2DTrainer(tiny_model(), config(tmp_path, **changes), train_dataset=pool, processing_class=tiny_tokenizer())
    run.train()
    assert run.head_scores.n_samples == 5 and not isinstance(run.train_dataset, Dataset)
    assert (run.report.pool_rows, run.report.aer, run.report.selected_rows) == (None, None, None)


@pytest.mark.parametrize("how", ["object", "name"])
@pytest.mark.parametrize("method", ["random", "gate"])
def test_a_quantized_model_gets_its_heads_without_its_weights(method, how, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = str(save_base(tmp_path / "base"))
    model, quantization = load_quantized(folder, "nf4"), None
    if how == "name":
        model, quantization = folder, model.config.quantization_config
    changes = {"max_steps": 1, "reference_steps": 0}
    given = {"model": model, "quantization_config": quantization, "changes": changes}
    with pytest.raises(ValueError, match="'taylor' needs floating-point weights, and `model` is quantized"):
        trainer(tmp_path, **{**given, "changes": {**changes, "localize_method": "taylor"}})
    run = trainer(tmp_path, **{**given, "changes": {**changes, "localize_method": method}})
    run.train()
    assert run.report.localize_method == method
    assert "Linear4bit" in repr(run.model) and not run.model.get_base_model()._hf_peft_config_loaded
    trained = {name: p.dtype for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained.keys() == deltas(run.model).keys() and set(trained.values()) == {torch.float32}
    assert all((delta != 0).any() for delta in deltas(run.model).values())


def test_a_model_with_head_sparse_on_it_is_trained_as_it_is_and_its_heads_select(tmp_path):
    model = get_peft_model(tiny_model(), HeadSparseConfig(heads=HEADS, target_modules=["o_proj"]))
    run = trainer(tmp_path, model=model, changes={"max_steps": 1, "reference_steps": 0})
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert run.heads == HEADS
    run.train()
    assert run.model is model and {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert run.report.localize_method is None


class TestSelector:
    def pool(self):
        return Dataset.from_list(rows(20))  # with the column `task`

    def test_ones_own_selects_with_its_heads_and_policies(self, tmp_path):
        model = tiny_model()
        selector = P2DDataSelector(
            model,
            tiny_tokenizer(),
            heads=HEADS,
            target=prompt_completion(4, seed=1),
            num_samples=6,
            policies=[Quotas("task", {"copy": 0.5, "count": 0.5})],
        )
        run = trainer(tmp_path, model, pool=self.pool(), selector=selector, changes={"reference_steps": 0})
        run.train()
        assert run.heads == HEADS and run.report.localize_method is None
        assert sorted(run.train_dataset["task"]) == ["copy"] * 3 + ["count"] * 3
        assert run.selector is selector and run.report.selected_rows == 6

    def test_one_with_another_tokenizer_reads_the_text(self, tmp_path):
        other = tiny_tokenizer()
        other.add_tokens(["copy"])  # other ids for the same text
        small = tiny_model(vocab_size=len(other))
        selector = P2DDataSelector(small, other, scorer="perplexity", ratio=0.25)
        expected = [row["prompt"] for row in selector.select(self.pool())]
        run = short_run(tmp_path, pool=self.pool(), selector=selector)
        run.train()
        assert run.train_dataset["prompt"][:] == expected

    def test_one_with_another_tokenizer_does_not_see_our_end_token(self, tmp_path):
        other = tiny_tokenizer()
        other.add_tokens(["copy"])
        selector = P2DDataSelector(tiny_model(vocab_size=len(other)), other, scorer="perplexity", ratio=0.25)
        texts = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows(20)])
        for pool, column in ((self.pool(), "completion"), (texts, "text")):
            run = short_run(tmp_path, pool=pool, target=pool, selector=selector)
            assert run.train_dataset[column][0] == pool[column][0] + run.processing_class.eos_token
            seen = choosing.raw_where_another_tokenizer_reads(selector, run, run.train_dataset)
            assert seen[column][:] == pool[column][:] and not {"input_ids", "labels"} & set(seen.column_names)

    def test_heads_of_one_with_another_model_are_not_ours(self, tmp_path):
        larger = tiny_model(num_hidden_layers=5)
        selector = P2DDataSelector(
            larger, tiny_tokenizer(), heads=HeadSet([(4, 1)]), target=prompt_completion(4, seed=1)
        )
        expected = selector.select(self.pool())
        run = trainer(tmp_path, pool=self.pool(), selector=selector, changes={"reference_steps": 0, "max_steps": 1})
        run.train()
        assert run.report.localize_method == "proxy" and max(run.heads.layers) < 3
        assert run.selector is selector and run.train_dataset["prompt"][:] == expected["prompt"][:]


def test_a_model_that_is_evaluated_in_half_precision_is_where_it_trains_from_the_first_stage(tmp_path, monkeypatch):
    run = trainer(tmp_path, changes={"bf16_full_eval": True, "use_cpu": True, "reference_steps": 0, "max_steps": 1})
    calls = []
    monkeypatch.setattr(run, "_move_model_to_device", lambda model, device: calls.append(device))
    localize = choosing.localize_heads
    monkeypatch.setattr(choosing, "localize_heads", lambda *a, **k: (calls.append("localize"), localize(*a, **k))[1])
    run.train()
    assert calls[:2] == [run.args.device, "localize"]


def test_a_prompt_is_learnt_on_rows_that_were_scored_without_it(tmp_path):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    run = trainer(tmp_path, peft_config=prompt, changes={"max_steps": 1})
    run.train()
    before = trainer(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]), changes={"max_steps": 1})
    before.train()  # an adapter that begins as nothing scores as the model does
    assert run.heads == before.heads and run.train_dataset["input_ids"][:] == before.train_dataset["input_ids"][:]
    assert run.report.reference_seconds > 0


def test_tokens_of_a_cloned_chat_template_are_learnt(tmp_path):
    source = tiny_tokenizer()
    source.add_tokens(["<|new|>"], special_tokens=True)
    source.save_pretrained(tmp_path / "source")
    changes = {"chat_template_path": str(tmp_path / "source"), "max_steps": 1, "reference_steps": 0}
    run = trainer(tmp_path, pool=conversational(8), target=conversational(4, seed=1), changes=changes)
    run.train()
    adapter = run.model.peft_config["default"]
    new = run.processing_class.convert_tokens_to_ids("<|new|>")
    assert new in adapter.trainable_token_indices["embed_tokens"] and adapter.modules_to_save == ["lm_head"]
    assert any("trainable_tokens" in name for name, p in run.model.named_parameters() if p.requires_grad)


def test_scores_of_a_run_that_died_are_used_charged_and_then_removed(tmp_path, monkeypatch):
    folder = tmp_path / choosing.SCORES_FOLDER
    died = trainer(tmp_path, changes={"max_steps": 1})
    real_time, waited = time.perf_counter, []
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: real_time() + sum(waited))
    score_shard = ScoringEngine._score_shard
    monkeypatch.setattr(ScoringEngine, "_score_shard", lambda *args: waited.append(1_000.0) or score_shard(*args))
    monkeypatch.setattr(choosing, "find_reference", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        died.train()
    monkeypatch.undo()
    assert list(folder.rglob("*.arrow"))
    again = trainer(tmp_path, changes={"max_steps": 1})
    again.train()
    assert again.selector.report.n_resumed == 32 and not folder.exists()
    assert 1_000 < again.report.stage_seconds["select"] < 1_100
    fresh = trainer(tmp_path / "fresh", changes={"max_steps": 1})
    fresh.train()
    assert again.train_dataset.to_list() == fresh.train_dataset.to_list()
    assert fresh.selector.report.n_resumed == 0
    assert fresh.report.stage_seconds["select"] < 1_000
    assert fresh.report.stage_tokens == again.report.stage_tokens


def test_an_attempt_that_failed_is_not_charged_twice(tmp_path, monkeypatch):
    run = trainer(tmp_path, changes={"max_steps": 1})
    monkeypatch.setattr(choosing, "find_reference", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    monkeypatch.undo()
    before = run._clock.costs
    run.train()
    assert run.report.stage_tokens == {**before.tokens, "train": run.report.stage_tokens["train"]}


class Watch(TrainerCallback):
    def __init__(self):
        self.events, self.models = [], []

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self.events.append(("begin", state.max_steps, len(train_dataloader.dataset), state.log_history[:]))
        self.models.append(model)

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append(("evaluate", state.global_step))


def test_callbacks_see_one_training_on_the_selected_rows(tmp_path):
    watch, eval_sets = Watch(), {"train": prompt_completion(6, seed=2), "other": prompt_completion(4, seed=3)}
    changes = {"eval_strategy": "epoch", "num_train_epochs": 1, "packing": True, "packing_strategy": "wrapped"}
    changes |= {"max_length": 30, "eval_packing": False}
    run = trainer(tmp_path, changes=changes, callbacks=[watch], eval_dataset=eval_sets)
    assert {name: len(rows) for name, rows in run.eval_dataset.items()} == {"train": 6, "other": 4}
    assert "eval_train_loss" in run.evaluate()
    watch.events.clear()
    run.train()
    steps = math.ceil(len(run.train_dataset) / 4)
    begin, *others = watch.events
    assert begin[:3] == ("begin", steps, len(run.train_dataset)) and not any("loss" in entry for entry in begin[3])
    assert [event for event in others if event[0] == "step"] == [("step", n + 1) for n in range(steps)]
    assert watch.models[0] is run.model
    assert run.predict(run.eval_dataset["other"]).metrics["test_loss"] > 0


def test_the_best_checkpoint_comes_back_and_old_ones_go(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    changes |= {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 1.0, "logging_steps": 5}
    run = trainer(
        tmp_path,
        changes={**changes, "reference_steps": 0, "greater_is_better": False},
        heads=HEADS,
        eval_dataset=prompt_completion(6, seed=2),
        callbacks=[EarlyStoppingCallback(2)],
    )
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.state.global_step == min(losses.index(min(losses)) + 1 + 2, 5)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2
    best = PeftModel.from_pretrained(tiny_model(), run.state.best_model_checkpoint)
    assert_same_weights(deltas(best), deltas(run.model))


@pytest.mark.parametrize(
    "changes",
    [
        {"neftune_noise_alpha": 5.0},
        {"loss_type": "dft"},
        {"loss_type": "chunked_nll"},  # what `nll`, the default, was called
        {"padding_free": True, "max_length": None},
        {"packing": True, "packing_strategy": "bfd", "max_length": 30},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 30},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 30},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 1},
        pytest.param({"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}, marks=OTHER_LOSSES),
        {"bf16": True, "use_cpu": True},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_options_of_sft_trainer_work_as_there(changes, tmp_path):
    run = short_run(tmp_path, changes)
    run.train()
    assert all((delta != 0).any() and delta.isfinite().all() for delta in deltas(run.model).values())
    rows = prompt_completion(32).select(run._p2d_state.rows)
    assert_trains_as(run, plain_sft(run, rows, peft_config=HeadSparseConfig(heads=HEADS, task_type="CAUSAL_LM")))
    merged = run.model.merge_and_unload()
    names = {name for name, module in merged.named_modules() if module._forward_hooks or module._forward_pre_hooks}
    assert names <= {"model.embed_tokens"}  # where reentrant checkpoints need an input with a gradient


def test_a_batch_size_that_fits_is_found_for_localizing_too(tmp_path):
    model = tiny_model()

    def has_room_for_two(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model.register_forward_pre_hook(has_room_for_two, with_kwargs=True)
    changes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "max_steps": 1}
    run = trainer(tmp_path, model=model, changes={**changes, "auto_find_batch_size": True})
    run.train()
    assert run._train_batch_size == 2 and run.report.localize_method == "proxy"
    assert run.head_scores.n_samples == 6
    with pytest.raises(torch.OutOfMemoryError):
        trainer(tmp_path, model=model, changes=changes).train()


@OTHER_LOSSES
def test_losses_of_ones_own(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(num_items_in_batch)
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        return 2 * total / num_items_in_batch

    run = short_run(tmp_path, {"gradient_accumulation_steps": 2}, compute_loss_func=loss)
    run.train()
    assert len(seen) == 4 and all(count > 0 for count in seen)
    rows = prompt_completion(32).select(run._p2d_state.rows)
    adapter = HeadSparseConfig(heads=HEADS)
    assert_trains_as(run, plain_sft(run, rows, peft_config=adapter, compute_loss_func=loss))


@pytest.mark.parametrize("as_json", [False, True])
def test_assistant_only_loss_and_tools(as_json, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    run = P2DTrainer(
        tiny_model(),
        config(tmp_path, assistant_only_loss=True, max_steps=1, reference_steps=0),
        train_dataset=with_tools(12, as_json=as_json),
        target_dataset=with_tools(4, seed=1, as_json=as_json),
        processing_class=tokenizer,
    )
    run.train()
    chosen = run._p2d_state.rows
    assert len(chosen) == 6
    for row, task in zip(run.train_dataset, [rows(12)[number]["task"] for number in chosen], strict=True):
        assert tokenizer.decode(row["input_ids"]).startswith(f"tool {task}tool user ")
        answer = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(answer) == row["messages"][1]["content"] + "</s>"
    adapter = HeadSparseConfig(heads=run.heads, task_type="CAUSAL_LM")
    given = {"peft_config": adapter, "processing_class": tokenizer}
    assert_trains_as(run, plain_sft(run, with_tools(12, as_json=as_json).select(chosen), **given))
