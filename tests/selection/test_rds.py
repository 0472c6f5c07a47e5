import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional

from p2d_peft.passed_tokens import passed_tokens
from p2d_peft.selection import rds

from ..tiny_data import prompt_completion
from ..tiny_models import LAYOUTS, tiny_model
from .direct import samples_of, scored


TARGET = samples_of(prompt_completion(4, seed=1))


def embeddings(model, samples):
    found = []
    for ids in samples.input_ids:
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        weights = torch.arange(1, len(ids) + 1) / sum(range(1, len(ids) + 1))
        found.append((weights[:, None] * hidden).sum(0))
    return torch.stack(found)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "gpt-neox"])
def test_is_the_cosine_of_weighted_means_of_hidden_states(name):
    model, samples = LAYOUTS[name].model(), samples_of()
    got = scored(rds.SCORER, model, samples, target=TARGET)
    pool, target = embeddings(model, samples), embeddings(model, TARGET)
    torch.testing.assert_close(got.features, pool, rtol=1e-4, atol=1e-5)
    expected = functional.cosine_similarity(pool, target.mean(0, keepdim=True))
    torch.testing.assert_close(got.scores, expected, rtol=1e-4, atol=1e-5)
    each = functional.cosine_similarity(pool[:, None], target[None], dim=2)
    torch.testing.assert_close(got.per_target, each, rtol=1e-4, atol=1e-5)


def test_adapters_are_part_of_the_model_and_the_head_is_not_run():
    model = get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False, target_modules=["v_proj"]))
    model.base_model.model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with_adapter = scored(rds.SCORER, model, samples_of(), target=TARGET)
    merged = scored(rds.SCORER, model.merge_and_unload(), samples_of(), target=TARGET)
    torch.testing.assert_close(with_adapter.scores, merged.scores, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        with_adapter.features, scored(rds.SCORER, tiny_model(), samples_of(), target=TARGET).features
    )


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="`scorer`='rds' needs a transformers model, but `model` is Linear"):
        scored(rds.SCORER, nn.Linear(1, 1), samples_of(), target=TARGET)


def test_tokens_are_counted_and_no_hook_is_left():
    model, samples = tiny_model(), samples_of()
    with passed_tokens(model) as passed:
        scored(rds.SCORER, model, samples, target=TARGET)
    assert passed() == sum(map(len, samples.input_ids)) + sum(map(len, TARGET.input_ids))
    assert not any(module._forward_hooks for module in model.modules())


def test_virtual_tokens_are_no_part_of_a_row():
    """A prompt before a row is as a prefix that counts for nothing itself."""
    model, samples = tiny_model(), samples_of(prompt_completion(6))
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    embeds = prompted.get_prompt(1)[0]
    found = scored(rds.SCORER, prompted, samples, target=TARGET).features
    for ids, got in zip(samples.input_ids, found, strict=True):
        tokens = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(ids))])[None]
        with torch.no_grad():
            hidden = model(inputs_embeds=tokens, output_hidden_states=True).hidden_states[-1][0, 3:]
        weights = torch.arange(1, len(ids) + 1) / sum(range(1, len(ids) + 1))
        torch.testing.assert_close(got, (weights[:, None] * hidden).sum(0), rtol=1e-4, atol=1e-5)
