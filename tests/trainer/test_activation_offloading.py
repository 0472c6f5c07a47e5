"""TRL's offloading of activations, which wants an accelerator: here it takes them from the CPU to the CPU."""

import pytest
import torch
from torch import nn
from trl import SFTConfig, SFTTrainer
from trl.models.activation_offloading import OffloadActivations

from p2d_peft.trainer import choosing

from ..tiny_data import prompt_completion, text
from ..tiny_models import tiny_model, tiny_tokenizer
from .test_p2d_trainer import assert_same_weights, deltas, trainer


@pytest.fixture(autouse=True)
def _from_cpu_to_cpu(monkeypatch):
    """The contexts as TRL makes and enters them, with a note of each time and of what was packed."""
    init, enter = OffloadActivations.__init__, OffloadActivations.__enter__

    def init_on_cpu(self, **kwargs):
        self.entered, self.moved = 0, 0
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            patch.setattr(torch.cuda, "default_stream", lambda: None)  # TRL 1.8 asks for it, used or not
            init(self, **{**kwargs, "use_pin_memory": False, "use_streams": False})

    def enter_and_note(self):
        self.entered += 1
        return enter(self)

    monkeypatch.setattr(OffloadActivations, "__init__", init_on_cpu)
    monkeypatch.setattr(OffloadActivations, "__enter__", enter_and_note)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    }


def test_activations_are_offloaded_in_training_steps_and_nowhere_else(tmp_path, monkeypatch):
    plain = trainer(tmp_path / "plain", changes={"reference_steps": 0})
    plain.train()
    run = trainer(tmp_path, changes={"activation_offloading": True}, eval_dataset=prompt_completion(4, seed=2))
    context, before, find_reference = run.maybe_activation_offload_context, [], choosing.find_reference

    def after_both_stages(*args):
        before.append(context.entered)
        return find_reference(*args)

    monkeypatch.setattr(choosing, "find_reference", after_both_stages)
    run.evaluate()
    run.train()
    run.evaluate()
    # the reference is full fine-tuning with the same options: a step to warm up, and one that is timed
    assert before == [0] and context.entered == 2 + run.state.global_step == 10
    offloaded = [kept for kept, moved, *_ in context.tracker.values() if moved]
    assert context.tensor_id > 20 and all(tensor.dtype == torch.bool or tensor.numel() == 1 for tensor in offloaded)
    trained = {p.untyped_storage().data_ptr() for p in run.model.parameters() if p.requires_grad}
    assert trained <= context.param_storages  # which stay where they are
    assert_same_weights(deltas(run.model), deltas(plain.model))
    # TRL's own hooks on the head, which do nothing outside of a step, are all that is on the model, as in SFTTrainer
    args = SFTConfig(str(tmp_path), bf16=False, report_to="none", activation_offloading=True)
    theirs = SFTTrainer(tiny_model(), args, train_dataset=text(4), processing_class=tiny_tokenizer())
    assert hooks(run.model.get_base_model()) == hooks(theirs.model) == {"lm_head": (1, 1)}
