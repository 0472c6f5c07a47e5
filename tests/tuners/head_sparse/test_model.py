import copy
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import inspect_matched_modules
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from p2d_peft.heads import AttentionLayout, HeadSet, register_attention_layout
from p2d_peft.tuners import HeadSparseConfig, HeadSparseLayer
from tests.tiny_models import ARCHITECTURES, FEW, random_batch, tiny_model
from tests.tuners.head_sparse.test_layer import bits


HEADS = {0: [1], 2: [0, 3]}
# Heads 0 and 1 are of one group, and so are 2 and 3, except in the models with as many groups as heads, or only one.
OVERLAPPING = {0: [0, 1], 1: [2], 2: [3]}
NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def attach(model, heads=HEADS, init_weights=False, **kwargs):
    return get_peft_model(model, HeadSparseConfig(heads=heads, init_weights=init_weights, **kwargs))


def logits(model, **batch):
    with torch.no_grad():
        return model(**(batch or random_batch())).logits


def sizes(config):
    """H, G and D of a model's config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads, config.num_key_value_heads, head_dim


def slice_masks(model, heads):
    """For each weight with a part in the heads, which of its elements are theirs; by arithmetic on the config alone."""
    H, G, D = sizes(model.config)
    parameters, masks = dict(model.named_parameters()), {}
    for layer, indices in heads.items():
        for role, projection in NAMES.items():
            name = f"model.layers.{layer}.self_attn.{projection}.weight"
            masks[name] = torch.zeros_like(parameters[name], dtype=torch.bool)
            for head in indices:
                unit = head // (H // G) if role in "kv" else head
                rows_or_columns = slice(unit * D, (unit + 1) * D)
                if role == "o":
                    masks[name][:, rows_or_columns] = True
                else:
                    masks[name][rows_or_columns] = True
    return masks


def assert_changed_exactly(before, after, masks):
    assert before.keys() == after.keys()
    for name, old in before.items():
        changed = bits(old) != bits(after[name])
        assert torch.equal(changed, masks.get(name, torch.zeros_like(changed))), name


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, HeadSparseLayer)]


def randomize(model, adapter_name="default", std=0.05):
    """Deltas with all the bits of their dtype, as training gives."""
    with torch.no_grad():
        for layer in layers_of(model):
            if adapter_name in layer.head_sparse_delta:
                nn.init.normal_(layer.head_sparse_delta[adapter_name].weight, std=std)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_untrained_adapter_is_the_base_model_bit_for_bit(name, dtype):
    base = logits(tiny_model(name, dtype))
    model = attach(tiny_model(name, dtype), heads=None, init_weights=True)
    assert len(layers_of(model)) == 4 * 3
    assert all(layer.head_sparse_delta["default"].weight.dtype == torch.float32 for layer in layers_of(model))
    assert torch.equal(bits(logits(model)), bits(base))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_changes_the_slices_of_the_heads_and_nothing_else(name):
    model = tiny_model(name)
    before, masks, batch = snapshot(model), slice_masks(model, HEADS), random_batch(padding=3)
    model = attach(model, init_weights=True)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".head_sparse_delta." in name for name in trainable)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained = logits(model)
    merged = model.merge_and_unload()
    assert_changed_exactly(before, snapshot(merged), masks)
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-4)
    assert not layers_of(merged) and not hasattr(merged, "peft_config")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_the_full_models_on_the_slices(name):
    full = tiny_model(name)
    full(**random_batch()).loss.backward()
    model = attach(tiny_model(name), init_weights=True)
    model(**random_batch()).loss.backward()
    masks = slice_masks(full, HEADS)
    for parameter_name, parameter in full.named_parameters():
        if parameter_name not in masks:
            continue
        layer = model.get_submodule("base_model.model." + parameter_name.removesuffix(".weight"))
        gradient = layer.head_sparse_delta["default"].weight.grad
        expected = parameter.grad[masks[parameter_name]].reshape(gradient.shape)
        assert expected.count_nonzero() > 0.9 * expected.numel()
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_slice_reaches_its_heads_outputs_only(name):
    """The outputs of the heads are seen at the input of the output projection, the heads told apart by their place."""
    H, G, D = sizes(tiny_model(name).config)
    layer = 1
    for role in "qkv":
        for head in range(H):
            model = attach(tiny_model(name), heads={layer: [head]}, init_weights=True)
            attention = model.base_model.model.model.layers[layer].self_attn
            seen = []
            attention.o_proj.base_layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            logits(model)
            # Turn the slice's sign, which no norm over the heads together lets the others notice (OLMo 2 has one).
            unit = head // (H // G) if role in "kv" else head
            projection = attention.get_submodule(NAMES[role])
            with torch.no_grad():
                projection.head_sparse_delta["default"].weight.copy_(-2 * projection.weight[unit * D : (unit + 1) * D])
                if projection.bias is not None:
                    projection.bias[unit * D : (unit + 1) * D] *= -1
            logits(model)
            before, after = (outputs.unflatten(-1, (H, D)) for outputs in seen)
            changed = [not torch.equal(before[..., other, :], after[..., other, :]) for other in range(H)]
            same_group = [other // (H // G) == head // (H // G) for other in range(H)]
            assert changed == (same_group if role in "kv" else [other == head for other in range(H)]), (role, head)


@pytest.mark.parametrize("name", FEW)
def test_output_columns_are_those_of_the_head(name):
    model = attach(tiny_model(name), heads={1: [2]})
    _, _, D = sizes(model.config)
    projection = model.base_model.model.model.layers[1].self_attn.o_proj
    x = torch.randn(3, projection.in_features)
    moved = x.clone()
    moved[:, : 2 * D] += 1
    moved[:, 3 * D :] += 1
    share = projection(x) - projection.base_layer(x)
    assert share.abs().max() > 1e-3
    torch.testing.assert_close(projection(moved) - projection.base_layer(moved), share, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FEW)
def test_merging_overlapping_adapters_and_back(name, dtype):
    model = tiny_model(name, dtype)
    before, masks, other_masks = snapshot(model), slice_masks(model, HEADS), slice_masks(model, OVERLAPPING)
    model = randomize(attach(model))
    model.add_adapter("other", HeadSparseConfig(heads=OVERLAPPING))
    randomize(model, "other")
    model.base_model.set_adapter(["default", "other"])
    unmerged, base = logits(model), model.get_base_model()

    def weights():
        return {
            name.replace(".base_layer", ""): tensor for name, tensor in snapshot(base).items() if "_delta" not in name
        }

    assert_changed_exactly(before, weights(), {})
    model.merge_adapter()
    assert (logits(model) - unmerged).abs().max() < (1e-5 if dtype == torch.float32 else 0.1) * unmerged.abs().max()
    for parameter_name, other in other_masks.items():
        masks[parameter_name] = masks.get(parameter_name, False) | other
    after = weights()
    for parameter_name, old in before.items():  # a bf16 weight may round to what it was
        changed = bits(old) != bits(after[parameter_name])
        assert not (changed & ~masks.get(parameter_name, torch.zeros_like(changed))).any(), parameter_name
        assert parameter_name not in masks or changed.sum() > 0.9 * masks[parameter_name].sum()
    model.unmerge_adapter()
    assert_changed_exactly(before, weights(), {})
    assert torch.equal(logits(model), unmerged)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_finds_nan_before_anything_is_touched(how):
    model = attach(tiny_model())
    with torch.no_grad():
        layers_of(model)[-1].head_sparse_delta["default"].weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        getattr(model, how)(safe_merge=True)
    assert_changed_exactly(before, snapshot(model), {})
    assert not any(layer.merged for layer in layers_of(model))


def test_safe_merge_of_a_sound_adapter():
    model = attach(tiny_model())
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saving_and_loading(dtype, low_cpu_mem_usage, tmp_path):
    model = randomize(attach(tiny_model(dtype=dtype)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    # fp32 deltas come back with each of their bits, also on a bf16 base
    assert torch.equal(bits(logits(loaded)), bits(expected))
    assert loaded.peft_config["default"].heads == HEADS
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", FEW)
def test_checkpoint_holds_the_trained_elements_only(name, tmp_path):
    base = tiny_model(name)
    trained = sum(int(mask.sum()) for mask in slice_masks(base, HEADS).values())
    total = sum(parameter.numel() for parameter in base.parameters())
    model = attach(base)
    assert model.get_nb_trainable_parameters() == (trained, total + trained)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.endswith(".head_sparse_delta.weight") for key in saved)
    assert sum(tensor.numel() for tensor in saved.values()) == trained
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= trained * 4 + 8 * 1024


def test_printed_count(capsys):
    attach(tiny_model(), heads={0: [0]}).print_trainable_parameters()
    # 12 rows or columns of 48 in each of the four projections
    assert capsys.readouterr().out.startswith("trainable params: 2,304 || all params: ")


def test_loads_in_a_fresh_process(tmp_path):
    base = tiny_model("qwen3")
    base.save_pretrained(tmp_path / "base")
    model = randomize(attach(base))
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"batch": random_batch(), "logits": logits(model)}, tmp_path / "expected.pt")
    code = f"""
import peft, torch, transformers
import p2d_peft

expected = torch.load({str(tmp_path / "expected.pt")!r})
base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = peft.PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
with torch.no_grad():
    assert not torch.equal(base.eval()(**expected["batch"]).logits, 0 * expected["logits"])
    assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.endswith("equal\n"), result.stderr


def test_several_adapters():
    base = logits(tiny_model())
    model = attach(tiny_model())
    first = logits(model)
    count = model.get_nb_trainable_parameters()[0]
    model.add_adapter("second", HeadSparseConfig(heads={0: [3], 1: [1]}, init_weights=False))
    assert torch.equal(logits(model), first)  # not active yet
    assert model.get_nb_trainable_parameters()[0] == count

    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first) and not torch.equal(second, base)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith("_delta.second.weight")
    }
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"] and list(model.peft_config) == ["second"]
    assert torch.equal(logits(model), second)
    assert all({"default"}.isdisjoint(layer.head_sparse_index) for layer in layers_of(model))
    model.delete_adapter("second")
    assert torch.equal(logits(model.base_model), base)  # a PeftModel itself does not run without an adapter


def test_inactive_adapter_of_a_bf16_model_is_not_trained():
    """An adapter in half precision is cast to fp32, which must not make it trainable."""
    model = attach(tiny_model(dtype=torch.bfloat16))
    count = model.get_nb_trainable_parameters()[0]
    model.add_adapter("second", HeadSparseConfig(heads=[0]))
    assert model.get_nb_trainable_parameters()[0] == count
    model.set_adapter("second")
    assert {n.rsplit(".", 2)[1] for n, p in model.named_parameters() if p.requires_grad} == {"second"}


def test_adapters_on_disjoint_heads_add_up():
    """Two adapters that share no slice, active together, are one adapter on the heads of both."""
    one, other = HeadSet([(0, 0), (2, 1)]), HeadSet([(0, 2), (1, 3)])
    model = attach(tiny_model(), heads=one)
    model.add_adapter("other", HeadSparseConfig(heads=other, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    dense = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, HeadSparseLayer):
            dense[name] = sum(layer.get_delta_weight(adapter_name) for adapter_name in layer.head_sparse_delta)
    union = attach(tiny_model(), heads=one | other)
    with torch.no_grad():
        for name, layer in union.get_base_model().named_modules():
            if isinstance(layer, HeadSparseLayer):
                weight_slice = layer.head_sparse_slice["default"]
                index = torch.tensor(weight_slice.indices)
                layer.head_sparse_delta["default"].weight.copy_(dense[name].index_select(weight_slice.dim, index))
    torch.testing.assert_close(logits(model), logits(union), atol=1e-6, rtol=1e-5)
    assert (logits(model) - logits(tiny_model())).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kwargs", "projections"),
    [
        ({}, "qkvo"),
        ({"target_modules": "all-linear"}, "qkvo"),
        ({"target_modules": ["q_proj", "v_proj", "gate_proj"]}, "qv"),
        ({"target_modules": r".*self_attn\.[qo]_proj"}, "qo"),
        ({"exclude_modules": ["k_proj"]}, "qvo"),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.q_proj"}, "k"),
    ],
)
def test_target_modules_narrow_the_projections(kwargs, projections, recwarn):
    model = attach(tiny_model(), **kwargs)
    expected = {f"model.layers.{layer}.self_attn.{NAMES[role]}" for layer in HEADS for role in projections}
    assert set(model.targeted_module_names) == expected
    assert set(inspect_matched_modules(model.base_model)["matched"]) == expected
    assert not [warning for warning in recwarn if "exclude_modules" in str(warning.message)]
    # the config still says what the user said, and so will the saved one
    assert model.peft_config["default"] == HeadSparseConfig(heads=HEADS, init_weights=False, **kwargs)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    ("fields", "roles"),
    [
        ({"projections": ["q"]}, "q"),
        ({"projections": ["v", "o"]}, "vo"),
        ({"share_kv": False}, "qo"),
        ({"projections": ["k", "q"], "share_kv": False}, "q"),
    ],
)
def test_projections_and_share_kv(name, fields, roles):
    base = tiny_model(name)
    before, batch = snapshot(base), random_batch()
    every = slice_masks(base, HEADS)
    masks = {key: mask for key, mask in every.items() if any(f".{NAMES[role]}." in key for role in roles)}
    model = attach(base, init_weights=True, **fields)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
    assert_changed_exactly(before, snapshot(model.merge_and_unload()), masks)


@pytest.mark.parametrize("name", FEW)
def test_low_rank_within_the_slices(name, tmp_path):
    base = tiny_model(name)
    before, masks = snapshot(base), slice_masks(base, HEADS)
    model = attach(base, init_weights=True, r=2)
    expected = sum(2 * (mask.any(0).sum() + mask.any(1).sum()).item() for mask in masks.values())
    assert model.get_nb_trainable_parameters()[0] == expected
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**random_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(bits(logits(PeftModel.from_pretrained(tiny_model(name), tmp_path))), bits(trained))
    merged = model.merge_and_unload()
    assert_changed_exactly(before, snapshot(merged), masks)
    for key in masks:
        rank = torch.linalg.matrix_rank((snapshot(merged)[key] - before[key]).double(), rtol=1e-4)
        assert rank == 2, key
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"layers_to_transform": 2}, {2}),
        ({"layers_to_transform": [0, 1]}, {0}),
        ({"layers_to_transform": [2], "layers_pattern": "layers"}, {2}),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, {0}),
    ],
)
def test_layers_to_transform_narrows_the_heads(fields, layers):
    model = attach(tiny_model(), **fields)
    assert {int(name.split(".")[2]) for name in model.targeted_module_names} == layers


@pytest.mark.parametrize("pattern", [None, "layers"])
def test_layers_to_transform_of_a_bare_model(pattern):
    """Its modules' names start with `layers.0`, in which PEFT's own matching finds no layer."""
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": pattern}
    model = attach(tiny_model().model, heads=None, **fields)
    assert model.targeted_module_names == ["layers.1.self_attn.q_proj"]
    assert {
        name: getattr(model.peft_config["default"], name) for name in ("layers_to_transform", "layers_pattern")
    } == {
        "layers_to_transform": [1],
        "layers_pattern": pattern,
    }


def test_only_trained_projections_limit_the_rank():
    """The keys and values have 24 rows, the queries 48."""
    with pytest.raises(ValueError, match=r"`r` must be 1 to 24 for 'model\.layers\.0\.self_attn\.k_proj'"):
        attach(tiny_model(), heads=None, r=30)
    model = attach(tiny_model(), heads=None, r=30, target_modules=["q_proj", "o_proj"])
    assert len(layers_of(model)) == 2 * 3


def test_conv1d_model_trains_saves_and_merges(tmp_path):
    """GPT-2: all of q, k and v in one projection with a transposed weight."""

    def base():
        transformers.set_seed(0)
        config = transformers.GPT2Config(
            n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=64, initializer_range=0.1
        )
        return transformers.GPT2LMHeadModel(config).eval()

    before, batch = snapshot(base()), random_batch()
    model = attach(base(), heads={1: [2]}, init_weights=True)
    assert torch.equal(bits(logits(model)), bits(logits(base())))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), trained)
    masks = {f"transformer.h.1.attn.{name}.weight": None for name in ("c_attn", "c_proj")}
    for name in masks:
        masks[name] = torch.zeros_like(before[name], dtype=torch.bool)
    for part in range(3):
        masks["transformer.h.1.attn.c_attn.weight"][:, part * 48 + 24 : part * 48 + 36] = True
    masks["transformer.h.1.attn.c_proj.weight"][24:36] = True
    merged = model.merge_and_unload(safe_merge=True)
    assert_changed_exactly(before, snapshot(merged), masks)
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-4)


def test_plain_module_with_a_registered_layout(tmp_path):
    class FusedAttentionOfATest(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (4, 4)).transpose(-2, -3) for part in self.qkv(x).chunk(3, -1))
            output = nn.functional.scaled_dot_product_attention(q, k, v)
            return x + self.out(output.transpose(-2, -3).flatten(-2))

    register_attention_layout(FusedAttentionOfATest, AttentionLayout("qkv", "qkv", "qkv", "out", head_dim=4))
    model = nn.Sequential(nn.Linear(3, 16), FusedAttentionOfATest(), nn.Linear(16, 2))
    x = torch.randn(2, 5, 3)
    state, base = copy.deepcopy(model.state_dict()), model(x)
    peft_model = get_peft_model(model, HeadSparseConfig(heads=[1]))
    assert torch.equal(peft_model(x), base)
    randomize(peft_model)
    trained = peft_model(x)
    peft_model.save_pretrained(tmp_path)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(merged(x), trained)
    merged.load_state_dict(state)
    assert torch.equal(PeftModel.from_pretrained(merged, tmp_path)(x), trained)


def test_one_config_serves_models_of_different_depth():
    config = HeadSparseConfig()
    assert len(layers_of(get_peft_model(tiny_model(), config))) == 4 * 3
    assert len(layers_of(get_peft_model(tiny_model(num_hidden_layers=5), config))) == 4 * 5


def test_heads_assigned_to_the_config():
    config = HeadSparseConfig()
    config.heads = HeadSet([(1, 2)])
    model = get_peft_model(tiny_model(), config)
    assert len(layers_of(model)) == 4 and model.peft_config["default"].heads == {1: [2]}


def test_modules_to_save(tmp_path):
    model = attach(tiny_model(), modules_to_save=["lm_head"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "_delta" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_on_the_meta_device():
    """A model made without memory, filled later: the indices must not be lost on the way."""
    reference = randomize(attach(tiny_model()))
    with torch.device("meta"):
        model = attach(tiny_model())
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    rotary = "model.model.rotary_emb"  # its buffers are not saved, which is transformers' own affair
    model.base_model.set_submodule(rotary, reference.base_model.get_submodule(rotary))
    assert torch.equal(logits(model), logits(reference))


def test_inject_adapter_in_model():
    base = tiny_model()
    config = HeadSparseConfig(heads=HEADS, init_weights=False)
    model = inject_adapter_in_model(config, base)
    assert model is base and len(layers_of(model)) == 4 * len(HEADS)
    state = get_peft_model_state_dict(model)
    assert len(state) == 4 * len(HEADS)
    other = inject_adapter_in_model(config, tiny_model(), state_dict=state)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))

    # layer 0 is in both, but layer 2 is not: nothing may be left in layer 0
    untouched = tiny_model()
    with pytest.raises(ValueError, match=r"delta for 'model\.layers\.2\.self_attn\.q_proj', which holds none of"):
        inject_adapter_in_model(HeadSparseConfig(heads={0: [1]}), untouched, state_dict=state)
    assert not layers_of(untouched)


def test_inject_into_a_compiled_model():
    """All names begin with `_orig_mod.`, in the state dict, too."""
    config = HeadSparseConfig(heads=HEADS, init_weights=False)
    source, target = (torch.compile(tiny_model(), backend="eager") for _ in range(2))
    state = get_peft_model_state_dict(inject_adapter_in_model(config, source))
    assert all(key.startswith("_orig_mod.") for key in state)
    set_peft_model_state_dict(inject_adapter_in_model(config, target, state_dict=state), state)
    loaded = get_peft_model_state_dict(target)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def within_wrappers(model):
    """Activation checkpointing wraps each layer in a module that a state dict does not have. (FSDP1 does, too.)"""
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    return model


def test_loads_its_state_dict_within_wrappers():
    model = attach(tiny_model())
    expected, state = logits(model), snapshot(model)
    randomize(within_wrappers(model))
    assert snapshot(model).keys() == state.keys() and not torch.equal(logits(model), expected)
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)

    homeless = {"base_model.model.model.layers.1.self_attn.q_proj.head_sparse_delta.default.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"delta for 'model\.layers\.1\.self_attn\.q_proj', which holds none of"):
        model.load_state_dict(homeless, strict=False)


def test_an_adapter_that_peft_would_pass_over(tmp_path):
    """It looks for the adapter by the names of modules, and loads nothing where they have others."""
    attach(tiny_model()).save_pretrained(tmp_path)
    message = r"delta for 'model\.layers\.0\.self_attn\.[qkvo]_proj' that names no adapter"
    with pytest.raises(ValueError, match=message):
        within_wrappers(attach(tiny_model())).load_adapter(tmp_path, "default")
    # layer 0 has a place for the first adapter alone
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "heads": {"2": [0, 3]}}))
    with pytest.raises(ValueError, match=message):
        attach(tiny_model()).load_adapter(tmp_path, "second")


def test_an_adapter_of_compiled_layers(tmp_path):
    """Their state dict has `_orig_mod`, with which a plain model would pass over the weights."""
    model = attach(tiny_model())
    layers = model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"delta for 'model\.layers\.0\._orig_mod\.self_attn\.._proj'"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_other_methods_are_as_before():
    """LoRA beside, after and around a model that was adapted by HeadSparse."""
    expected = logits(tiny_model())
    model = attach(tiny_model())
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(lora), expected) and not layers_of(lora)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
        after = get_peft_model(model.unload(), LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(after), expected) and not layers_of(after)
    assert after.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()


def unusual(change):
    model = tiny_model()
    change(model)
    return model


def fused(model):
    model.model.layers[1].self_attn.q_proj = nn.Identity()


ERRORS = {
    "layer": ({"heads": {7: [0]}}, None, r"holds \(7, 0\), but layer 7 has no heads; layers: 0 to 2"),
    "head": ({"heads": {1: [4]}}, None, r"holds \(1, 4\), but layer 1 has the heads 0 to 3"),
    "head of every layer": ({"heads": [0, 9]}, None, r"holds \(0, 9\), but layer 0 has the heads 0 to 3"),
    "target_modules": (
        {"target_modules": ["gate_proj"]},
        None,
        r"leave nothing to train .*: 'model.layers.0.self_attn.q_proj' to 'model.layers.2.self_attn.o_proj' \(8 in all\)",
    ),
    "target_modules regex": (
        {"target_modules": "q_proj"},
        None,
        r"`target_modules` \(q_proj\).* leave nothing to train",
    ),
    "exclude_modules": (
        {"exclude_modules": ".*proj"},
        None,
        r"`exclude_modules` \(\.\*proj\) .* leave nothing to train",
    ),
    "modules_to_save": ({"modules_to_save": ["self_attn"]}, None, r"\(\['self_attn'\]\) leave nothing to train"),
    "layers_to_transform": (
        {"layers_to_transform": [1]},
        None,
        r"`layers_to_transform` \(\[1\]\) .* have none of the chosen heads .*; the model's layers: 0, 1, 2",
    ),
    "r": (
        {"r": 13},
        None,
        r"`r` must be 1 to 12 for 'model.layers.0.self_attn.q_proj', .* got 13",
    ),
    "tensor parallelism": (
        {},
        lambda model: setattr(model, "_tp_size", 2),
        r"split over 2 processes by tensor parallelism, and with it 'model\.layers\.0\.self_attn\.q_proj'",
    ),
    "attention": ({}, fused, r"q_proj' of type Identity; supported are linear layers"),
    "no attention": ({}, lambda model: setattr(model.model, "layers", nn.ModuleList()), "has no attention heads"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_the_model_as_it_was(case):
    kwargs, change, message = ERRORS[case]
    model = unusual(change or (lambda model: None))
    before, modules = snapshot(model), dict(model.named_modules())
    config = HeadSparseConfig(**{"heads": HEADS, **kwargs})
    for attach_to in (lambda: get_peft_model(model, config), lambda: inject_adapter_in_model(config, model)):
        with pytest.raises(ValueError, match=message):
            attach_to()
        assert dict(model.named_modules()) == modules
        assert_changed_exactly(before, snapshot(model), {})
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not hasattr(model, "peft_config")


def test_failing_second_adapter_leaves_the_first():
    model = attach(tiny_model())
    expected = logits(model)
    with pytest.raises(ValueError, match=r"holds \(5, 0\)"):
        model.add_adapter("second", HeadSparseConfig(heads={5: [0]}))
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), expected)

    injected = inject_adapter_in_model(HeadSparseConfig(heads=HEADS), tiny_model())
    with pytest.warns(UserWarning, match="Already found"), pytest.raises(ValueError, match=r"holds \(5, 0\)"):
        inject_adapter_in_model(HeadSparseConfig(heads={5: [0]}), injected, adapter_name="second")
    assert list(injected.peft_config) == ["default"]


def test_failing_second_wrapper_leaves_the_first(tmp_path):
    base = tiny_model()
    model = attach(base)
    expected, config = logits(model), copy.deepcopy(model.peft_config["default"])
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time|Already found"),
        pytest.raises(ValueError, match=r"holds \(9, 1\)"),
    ):
        get_peft_model(base, HeadSparseConfig(heads={9: [1]}))
    assert model.peft_config == {"default": config} and torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)


def test_a_name_that_begins_as_the_parameters_do(tmp_path):
    name = "head_sparse_math"
    model = get_peft_model(tiny_model(), HeadSparseConfig(heads=HEADS, init_weights=False), adapter_name=name)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(loaded), expected)
    state = snapshot(model)
    randomize(model, name)
    assert not torch.equal(logits(model), expected)
    model.load_state_dict(state)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["v1.0", "weight", "keys"])
def test_names_that_no_parameter_can_have(name):
    model = attach(tiny_model())
    expected = logits(model)
    with pytest.raises(ValueError, match=f"`adapter_name`='{re.escape(name)}' cannot be the name of a module"):
        model.add_adapter(name, HeadSparseConfig(heads=HEADS))
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), expected)
    assert all(list(layer.head_sparse_slice) == ["default"] for layer in layers_of(model))
