"""Optimizers by name, by class and made by hand, as with `SFTTrainer`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import trainer_optimizer

from p2d_peft.trainer import choosing

from ..tiny_models import tiny_model
from .test_drop_in import short_run
from .test_p2d_trainer import deltas, trainer


def held_by(optimizer):
    return sorted(id(parameter) for group in optimizer.param_groups for parameter in group["params"])


def trained_by(model):
    return sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_the_optimizer_holds_the_trained_weights_and_no_others(tmp_path):
    run = short_run(tmp_path, optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.1}))
    run.train()
    assert isinstance(run.optimizer.optimizer, torch.optim.Adagrad)
    assert held_by(run.optimizer.optimizer) == trained_by(run.model)
    assert len(trained_by(run.model)) == len(deltas(run.model))


def test_an_optimizer_made_by_hand_is_used_if_it_covers_the_adapter(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    mine = torch.optim.SGD(trained, lr=0.5)
    run = short_run(tmp_path, model=model, optimizers=(mine, None))
    run.train()
    assert run.optimizer.optimizer is mine
    short = short_run(tmp_path, model=model, optimizers=(torch.optim.SGD(trained[:1], lr=0.5), None))
    with pytest.raises(ValueError, match="`optimizers` holds an optimizer that lacks"):
        short.train()


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit"])
def test_optimizers_by_name_hold_the_trained_weights_and_no_others(optim, tmp_path):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    run = short_run(tmp_path, {"optim": optim, "reference_steps": 1})
    run.train()
    assert held_by(run.optimizer.optimizer) == trained_by(run.model)
    assert all((delta != 0).any() for delta in deltas(run.model).values()) and run.report.aer > 0


class FirstAndSecond(torch.optim.Optimizer):
    """An optimizer of optimizers, as Muon with AdamW beside it, for which transformers has factories."""

    def __init__(self, model, lr):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__([{"params": trained[::2]}, {"params": trained[1::2]}], {"lr": lr})
        self.parts = [torch.optim.SGD([group], lr=lr) for group in self.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()


class FactoryOfTwo:
    def __call__(self, model, **kwargs):
        return FirstAndSecond(model, **kwargs)


@pytest.mark.parametrize(
    "given", [(FactoryOfTwo, {"lr": 0.1}), (torch.optim.Muon, {"lr": 0.1})], ids=["factory", "muon"]
)
def test_optimizers_of_ones_own_kind(given, tmp_path, caplog):
    run = short_run(tmp_path, {"reference_steps": 1}, optimizer_cls_and_kwargs=given)
    run.train()
    assert held_by(run.optimizer.optimizer) == trained_by(run.model)
    assert all((delta != 0).any() for delta in deltas(run.model).values())
    # Muon is for matrices, which not all weights of a model are
    assert (run.report.aer is None) == ("Muon" in caplog.text) == (given[0] is torch.optim.Muon)


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "lomo", "grokadamw"])
def test_an_optimizer_that_is_not_installed_is_told_of_before_any_stage(optim, tmp_path, monkeypatch):
    for package in ("galore_torch", "lomo", "grokadamw"):
        monkeypatch.setattr(trainer_optimizer, f"is_{package}_available", lambda: False)
    monkeypatch.setattr(choosing, "localize_heads", None)
    run = trainer(
        tmp_path, changes={"optim": optim, "optim_target_modules": ["self_attn"] if "galore" in optim else None}
    )
    with pytest.raises((ImportError, ValueError), match=optim.split("_")[0]):
        run.train()


def test_an_optimizer_made_before_the_training_is_made_anew(tmp_path):
    run = short_run(tmp_path)
    run.create_optimizer_and_scheduler(7)
    run.train()
    assert held_by(run.optimizer.optimizer) == trained_by(run.model)
    assert all((delta != 0).any() for delta in deltas(run.model).values())
    assert run.lr_scheduler.optimizer in (run.optimizer, run.optimizer.optimizer)


def test_an_optimizer_for_other_weights_is_told_of_before_any_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "localize_heads", None)
    run = trainer(tmp_path)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=r"`trainer\.optimizer` was set to a SGD, .* Pass `optimizer_cls_and_kwargs`"):
        run.train()
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    run = trainer(tmp_path, model=model, optimizers=(torch.optim.SGD([first], lr=0.5), None))
    with pytest.raises(ValueError, match="`optimizers` holds an optimizer that lacks"):
        run.train()
