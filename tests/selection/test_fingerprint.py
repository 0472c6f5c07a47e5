import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import AutoModelForCausalLM

from p2d_peft.heads import HeadSet
from p2d_peft.selection.fingerprint import code_of, model_fingerprint
from p2d_peft.tuners import HeadSparseConfig

from ..model_checks import needs_own_adapter_methods
from ..tiny_models import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.bool])
@pytest.mark.parametrize("n", [1, 3, 8, 70_001, 140_000])  # odd lengths, and more than one chunk
def test_every_single_weight_counts_and_its_place_too(dtype, n):
    values = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(n)).to(dtype)

    def of(tensor):
        module = nn.Module()
        module.register_buffer("values", tensor)
        return model_fingerprint(module)

    seen = {of(values)}
    for place in {0, 1, n // 2, n - 1} & set(range(n)):
        changed = values.clone()
        changed[place] = (values[place] == 0).to(dtype)
        seen.add(of(changed))
    assert len(seen) == 1 + len({0, 1, n // 2, n - 1} & set(range(n)))
    assert of(values.clone()) == of(values)
    if n > 2:
        # first and last of unlike values, which may lie in different chunks
        ordered = torch.cat([torch.zeros(1), torch.ones(n - 1)]).to(dtype)
        swapped = ordered.flip(0)
        assert of(ordered) != of(swapped)


def test_the_smallest_change_of_any_tensor_of_a_model_is_another_model():
    model = tiny_model()
    first = model_fingerprint(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            kept = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] = torch.nextafter(kept, torch.tensor(torch.inf))
            assert model_fingerprint(model) != first, name
            parameter.view(-1)[-1] = kept
    assert model_fingerprint(model) == first


def test_two_layers_that_change_places_are_another_model():
    model = tiny_model()
    first = model_fingerprint(model)
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    assert model_fingerprint(model) != first


def test_settings_count_where_the_weights_are_the_same():
    assert model_fingerprint(tiny_model("mistral")) != model_fingerprint(tiny_model("mistral", sliding_window=16))
    assert model_fingerprint(tiny_model()) != model_fingerprint(tiny_model(rms_norm_eps=1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_reloaded_model_is_the_same(tmp_path, dtype, tied):
    model = tiny_model(dtype=dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model_fingerprint(loaded.eval()) == model_fingerprint(model.train())


def test_adapters_count():
    seen = {model_fingerprint(tiny_model())}
    for alpha in (8, 16):
        seen.add(model_fingerprint(get_peft_model(tiny_model(), LoraConfig(r=2, lora_alpha=alpha))))
    model = get_peft_model(tiny_model(), HeadSparseConfig(heads=HeadSet([(0, 1)])))
    seen.add(model_fingerprint(model))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1
    seen.add(model_fingerprint(model))
    model.add_adapter("other", HeadSparseConfig(heads=HeadSet([(0, 1)])))
    of_default = model_fingerprint(model)
    model.set_adapter("other")
    seen |= {of_default, model_fingerprint(model)}
    assert len(seen) == 7


def test_what_a_quantized_layer_saves_beside_its_weights_counts():
    class Quantized(nn.Module):
        """As bitsandbytes does: neither a parameter nor a buffer."""

        def __init__(self, scale):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(16, dtype=torch.uint8), requires_grad=False)
            self.scale = torch.tensor([scale])

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "scale"] = self.scale

    assert model_fingerprint(Quantized(1.0)) == model_fingerprint(Quantized(1.0))
    assert model_fingerprint(Quantized(1.0)) != model_fingerprint(Quantized(2.0))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, init_lora_weights=False),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        HeadSparseConfig(heads=HeadSet([(0, 1)])),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["lora", "saved", "head_sparse", "prompt"],
)
def test_a_disabled_adapter_is_another_model(config):
    model = get_peft_model(tiny_model(), config)
    enabled = model_fingerprint(model)
    with model.disable_adapter():
        assert model_fingerprint(model) != enabled
    assert model_fingerprint(model) == enabled


@needs_own_adapter_methods
def test_transformers_own_adapters_may_be_switched_and_disabled():
    model = tiny_model()
    for name in ("a", "b"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), name)
    seen = []
    for active in ("a", "b", ["a", "b"], "a"):
        model.set_adapter(active)
        seen.append(model_fingerprint(model))
    model.disable_adapters()
    assert len({*seen, model_fingerprint(model)}) == 4 and seen[0] == seen[-1]


def test_a_scaled_adapter_is_another_model():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    first = model_fingerprint(model)
    with rescale_adapter_scale(model, 0.5):
        assert model_fingerprint(model) != first
    assert model_fingerprint(model) == first


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("where", ["cpu", "with buffers", "disk", "whole layers"])
def test_an_offloaded_model_is_known_by_the_values_that_its_hooks_keep(where, tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    cpu = torch.device("cpu")
    if where == "disk":
        disk_offload(model, tmp_path, cpu)
    elif where == "whole layers":
        cpu_offload(model, cpu, preload_module_classes=["LlamaMLP"])
    else:
        cpu_offload(model, cpu, offload_buffers=where == "with buffers")
    assert all(parameter.is_meta for parameter in model.parameters())
    first = model_fingerprint(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model_fingerprint(model) == first
    if not tied:  # which hooks keep apart, with a name more
        assert model_fingerprint(tiny_model()) == first
    changed = tiny_model(tie_word_embeddings=tied)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    cpu_offload(changed, cpu)
    assert model_fingerprint(changed) != first


def test_the_code_of_a_function_is_told_from_anothers_and_the_same_everywhere():
    makers = [
        "lambda x: x + 1",
        "lambda x: x + 2",
        "lambda x: (lambda: x + 1)",
        "lambda x: (lambda: x + 2)",
        "lambda x: x in {'a', 'b', 'c'}",
    ]
    of_each = [code_of(eval(maker)) for maker in makers]
    assert len(set(of_each)) == len(makers)
    assert of_each == [code_of(partial(eval("\n\n" + maker))) for maker in makers]
    assert code_of(len) == ""
    script = f"from p2d_peft.selection.fingerprint import code_of; print([code_of(eval(m)) for m in {makers!r}])"
    # the order of a set's strings is the process's own
    env = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.strip().splitlines()[-1] == str(of_each)
