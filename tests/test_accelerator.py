"""
What runs on an accelerator gives what it gives on the CPU. The other tests hide accelerators; to run these,

    CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_accelerator.py
"""

import copy
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
import transformers
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model

from p2d_peft import HeadSet, HeadSparseConfig, P2DDataSelector
from p2d_peft.heads import localize_heads
from p2d_peft.heads.localize import LocalizeMethod
from p2d_peft.selection import less
from p2d_peft.selection.selector import ScorerName

from .model_checks import assert_unchanged, mixed_state, snapshot
from .quantized_models import SCHEMES, SIZES, save_base
from .tiny_data import prompt_completion
from .tiny_models import FEW, LAYOUTS, random_batch, tiny_model, tiny_tokenizer
from .trainer.test_p2d_trainer import assert_same_weights, deltas, trainer


DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = [
    pytest.mark.skipif(DEVICE is None, reason="there is no accelerator, or CUDA_VISIBLE_DEVICES hides it"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:.*MatMul8bitLt"),
]
HEADS = HeadSet([(0, 1), (1, 0), (1, 3)])
METHODS, SCORERS = get_args(LocalizeMethod), get_args(ScorerName)
# their scores are differences of numbers a hundred times as large
COARSE = ("ablation", "trained")


@pytest.fixture(autouse=True)
def _cheap_less(monkeypatch):
    for name, value in (("RANK", 2), ("N_EPOCHS", 1), ("N_FEATURES", 512)):
        monkeypatch.setattr(less, name, value)


def moved(batch):
    return {key: value.to(DEVICE) for key, value in batch.items()}


def device_rng():
    return torch.get_rng_state() if DEVICE.type == "cpu" else torch.get_device_module(DEVICE).get_rng_state()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "t5"])
def test_heads_get_the_scores_that_they_get_on_the_cpu(name, method):
    model = LAYOUTS[name].model()
    batches = [random_batch(rows=3, padding=3)]
    expected = localize_heads(copy.deepcopy(model), batches, method=method).values
    model = model.to(DEVICE)
    before, rng = snapshot(model), device_rng()
    # batches may lie on either side
    for found in (
        localize_heads(model, batches, method=method),
        localize_heads(model, [moved(b) for b in batches], method),
    ):
        assert found.values.device.type == "cpu"
        atol = 1e-5 if method in COARSE else 1e-7
        torch.testing.assert_close(found.values, expected, rtol=1e-2 if method == "proxy" else 2e-3, atol=atol)
    assert_unchanged(model, before)
    assert torch.equal(device_rng(), rng)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("scorer", SCORERS)
def test_rows_get_the_scores_that_they_get_on_the_cpu(scorer, dtype):
    pool, target = prompt_completion(), prompt_completion(4, seed=1)

    def selector(model):
        return P2DDataSelector(model, tiny_tokenizer(), heads=HEADS, target=target, scorer=scorer, ratio=0.25, seed=3)

    on_cpu = selector(mixed_state(tiny_model()))
    expected = on_cpu.select(pool)
    model = mixed_state(tiny_model()).to(DEVICE)
    before, rng = snapshot(model), device_rng()
    on_device = selector(model)
    with nullcontext() if dtype is None else torch.autocast(DEVICE.type, dtype):
        chosen = on_device.select(pool)
    assert_unchanged(model, before)
    assert torch.equal(device_rng(), rng)
    if dtype is None:
        torch.testing.assert_close(on_device.scores, on_cpu.scores, rtol=2e-3, atol=1e-5)
        assert on_device.rows == on_cpu.rows
        assert chosen.remove_columns("p2d_score").to_list() == expected.remove_columns("p2d_score").to_list()
    else:
        assert on_device.scores.isfinite().all() and len(chosen) == len(expected)


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("name", FEW)
def test_deltas_are_trained_merged_and_saved_as_on_the_cpu(name, r, tmp_path):
    def trained(device):
        # made on the CPU, since each device draws numbers of its own
        model = get_peft_model(tiny_model(name), HeadSparseConfig(heads=HEADS, r=r)).to(device).train()
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, losses = torch.optim.SGD(weights, lr=0.5), []
        for step in range(4):
            loss = model(**{key: value.to(device) for key, value in random_batch(seed=step).items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return model.eval(), losses

    (expected, losses), (model, losses_there) = trained("cpu"), trained(DEVICE)
    assert losses_there == pytest.approx(losses, rel=1e-4)
    batch = random_batch()
    with torch.no_grad():
        logits = model(**moved(batch)).logits
        torch.testing.assert_close(logits.cpu(), expected(**batch).logits, rtol=1e-3, atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path)
        assert_same_weights(deltas(loaded), deltas(model))
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**moved(batch)).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"activation_offloading": True}]
)
def test_a_run_finds_the_device_by_itself(changes, tmp_path):
    run = trainer(tmp_path, changes={"save_strategy": "epoch", **changes}, eval_dataset=prompt_completion(4, seed=2))
    run.train()
    assert {parameter.device.type for parameter in run.model.parameters()} == {DEVICE.type}
    assert all((delta != 0).any() and delta.dtype == torch.float32 for delta in deltas(run.model).values())
    report = run.report
    assert report.device == DEVICE.type and report.aer > 0
    assert report.peak_memory_kind == ("accelerator" if hasattr(torch.accelerator, "memory_allocated") else "process")
    assert set(report.stage_peak_memory) == {"localize", "select", "train"}
    assert all(peak > 0 for peak in report.stage_peak_memory.values())
    assert torch.tensor(run.evaluate()["eval_loss"]).isfinite()
    assert PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-4").peft_config


def test_a_run_chooses_what_it_chooses_on_the_cpu(tmp_path):
    runs = []
    for changes in ({"use_cpu": True}, {}):  # one after the other, since the device is the process's
        runs.append(trainer(tmp_path / f"{len(runs)}", changes=changes))
        runs[-1].train()
    on_cpu, on_device = runs
    assert on_device.heads == on_cpu.heads and on_device.selector.rows == on_cpu.selector.rows
    for name, delta in deltas(on_cpu.model).items():
        # AdamW divides by what may be near zero
        difference = (deltas(on_device.model)[name] - delta).abs()
        assert difference.mean() < 0.05 * delta.abs().mean(), name


def test_a_run_that_is_resumed_ends_as_one_that_was_not_interrupted(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 3, "full_determinism": True}
    whole = trainer(tmp_path / "whole", changes=changes)
    whole.train()
    again = trainer(tmp_path / "again", changes=changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_weights(deltas(again.model), deltas(whole.model))


def test_a_reference_is_measured_on_the_device(tmp_path):
    full = trainer(tmp_path / "full", changes={"p2d": False}, target=None)
    full.train()
    run = trainer(tmp_path / "p2d", changes={"reference_report": str(tmp_path / "full")})
    run.train()
    assert run.report.reference_source == "measured" and run.report.aer > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights(scheme, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_base(tmp_path / "base")

    def load():
        config = transformers.BitsAndBytesConfig(**SCHEMES[scheme])
        return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=0)

    model = load()
    exact = tiny_model(**SIZES)
    scores = localize_heads(model, [random_batch(rows=4)], method="gate").values
    wanted = localize_heads(exact, [random_batch(rows=4)], method="gate").values
    assert torch.corrcoef(torch.stack([scores.flatten(), wanted.flatten()]))[0, 1] > 0.8
    run = trainer(tmp_path / "run", model, changes={"localize_method": "gate", "num_train_epochs": 4, "save_steps": 1})
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all((delta != 0).any() for delta in deltas(run.model).values())
    batch = moved(random_batch())
    with torch.no_grad():
        trained = run.model.eval()(**batch).logits
        run.save_model()
        loaded = PeftModel.from_pretrained(load(), tmp_path / "run")
        torch.testing.assert_close(loaded(**batch).logits, trained, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scorer", ["affinity", "perplexity", "gradient", "icl"])
def test_a_model_of_which_a_part_waits_on_the_cpu(scorer):
    def select(model):
        scores = localize_heads(model, [random_batch(padding=2)], method="gate")
        selector = P2DDataSelector(
            model, tiny_tokenizer(), heads=HEADS, target=prompt_completion(4, seed=1), scorer=scorer
        )
        return scores.values, selector.score(prompt_completion())

    expected = select(tiny_model())
    device = torch.device(DEVICE.type, 0)
    places = {
        "model.embed_tokens": device,
        "model.layers.0": device,
        "model.layers.1": "cpu",
        "model.layers.2": device,
    }
    places |= {"model.norm": device, "model.rotary_emb": device, "lm_head": device}
    model = dispatch_model(tiny_model(), places, main_device=device, force_hooks=True)
    for found, wanted in zip(select(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("r", [None, 2])
def test_compiled_for_the_device(r):
    model = get_peft_model(tiny_model().to(DEVICE), HeadSparseConfig(heads=HEADS, r=r, init_weights=False)).train()
    batch = moved(random_batch())

    def loss_and_gradients(called):
        loss = called(**batch).loss
        loss.backward()
        found = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        model.zero_grad()
        return loss, found

    loss, gradients = loss_and_gradients(model)
    compiled_loss, compiled_gradients = loss_and_gradients(torch.compile(model, fullgraph=True))
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-5)
