"""What PEFT and transformers do with an adapter, end to end."""

import copy

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter

from p2d_peft.tuners import HeadSparseConfig
from tests.model_checks import needs_own_adapter_methods
from tests.tiny_models import random_batch, tiny_model
from tests.tuners.head_sparse.test_layer import bits
from tests.tuners.head_sparse.test_model import HEADS, attach, layers_of, logits, randomize


def loss_and_gradients(model, **batch):
    loss = model(**(batch or random_batch())).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients


@pytest.mark.parametrize("r", [None, 2])
def test_gradient_checkpointing_changes_no_bit(r):
    plain = attach(tiny_model(), r=r).train()
    loss, gradients = loss_and_gradients(plain)
    for use_reentrant in (True, False):
        model = attach(tiny_model(), r=r).train()
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
                parameter.copy_(other)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        checkpointed_loss, checkpointed = loss_and_gradients(model)
        assert torch.equal(checkpointed_loss, loss)
        for name, gradient in gradients.items():
            assert gradient.count_nonzero() and torch.equal(checkpointed[name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("r", [None, 2])
def test_compiles_into_one_graph(r):
    model = attach(tiny_model(use_cache=False), r=r)
    expected, gradients = loss_and_gradients(model)
    model.zero_grad()
    # "eager" runs what dynamo captured as it is; `fullgraph` raises at a graph break
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, compiled_gradients = loss_and_gradients(compiled)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients["_orig_mod." + name], gradient, atol=1e-6, rtol=1e-4)


def test_traces_and_saves(tmp_path):
    # the layers alone: not every version of transformers has models that can be traced
    for number, layer in enumerate(layers_of(attach(tiny_model()))):
        x = torch.randn(2, 3, layer.in_features)
        with torch.no_grad():
            torch.jit.trace(layer, (x,)).save(tmp_path / f"{number}.pt")
            assert torch.equal(torch.jit.load(tmp_path / f"{number}.pt")(x), layer(x))


@needs_own_adapter_methods
def test_transformers_own_adapter_methods(tmp_path):
    base = tiny_model()
    expected_base = logits(base)
    base.add_adapter(HeadSparseConfig(heads=HEADS, init_weights=False), adapter_name="one")
    one = logits(base)
    base.add_adapter(HeadSparseConfig(heads=[0], init_weights=False), adapter_name="two")
    base.set_adapter("two")
    two = logits(base)
    assert base.active_adapters() == ["two"]
    assert not torch.equal(one, expected_base) and not torch.equal(two, one)
    base.set_adapter("one")
    assert torch.equal(logits(base), one)
    base.disable_adapters()
    assert torch.equal(logits(base), expected_base)
    base.enable_adapters()
    assert torch.equal(logits(base), one)

    base.save_pretrained(tmp_path)  # of an active adapter, that alone
    other = tiny_model()
    other.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(bits(logits(other)), bits(one))
    base.delete_adapter("one")
    base.set_adapter("two")
    assert torch.equal(logits(base), two)
    assert all(set(layer.head_sparse_slice) <= {"two"} for layer in layers_of(base))


def test_auto_class_and_the_hub_format(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomize(attach(base))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    # transformers finds the adapter's base model by itself
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


def test_device_map(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = randomize(attach(tiny_model()))
    model.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / "adapter", device_map={"": "cpu"}, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("r", [None, 3])
def test_low_cpu_mem_usage_makes_parameters_on_the_meta_device(r):
    model = inject_adapter_in_model(HeadSparseConfig(heads=HEADS, r=r), tiny_model(), low_cpu_mem_usage=True)
    deltas = [p for name, p in model.named_parameters() if ".head_sparse_" in name]
    assert deltas and all(p.is_meta for p in deltas)
    trained = randomize(attach(tiny_model(), r=r))
    state = get_peft_model_state_dict(trained)
    result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model), logits(trained))


def test_weights_are_swapped_in_place(tmp_path):
    """An adapter on the same heads takes the place of another without a new parameter, so compiled code stays valid."""
    model, other = randomize(attach(tiny_model())), randomize(attach(tiny_model()), std=0.1)
    before = dict(model.named_parameters())
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(logits(model), logits(other))
    assert all(p is before[name] for name, p in model.named_parameters())
    # PEFT's function for it scales as LoRA does, and says so
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")


TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "llama", {}),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "llama", {"labels": torch.tensor([0, 1])}),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "llama", {"labels": torch.zeros(2, 11, dtype=torch.long)}),
    "QUESTION_ANS": (
        "AutoModelForQuestionAnswering",
        "llama",
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
    "FEATURE_EXTRACTION": ("AutoModel", "llama", {}),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "t5", {}),
}


@pytest.mark.parametrize("task_type", TASKS)
def test_task_types(task_type, tmp_path):
    auto_class, kind, extra = TASKS[task_type]

    def base():
        transformers.set_seed(0)
        if kind == "t5":
            config = transformers.T5Config(
                vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        else:
            config = tiny_model().config
        return getattr(transformers, auto_class).from_config(config).eval()

    batch = {key: value for key, value in random_batch().items() if key != "labels"} | extra
    if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        batch["labels"] = batch["input_ids"]
    heads = {"encoder.0": [1], "cross.1": [0, 3]} if kind == "t5" else {0: [1], 2: [3]}
    config = HeadSparseConfig(task_type=task_type, heads=heads, init_weights=False)
    model = get_peft_model(base(), config).eval()
    output = model(**batch)
    (output.loss if "loss" in output else output[0].sum()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) >= 2 * 4 and all(p.grad is not None for p in trained)
    assert any("modules_to_save" in name for name, _ in model.named_parameters()) == (
        task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert type(loaded) is type(model) and loaded.peft_config["default"].heads == heads
    first = "logits" if "logits" in output else next(key for key in output if key != "loss")
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[first], model(**batch)[first])


def test_trained_tokens_and_biases(tmp_path):
    model = attach(tiny_model("qwen2"), trainable_token_indices=[3, 5], bias="head_sparse_only")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    biases = {name for name in trained if name.endswith("bias")}
    # Qwen 2 has biases on q, k and v
    assert len(biases) == 3 * len(HEADS)
    assert {name.split(".head_sparse")[0].rsplit(".", 1)[1] for name in trained - biases if "head_sparse" in name} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert any("trainable_tokens_delta" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path)), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    assert not any("trainable_tokens" in name for name, _ in merged.named_parameters())
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model = attach(tiny_model("qwen2"), bias="all")
        model.add_adapter("other", HeadSparseConfig(bias="all"))


def test_tied_weights_stay_tied_and_are_left_alone():
    base = tiny_model(tie_word_embeddings=True)
    before = base.lm_head.weight.detach().clone()
    merged = attach(base).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and torch.equal(merged.lm_head.weight, before)

    # two projections that share a weight: an adapter merged into one of them is in both, as the weight is one
    base = tiny_model()
    layers = base.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    model = attach(base, heads={0: [1]})
    model.merge_adapter()
    q_projs = [layers[0].self_attn.q_proj.base_layer.weight, layers[1].self_attn.q_proj.weight]
    assert q_projs[0] is q_projs[1]
    model.unmerge_adapter()
    assert q_projs[0] is layers[1].self_attn.q_proj.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_adapter_dtype_and_autocast(dtype):
    config = HeadSparseConfig(heads=HEADS, init_weights=False)
    lifted = get_peft_model(tiny_model(dtype=dtype), config)
    kept = get_peft_model(tiny_model(dtype=dtype), config, autocast_adapter_dtype=False)
    for model, expected in ((lifted, torch.float32), (kept, dtype)):
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
        assert logits(model).dtype == dtype
        _, gradients = loss_and_gradients(model)
        assert {gradient.dtype for gradient in gradients.values()} == {expected}
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(attach(tiny_model()))
    assert loss.isfinite() and {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def test_prepared_for_kbit_training():
    base = prepare_model_for_kbit_training(tiny_model(dtype=torch.bfloat16))
    _, gradients = loss_and_gradients(attach(base).train())
    assert gradients and all(gradient.count_nonzero() for gradient in gradients.values())
