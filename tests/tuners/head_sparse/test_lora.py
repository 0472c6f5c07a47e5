import dataclasses
import json
import logging
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.llama.modeling_llama import LlamaAttention

from p2d_peft.tuners import HeadSparseConfig
from p2d_peft.tuners.head_sparse import lora as lora_module
from p2d_peft.tuners.head_sparse.lora import convert_to_lora, lora_report, save_as_lora
from tests.model_checks import needs_own_adapter_methods
from tests.tiny_models import ARCHITECTURES, random_batch, tiny_model
from tests.tuners.head_sparse.test_model import (
    HEADS,
    OVERLAPPING,
    attach,
    layers_of,
    logits,
    randomize,
    sizes,
    snapshot,
)


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def load(base, folder, **kwargs):
    """The exported adapter as PEFT loads it; a warning (an unmatched name, a missing key) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings(
            "ignore", "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
        )
        return PeftModel.from_pretrained(base, folder, **kwargs)


def expected_ranks(config, heads):
    """The trained rows or columns of each module, by arithmetic on the model's config alone."""
    H, G, D = sizes(config)
    ranks = {}
    for layer, indices in heads.items():
        groups = {head // (H // G) for head in indices}
        for projection, units in {"q": indices, "k": groups, "v": groups, "o": indices}.items():
            ranks[f"model.layers.{layer}.self_attn.{projection}_proj"] = len(units) * D
    return ranks


@pytest.mark.parametrize("heads", [HEADS, OVERLAPPING, None], ids=["few", "shared-groups", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export_is_exact(name, heads, tmp_path):
    model = randomize(attach(tiny_model(name), heads=heads))
    before, here = snapshot(model), logits(model)
    report = save_as_lora(model, tmp_path)
    assert report.error == 0.0 and set(report.errors.values()) == {0.0}
    if heads is not None:
        assert report.ranks == expected_ranks(model.config, heads)
    assert all(torch.equal(tensor, before[key]) for key, tensor in snapshot(model).items())

    loaded = load(tiny_model(name), tmp_path)
    assert type(loaded.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(logits(loaded), here, atol=2e-6, rtol=1e-5)
    for layer_name, layer in model.base_model.model.named_modules():
        if layer_name in report.ranks:
            delta = loaded.base_model.model.get_submodule(layer_name).get_delta_weight("default")
            # one product of each sum is by a one, the others are by zeros: nothing is rounded
            assert torch.equal(delta, layer.get_delta_weight("default")), layer_name
            assert loaded.base_model.model.get_submodule(layer_name).scaling == {"default": 1.0}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_export_of_a_bf16_base_keeps_the_deltas_and_agrees_to_its_rounding(name, tmp_path):
    base = tiny_model(name, torch.bfloat16)
    without = logits(base)
    model = randomize(attach(base, heads=OVERLAPPING), std=0.3)
    here = logits(model)
    save_as_lora(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    there = logits(load(tiny_model(name, torch.bfloat16), tmp_path))
    # the sums of base and delta are rounded in another order
    difference, effect = (there - here).float().norm(), (here - without).float().norm()
    assert difference < 0.03 * effect


def test_deltas_in_half_precision_are_exported_as_they_are(tmp_path):
    model = randomize(attach(tiny_model(dtype=torch.bfloat16)).bfloat16())
    save_as_lora(model, tmp_path, max_rank=5)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    state_dict = convert_to_lora(model)[1]
    for layer_name, layer in model.named_modules():
        if layer in layers_of(model):
            A, B = (state_dict[f"{layer_name}.lora_{side}.weight"] for side in "AB")
            assert torch.equal(B @ A, layer.get_delta_weight("default"))


def test_loads_in_a_process_without_p2d_peft(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = randomize(attach(base))
    torch.save(logits(model), tmp_path / "logits.pt")
    save_as_lora(model, tmp_path / "lora")
    code = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

ids = torch.load("ids.pt")
expected = torch.load("logits.pt")
for how in ("peft", "transformers"):
    model = AutoModelForCausalLM.from_pretrained("base").eval()
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2
    if how == "peft":
        model = PeftModel.from_pretrained(model, "lora")
    else:
        model.load_adapter("lora")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-6, rtol=1e-5)
    if how == "peft":
        merged = model.merge_and_unload()
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=2e-6, rtol=1e-5)
assert not any(name.partition(".")[0] == "p2d_peft" for name in sys.modules)
print("same logits")
"""
    batch = random_batch()
    torch.save(batch["input_ids"], tmp_path / "ids.pt")
    with torch.no_grad():
        torch.save(model(input_ids=batch["input_ids"]).logits, tmp_path / "logits.pt")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "same logits"


def test_only_safetensors_and_json_come_out_whole_and_the_same_each_time(tmp_path, monkeypatch):
    model = randomize(attach(tiny_model(), heads=OVERLAPPING, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "some/model"
    model.peft_config["default"].revision = "v1"
    save_as_lora(model, tmp_path / "deep" / "lora")
    files = {path.name: path.read_bytes() for path in (tmp_path / "deep" / "lora").iterdir()}
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(tmp_path / "deep" / "lora" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads(files["adapter_config.json"])
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", "v1")
    # readers that know no patterns divide these two
    assert config["r"] == config["lora_alpha"] == max(expected_ranks(model.config, OVERLAPPING).values()) == 24
    assert config["target_modules"] == sorted(expected_ranks(model.config, OVERLAPPING))

    # another export fails as it writes the configuration: what was there stays
    def fail(*args):
        raise OSError("disk full")

    randomize(model, std=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(lora_module, "json_text", fail)
        with pytest.raises(OSError, match="disk full"):
            save_as_lora(model, tmp_path / "deep" / "lora")
    assert {path.name: path.read_bytes() for path in (tmp_path / "deep" / "lora").iterdir()} == files

    save_as_lora(model, tmp_path / "a")
    save_as_lora(model, str(tmp_path / "deep" / "lora"))
    for name in files:
        assert (tmp_path / "deep" / "lora" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_layers_ten_and_one_are_told_apart(tmp_path):
    """Names in `rank_pattern` are regular expressions, which must not match other modules' names, or their ends."""
    model = randomize(attach(tiny_model(num_hidden_layers=12), heads={1: [0], 10: [0, 1], 11: [0, 1, 2]}))
    save_as_lora(model, tmp_path)
    loaded = load(tiny_model(num_hidden_layers=12), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-6, rtol=1e-5)


def test_one_of_several_adapters(tmp_path):
    model = randomize(attach(tiny_model(), heads=HEADS))
    alone = logits(model)
    model.add_adapter("other", HeadSparseConfig(heads=OVERLAPPING, init_weights=False))
    randomize(model, "other", std=0.2)
    model.set_adapter("other")
    other = logits(model)
    # neither needs to be active, and each brings its own modules only
    for name, here, heads in (("default", alone, HEADS), ("other", other, OVERLAPPING)):
        report = save_as_lora(model, tmp_path / name, adapter_name=name)
        assert report.ranks == expected_ranks(model.config, heads)
        torch.testing.assert_close(logits(load(tiny_model(), tmp_path / name)), here, atol=2e-6, rtol=1e-5)
    assert model.active_adapters == ["other"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_modules_to_save_come_along(tied, tmp_path):
    model = attach(tiny_model(tie_word_embeddings=tied), heads=HEADS, modules_to_save=["lm_head", "model.norm"])
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_as_lora(model, tmp_path)
    config, state_dict = convert_to_lora(model)
    assert set(config.modules_to_save) == {"lm_head", "model.norm"}
    extra = {name for name in state_dict if ".lora_" not in name}
    assert extra == {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"}
    loaded = load(tiny_model(tie_word_embeddings=tied), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-6, rtol=1e-5)


FIELDS = {field.name for field in dataclasses.fields(HeadSparseConfig)}


@pytest.mark.skipif("r" not in FIELDS, reason="HeadSparseConfig has no `r` yet")
def test_low_rank_deltas_keep_their_rank(tmp_path):
    model = attach(tiny_model(), heads=OVERLAPPING, r=3)
    report = save_as_lora(model, tmp_path)
    assert set(report.ranks.values()) == {3} and report.error == 0.0
    loaded = load(tiny_model(), tmp_path)
    assert (logits(model) - logits(tiny_model())).abs().max() > 1e-5
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-6, rtol=1e-5)
    for name in report.ranks:
        here = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(loaded.base_model.model.get_submodule(name).get_delta_weight("default"), here)
    assert 0 < lora_report(model, max_rank=2).error < 1


@pytest.mark.skipif("bias" not in FIELDS, reason="HeadSparseConfig has no `bias` yet")
def test_trained_biases_are_refused():
    with pytest.raises(ValueError, match=r"trains biases .*merge it"):
        convert_to_lora(attach(tiny_model(), bias="all"))


@pytest.mark.skipif("trainable_token_indices" not in FIELDS, reason="HeadSparseConfig has no such field yet")
def test_trainable_tokens_come_along(tmp_path):
    model = randomize(attach(tiny_model(), trainable_token_indices=[3, 5, 8]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    save_as_lora(model, tmp_path)
    torch.testing.assert_close(logits(load(tiny_model(), tmp_path)), logits(model), atol=2e-6, rtol=1e-5)


FUSED = {
    "gpt2": ("GPT2Config", {"n_embd": 48, "n_head": 4, "n_layer": 2}),  # Conv1D, q, k and v in one
    "phi3": ("Phi3Config", {"num_key_value_heads": 2}),
    "gpt-neox": ("GPTNeoXConfig", {}),
}


@pytest.mark.parametrize("heads", [{0: [1], 1: [0, 2]}, None], ids=["few", "all"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections(name, heads, tmp_path):
    config_name, own = FUSED[name]
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {} if name == "gpt2" else sizes
    config = getattr(transformers, config_name)(vocab_size=96, pad_token_id=0, **sizes, **own)

    def build():
        transformers.set_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    try:
        model = randomize(attach(build(), heads=heads))
    except ValueError as error:
        pytest.skip(str(error))
    report = save_as_lora(model, tmp_path)
    if heads is None:
        # three times as many rows as input features, whose number is the rank then
        assert max(report.ranks.values()) == config.hidden_size
    torch.testing.assert_close(logits(load(build(), tmp_path)), logits(model), atol=2e-6, rtol=1e-5)
    assert (logits(model) - logits(build())).abs().max() > 1e-3


def test_tied_embeddings_stay_tied(tmp_path):
    model = randomize(attach(tiny_model(tie_word_embeddings=True)))
    save_as_lora(model, tmp_path)
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = load(tiny_model(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-6, rtol=1e-5)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def _compiled(model):
    return torch.compile(model, backend="eager")


def _compiled_inside(model):
    """Of a model that was compiled before it got its adapter, and a layer by itself."""
    model.base_model.model = _compiled(model.base_model.model)
    layers = model.get_base_model().model.layers
    layers[2] = _compiled(layers[2])
    return model


WRAPPED = {
    "compiled": _compiled,
    "compiled inside": _compiled_inside,
    "data parallel": nn.DataParallel,
    "compiled in data parallel": lambda model: nn.DataParallel(_compiled(model)),
    "compiled data parallel": lambda model: _compiled(nn.DataParallel(model)),
    "activation checkpointing": lambda model: (
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaAttention)) or model
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_wrapped_around_the_model_or_its_parts_is_not_in_the_file(name, tmp_path):
    model = randomize(attach(tiny_model(), modules_to_save=["norm"], trainable_token_indices=[3]))
    expected = convert_to_lora(model)
    wrapped = WRAPPED[name](model)
    report = save_as_lora(wrapped, tmp_path)
    assert report.ranks == expected_ranks(model.config, HEADS) and report == lora_report(wrapped)
    config, state_dict = convert_to_lora(wrapped)
    assert config == expected[0] and state_dict.keys() == expected[1].keys()
    assert all(torch.equal(tensor, expected[1][key]) for key, tensor in state_dict.items())
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == expected[1].keys()
    load(tiny_model(), tmp_path)


@needs_own_adapter_methods
def test_a_compiled_transformers_model_with_an_adapter_of_its_own():
    model = tiny_model()
    model.add_adapter(HeadSparseConfig(heads=HEADS))
    assert lora_report(_compiled(model)).ranks == expected_ranks(model.config, HEADS)


@needs_own_adapter_methods
def test_a_transformers_model_with_an_adapter_of_its_own(tmp_path):
    model = tiny_model()
    model.add_adapter(HeadSparseConfig(heads=HEADS, init_weights=False))
    save_as_lora(randomize(model), tmp_path)
    torch.testing.assert_close(logits(load(tiny_model(), tmp_path)), logits(model), atol=2e-6, rtol=1e-5)


def test_what_comes_back_is_no_part_of_the_model():
    model = randomize(attach(tiny_model(), modules_to_save=["norm"]))
    before = snapshot(model)
    config, state_dict = convert_to_lora(model)
    for tensor in state_dict.values():
        assert not tensor.requires_grad and tensor.is_contiguous()
        tensor.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    # and it can be put into a model in memory
    _, state_dict = convert_to_lora(model)
    other = get_peft_model(tiny_model(), config)
    set_peft_model_state_dict(other, state_dict)
    torch.testing.assert_close(logits(other), logits(model), atol=2e-6, rtol=1e-5)


def reference_errors(model, max_rank):
    """The Frobenius norms of the best approximation's error and of the delta, for each module, by Eckart and Young."""
    norms = {}
    for name, layer in model.base_model.model.named_modules():
        if layer in layers_of(model):
            singular = torch.linalg.svdvals(layer.get_delta_weight("default").double())
            norms[name] = (singular[max_rank:].norm().item(), singular.norm().item())
    return norms


@pytest.mark.parametrize("max_rank", [1, 7, 12, 23])
def test_max_rank_gives_the_best_approximation_and_says_how_good_it_is(max_rank, tmp_path, caplog):
    model = randomize(attach(tiny_model(), heads=OVERLAPPING))
    with caplog.at_level(logging.INFO, logger="p2d_peft"):
        report = save_as_lora(model, tmp_path, max_rank=max_rank)
    exact = expected_ranks(model.config, OVERLAPPING)
    assert report.ranks == {name: min(rank, max_rank) for name, rank in exact.items()}
    assert report == lora_report(model, max_rank=max_rank)
    best = reference_errors(model, max_rank)
    for name, (error, norm) in best.items():
        assert report.errors[name] == pytest.approx(error / norm, rel=1e-4, abs=1e-9)
        assert (report.errors[name] == 0.0) == (exact[name] <= max_rank)
    total = (
        torch.tensor([error for error, _ in best.values()]).norm() / torch.tensor([n for _, n in best.values()]).norm()
    )
    assert report.error == pytest.approx(total.item(), rel=1e-4)
    messages = [record.getMessage() for record in caplog.records]
    assert f"{report.error:.2e} as a whole" in messages[-1]
    assert sum("rank" in message for message in messages) == len(best) + 1
    # the file holds what the report says
    loaded = load(tiny_model(), tmp_path)
    for name, (_, norm) in best.items():
        here = model.base_model.model.get_submodule(name).get_delta_weight("default")
        there = loaded.base_model.model.get_submodule(name).get_delta_weight("default")
        assert (here - there).norm().item() / norm == pytest.approx(report.errors[name], rel=1e-3, abs=1e-7)


def test_max_rank_above_all_ranks_changes_nothing(caplog):
    model = randomize(attach(tiny_model(), heads=OVERLAPPING))
    with caplog.at_level(logging.INFO, logger="p2d_peft"):
        config, state_dict = convert_to_lora(model, max_rank=24)
    assert not caplog.records
    exact_config, exact = convert_to_lora(model)
    assert config == exact_config and all(torch.equal(state_dict[name], exact[name]) for name in exact)


def test_a_delta_of_low_rank_survives_its_truncation():
    model = attach(tiny_model(), heads={0: [0, 1], 1: [2, 3]}, init_weights=True)
    with torch.no_grad():
        for layer in layers_of(model):
            delta = layer.head_sparse_delta["default"].weight
            delta.copy_(torch.randn(delta.shape[0], 3) @ torch.randn(3, delta.shape[1]))
    report = lora_report(model, max_rank=3)
    assert set(report.ranks.values()) == {3} and report.error < 1e-6


def test_untrained_adapter_has_no_error():
    model = attach(tiny_model(), init_weights=True)
    report = lora_report(model, max_rank=2)
    assert report.error == 0.0 and set(report.errors.values()) == {0.0}


def test_errors():
    model = attach(tiny_model())
    with pytest.raises(ValueError, match=r"no adapter 'mine'; its adapters: \['default'\]"):
        convert_to_lora(model, "mine")
    for max_rank in (0, -1):
        with pytest.raises(ValueError, match=f"`max_rank` must be at least 1, got {max_rank}"):
            convert_to_lora(model, max_rank=max_rank)
    with pytest.raises(ValueError, match="no adapter 'default'"):
        convert_to_lora(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"type PeftType\.LORA|type LORA"):
        convert_to_lora(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])))


def test_a_merged_adapter_is_refused_and_others_are_not(tmp_path):
    model = randomize(attach(tiny_model(), heads=HEADS))
    model.add_adapter("other", HeadSparseConfig(heads={1: [2]}, init_weights=False))
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match=r"'default' is merged; call `unmerge_adapter\(\)` first"):
        save_as_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert lora_report(model, "other").ranks == expected_ranks(model.config, {1: [2]})
    model.unmerge_adapter()
    assert lora_report(model).error == 0.0
