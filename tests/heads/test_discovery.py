"""Which modules of a model are its attention, how they are numbered, and what is refused."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from p2d_peft import HeadSet, HeadSparseConfig
from p2d_peft.heads import AttentionLayout, ModelGeometry, layouts, register_attention_layout

from ..tiny_models import LAYOUTS, tiny_model


@pytest.fixture(autouse=True)
def _own_table(monkeypatch):
    monkeypatch.setattr(layouts, "_BY_CLASS", dict(layouts._BY_CLASS))


class Attention(nn.Module):
    """Someone's own: no config, no number, other names; 3 query heads of 4, one key/value head."""

    def __init__(self, fused=False):
        super().__init__()
        if fused:
            self.in_map = nn.Linear(10, 20)
        else:
            self.wq, self.wk, self.wv = nn.Linear(10, 12), nn.Linear(10, 4), nn.Linear(10, 4)
        self.wo = nn.Linear(12, 10)


class Core(Attention):
    pass


OWN = AttentionLayout(q="wq", k="wk", v="wv", o="wo", head_dim=4)
FUSED = AttentionLayout(q="in_map", k="in_map", v="in_map", o="wo", head_dim=4)


def blocks(*attentions):
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"mix": attention}) for attention in attentions)})


def test_a_registered_layout_does_for_plain_modules():
    model = blocks(Attention(), nn.Identity(), Attention(fused=True))
    register_attention_layout(Attention, OWN, FUSED)
    geometry = ModelGeometry.of(model)
    assert list(geometry) == [0, 2]
    assert (geometry[0].n_heads, geometry[0].n_kv_heads, geometry[0].head_dim) == (3, 1, 4)
    assert geometry[0].q.module == "blocks.0.mix.wq"
    assert geometry[2].v.module == "blocks.2.mix.in_map" and geometry[2].v.starts == (16,)
    assert list(ModelGeometry.of(Attention())) == [0]  # a bare module has no number


def test_a_name_registers_and_subclasses_inherit():
    register_attention_layout("Attention", OWN)
    assert list(ModelGeometry.of(blocks(Core()))) == [0]


def test_sizes_and_the_number_come_from_attributes_or_functions():
    attention = Attention()
    attention.depth, attention.width = 7, 4
    register_attention_layout(
        Attention,
        AttentionLayout("wq", "wk", "wv", "wo", head_dim="width", q_dim=lambda module: module.width, layer="depth"),
    )
    assert list(ModelGeometry.of(blocks(attention))) == [7]


def test_an_order_of_ones_own():
    def reversed_roles(sizes):
        """Values, keys, queries."""
        return {"v": [0], "k": [sizes.v], "q": [sizes.v + sizes.k + head * sizes.q for head in range(sizes.n_heads)]}

    register_attention_layout(Attention, AttentionLayout("in_map", "in_map", "in_map", "wo", 4, order=reversed_roles))
    attention = ModelGeometry.of(blocks(Attention(fused=True)))[0]
    assert (attention.q.starts, attention.k.starts, attention.v.starts) == ((8, 12, 16), (4,), (0,))


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (
            AttentionLayout("wq", "wk", "wv", "wo"),
            r"does not have the integer attribute `head_dim`.*wq \(Linear 10 -> 12\)",
        ),
        (AttentionLayout("wq", "wk", "wv", "wo", head_dim=5), r"widths \{'wq': 12, 'wk': 4, 'wv': 4\} \(out\) and 12"),
        (AttentionLayout("wq", "wk", "wv", "wo", head_dim=0), "the size 0"),
        (AttentionLayout("q", "k", "v", "o"), r"'blocks\.0\.mix' \(Attention\) is of no known layout"),
        (
            AttentionLayout("wq", "wk", "wv", "wo", 4, order=lambda sizes: {"q": [0, 4, 4], "k": [0], "v": [0]}),
            r"`order` does not cover 'blocks\.0\.mix\.wq' exactly once",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout, named):
    register_attention_layout(Attention, layout)
    with pytest.raises(ValueError, match=named):
        ModelGeometry.of(blocks(Attention()))


def test_a_registration_needs_a_layout():
    with pytest.raises(ValueError, match="`layouts` is empty"):
        register_attention_layout(Attention)


def test_the_projections_have_to_be_linear_layers():
    attention = Attention()
    attention.wk = nn.Conv1d(10, 4, 1)
    register_attention_layout(Attention, OWN)
    with pytest.raises(ValueError, match=r"the projection 'blocks\.0\.mix\.wk' of type Conv1d"):
        ModelGeometry.of(blocks(attention))


def test_unknown_attention_is_refused_with_what_was_found_and_what_to_do():
    model = blocks(Attention(), Attention())
    with pytest.raises(ValueError) as error:
        ModelGeometry.of(model)
    assert str(error.value) == (
        "Unsupported attention in `model` (ModuleDict): 'blocks.0.mix' (Attention) is of no known layout: it has wq (Linear "
        "10 -> 12), wk (Linear 10 -> 4), wv (Linear 10 -> 4), wo (Linear 12 -> 10) (and 1 more like it). If its heads are "
        "slices of linear layers, describe them with `p2d_peft.heads.register_attention_layout`."
    )


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.MultiheadAttention(8, 2), r"\(MultiheadAttention\).*in_proj_weight \(Parameter\)"),
        (
            nn.ModuleDict({"q_proj": nn.Linear(2, 2), "k_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)}),
            "no known layout",
        ),
        (
            # fused as in Bloom, or is it? The names of the projections do not tell.
            transformers.PersimmonForCausalLM(
                transformers.PersimmonConfig(
                    vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
                )
            ),
            r"PersimmonAttention\).*query_key_value \(Linear 16 -> 48\)",
        ),
    ],
)
def test_other_attention_is_refused(model, named):
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=named):
        ModelGeometry.of(model)
    assert [name for name, _ in model.named_modules()] == before


def _empty(auto_class, config, **changes):
    """A model of some 4 heads a layer, on the meta device."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    with torch.device("meta"):
        config = getattr(transformers, config)(vocab_size=96, num_key_value_heads=2, head_dim=4, **sizes, **changes)
        return getattr(transformers, auto_class).from_config(config)


GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "global_head_dim": 4}


@pytest.mark.parametrize(
    ("config", "changes", "lacks", "named"),
    [
        (
            "Gemma4TextConfig",
            {**GEMMA4, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2},
            "k_proj",
            r"'model\.layers\.1\.self_attn' \(Gemma4TextAttention\) does not project both keys and values of its own: it has",
        ),
        (
            "Gemma4TextConfig",
            {
                **GEMMA4,
                "num_kv_shared_layers": 0,
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "v_proj",
            r"'model\.layers\.1\.self_attn' .* does not project both keys and values of its own: it has .*k_proj",
        ),
        ("DiffLlamaConfig", {}, None, r"\(DiffLlamaAttention\) subtracts the attention of one half of its heads"),
    ],
)
def test_what_no_layout_describes_is_refused_without_the_advice_to_write_one(config, changes, lacks, named):
    model = _empty("AutoModelForCausalLM", config, **changes)
    if getattr(model.model.layers[1].self_attn, str(lacks), None) is not None:
        pytest.skip(f"transformers {transformers.__version__} has a {lacks} there")
    with pytest.raises(ValueError, match=named) as error:
        ModelGeometry.of(model)
    assert str(error.value).endswith("No layout can describe that; LoRA trains such a model.")


def test_keys_and_values_that_may_be_in_some_other_child_can_be_described():
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "o_proj": nn.Linear(2, 2), "kv": nn.Sequential(nn.Linear(2, 4))})
    model.__class__ = type("PairAttention", (nn.ModuleDict,), {})
    with pytest.raises(ValueError, match=r"\(PairAttention\) is of no known layout.*register_attention_layout"):
        ModelGeometry.of(model)


def test_who_describes_a_class_that_is_refused_has_the_last_word():
    model = _empty("AutoModelForCausalLM", "DiffLlamaConfig")
    register_attention_layout("DiffLlamaAttention", AttentionLayout())
    assert list(ModelGeometry.of(model)) == [0, 1]


def test_a_wrapper_of_unknown_attention_is_named_once_and_by_its_core():
    class OuterAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = Attention()

    with pytest.raises(ValueError, match=r"'core' \(Attention\)") as error:
        ModelGeometry.of(OuterAttention())
    assert "more like it" not in str(error.value)


def test_wrapped_attention_is_found_once():
    geometry = ModelGeometry.of(LAYOUTS["bert"].model())
    assert [attention.name for attention in geometry.values()] == [
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.self",
    ]


def test_adapters_may_be_attached():
    model = tiny_model()
    before = ModelGeometry.of(model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    assert ModelGeometry.of(model) == before


def test_classes_made_on_the_fly_keep_their_layout():
    """FSDP2 makes a subclass with a name of its own."""
    model = LAYOUTS["phi3"].model()
    before = ModelGeometry.of(model)
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("FSDPPhi3Attention", (type(layer.self_attn),), {})
    assert ModelGeometry.of(model) == before


def test_linear_attention_has_no_heads():
    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
    config = transformers.MiniMaxConfig(
        **sizes, num_hidden_layers=2, num_key_value_heads=1, layer_types=["linear_attention", "full_attention"]
    )
    assert list(ModelGeometry.of(transformers.AutoModelForCausalLM.from_config(config))) == [1]


def _bert(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertConfig(vocab_size=96, **sizes, **changes)


def _gpt2_with_cross_attention():
    config = transformers.GPT2Config(vocab_size=96, n_embd=16, n_head=2, n_layer=1, add_cross_attention=True)
    return transformers.GPT2LMHeadModel(config)


STACKS = {
    "GPT-2 with cross-attention": (_gpt2_with_cross_attention, ["cross.0", "decoder.0"]),
    "BERT as a decoder": (
        lambda: transformers.BertLMHeadModel(_bert(is_decoder=True, add_cross_attention=True)),
        ["cross.0", "decoder.0"],
    ),
    "two BERTs": (
        lambda: transformers.EncoderDecoderModel(
            transformers.EncoderDecoderConfig.from_encoder_decoder_configs(_bert(), _bert())
        ),
        ["cross.0", "decoder.0", "encoder.0"],
    ),
    "BART's encoder": (lambda: LAYOUTS["bart"].model().model.encoder, [0, 1]),
    "BART's decoder": (
        lambda: LAYOUTS["bart"].model().model.decoder,
        ["cross.0", "cross.1", "decoder.0", "decoder.1"],
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_are_named_for_what_they_do(name):
    build, layers = STACKS[name]
    assert list(ModelGeometry.of(build())) == layers


def test_cross_attention_of_gpt2_has_its_queries_apart():
    cross = ModelGeometry.of(_gpt2_with_cross_attention())["cross.0"]
    assert (cross.q.module, cross.q.starts) == ("transformer.h.0.crossattention.q_attn", (0, 8))
    assert (cross.k.module, cross.k.starts) == ("transformer.h.0.crossattention.c_attn", (0, 8))
    assert (cross.v.module, cross.v.starts) == ("transformer.h.0.crossattention.c_attn", (16, 24))


def test_stacks_that_cannot_be_told_apart_are_refused():
    model = nn.ModuleDict({"vision": tiny_model().model, "text": tiny_model().model})
    with pytest.raises(ValueError, match=r"'text\.layers\.0\.self_attn'.*and 'vision\.layers\.0\.self_attn'"):
        ModelGeometry.of(model)
    model = nn.ModuleDict({"encoder": tiny_model().model, "text": tiny_model().model})
    with pytest.raises(ValueError, match="cannot be told apart"):
        ModelGeometry.of(model)


def test_needs_no_weights():
    model = LAYOUTS["gpt2"].model()
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert ModelGeometry.of(empty) == ModelGeometry.of(model)


def vision_language_model():
    """A tiny Qwen2.5-VL."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 100}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1]}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 16}
    tokens = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def test_beside_a_language_model_other_towers_are_left_out():
    model = vision_language_model()
    names = ["model.language_model.layers.0.self_attn", "model.language_model.layers.1.self_attn"]
    assert [attention.name for attention in ModelGeometry.of(model).values()] == names
    adapted = get_peft_model(model, HeadSparseConfig(heads=HeadSet([(1, 2)])))
    assert [attention.name for attention in ModelGeometry.of(adapted).values()] == [
        f"base_model.model.{name}" for name in names
    ]


def test_where_both_towers_are_the_model_none_is_chosen():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="cannot be told apart"):
        ModelGeometry.of(transformers.CLIPModel(transformers.CLIPConfig(text_config=sizes, vision_config=sizes)))
