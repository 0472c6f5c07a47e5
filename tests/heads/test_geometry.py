import pytest
import torch
import transformers

from p2d_peft.heads import HeadSet, ModelGeometry

from ..tiny_models import ARCHITECTURES, FEW, random_batch, tiny_model


def head_outputs(model, layer, batch):
    """The input of a layer's output projection, split by heads: (B, T, H, D). Knows nothing of the geometry."""
    attention = model.model.layers[layer].self_attn
    seen = []
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    n_heads = model.config.num_attention_heads
    return seen[0].unflatten(-1, (n_heads, -1))


def changed_heads(before, after):
    return {head for head in range(before.shape[2]) if not torch.equal(before[:, :, head], after[:, :, head])}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_slices_of_a_head_change_its_output_and_no_other(name):
    model = tiny_model(name)
    geometry = ModelGeometry.of(model)
    config = model.config
    assert geometry.shape == (config.num_hidden_layers, config.num_attention_heads)
    for block in model.model.layers:
        if name == "olmo2":  # its norms span all heads of a layer, so through them every head sees every other
            block.self_attn.q_norm = block.self_attn.k_norm = torch.nn.Identity()
    batch = random_batch()
    layer, per_group = 1, config.num_attention_heads // config.num_key_value_heads
    before = head_outputs(model, layer, batch)
    attention = geometry[layer]
    for head in range(config.num_attention_heads):
        group = {other for other in range(config.num_attention_heads) if other // per_group == head // per_group}
        for role, expected in (("q", {head}), ("k", group), ("v", group)):
            weight = model.get_submodule(attention.units(role).module).weight
            saved = weight.detach().clone()
            with torch.no_grad():
                # not a mere rescaling, which a q/k norm would undo
                rows = weight[attention.head_slice(role, head)]
                rows.add_(torch.randn_like(rows) * rows.std())
                assert changed_heads(before, head_outputs(model, layer, batch)) == expected, (role, head)
                weight.copy_(saved)


@pytest.mark.parametrize("name", FEW)
def test_the_columns_of_o_read_the_head_and_nothing_else(name):
    model = tiny_model(name)
    attention = ModelGeometry.of(model)[1]
    o_proj = model.get_submodule(attention.o.module)
    n_heads = model.config.num_attention_heads
    for head in range(n_heads):
        x = torch.zeros(n_heads, o_proj.in_features // n_heads)
        x[head] = 1
        with torch.no_grad():
            output = o_proj(x.flatten()) - o_proj(torch.zeros(o_proj.in_features))
            expected = o_proj.weight[:, attention.head_slice("o", head)].sum(1)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", FEW)
def test_all_slices_together_cover_each_projection_exactly_once(name):
    model = tiny_model(name)
    for attention in ModelGeometry.of(model).values():
        for role in ("q", "k", "v", "o"):
            units = attention.units(role)
            indices = units.indices(range(len(units.starts)))
            assert indices.tolist() == list(range(model.get_submodule(units.module).weight.shape[units.dim]))


def test_groups_are_taken_once_and_in_order():
    attention = ModelGeometry.of(tiny_model("llama"))[0]  # 4 heads, 2 groups
    assert attention.units_of("q", [3, 0]) == [0, 3]
    assert attention.units_of("k", [3, 2, 0]) == [0, 1]
    assert attention.k.indices([1, 0]).tolist() == list(range(24))


def test_needs_no_weights():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_model().config)
    assert ModelGeometry.of(model) == ModelGeometry.of(tiny_model())


def test_hybrids_keep_the_layer_numbers():
    config = transformers.JambaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        pad_token_id=0,
    )
    geometry = ModelGeometry.of(transformers.AutoModelForCausalLM.from_config(config))
    assert list(geometry) == [1, 3]
    assert geometry.heads.layers == (1, 3)
    with pytest.raises(ValueError, match=r"\(2, 0\), but layer 2 has no heads; layers: 1, 3\."):
        geometry.check(HeadSet([(2, 0)]))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            transformers.GPT2Config(vocab_size=96, n_embd=16, n_head=2, n_layer=1),
            r"'transformer\.h\.0\.attn' \(GPT2Attention\) has the children .*c_attn",
        ),
        (
            transformers.Phi3Config(
                vocab_size=96,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                pad_token_id=0,
            ),
            r"Phi3Attention\) has the children \['o_proj', 'qkv_proj'\]",
        ),
        (
            transformers.OPTConfig(
                vocab_size=96, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2
            ),
            r"OPTAttention\).*and 1 more like it",
        ),
        (
            transformers.Qwen3NextConfig(
                vocab_size=96,
                hidden_size=16,
                num_hidden_layers=1,
                layer_types=["full_attention"],
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                num_experts=2,
            ),
            r"Qwen3NextAttention\) has projections of widths \{'q': 32, 'k': 16, 'v': 16\}",
        ),
    ],
)
def test_other_attention_is_refused_by_name(config, named):
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=named):
        ModelGeometry.of(model)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="no attention heads"):
        ModelGeometry.of(torch.nn.Linear(3, 3))


def test_check_names_the_head_and_the_range():
    geometry = ModelGeometry.of(tiny_model())
    assert geometry.check(geometry.heads) == geometry.heads
    assert len(geometry.heads) == 12
    with pytest.raises(ValueError, match=r"\(1, 4\), but layer 1 has the heads 0 to 3"):
        geometry.check(HeadSet([(0, 0), (1, 4)]))
    with pytest.raises(ValueError, match=r"\(3, 0\), but layer 3 has no heads; layers: 0 to 2"):
        geometry.check(HeadSet([(3, 0)]))
    with pytest.raises(ValueError, match="empty"):
        geometry.check(HeadSet())
