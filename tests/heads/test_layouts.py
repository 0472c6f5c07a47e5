"""The slices of every layout against what its model computes, and HeadSparse on every layout."""

import copy
from typing import get_args

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from p2d_peft import HeadSparseConfig, localize_heads
from p2d_peft.heads import HeadSet, ModelGeometry
from p2d_peft.heads.geometry import ROLES, ROWS
from p2d_peft.heads.localize import LocalizeMethod

from ..benchmark_files import load_benchmark
from ..tiny_models import LAYOUTS, SIBLINGS, random_batch, tiny_model


ALL = LAYOUTS | SIBLINGS
CASES = [(name, layer) for name, layout in ALL.items() for layer in layout.projections]


def linear_weight(module):
    """A projection's weight as a view of shape (out_features, in_features)."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


@torch.no_grad()
def head_outputs(model, layout, layer):
    """The input of a layer's output projection, split by heads: (B, T, H, D). Knows nothing of the geometry."""
    seen = []
    projection = model.get_submodule(layout.projections[layer])
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    model(**layout.batch())
    handle.remove()
    return seen[0].unflatten(-1, (layout.n_heads, -1))


def changed_heads(before, after):
    return {head for head in range(before.shape[2]) if not torch.equal(before[:, :, head], after[:, :, head])}


def perturb(weight, rows):
    # not a mere rescaling, which a q/k norm would undo
    weight[rows] += torch.randn_like(weight[rows]) * weight.std()


def without_wide_norms(model, name):
    if name.startswith("olmo"):  # its norms span all heads of a layer, so through them every head sees every other
        for attention in (block.self_attn for block in model.model.layers if hasattr(block, "self_attn")):
            attention.q_norm = attention.k_norm = torch.nn.Identity()
    return model


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_the_slices_of_a_head_change_its_output_and_no_other(name, layer):
    layout = ALL[name]
    model = without_wide_norms(layout.model(), name)
    attention = ModelGeometry.of(model)[layer]
    assert (attention.n_heads, attention.n_kv_heads) == (layout.n_heads, layout.groups)
    assert attention.o.module == layout.projections[layer]
    before = head_outputs(model, layout, layer)
    assert before.shape[-1] == attention.head_dim

    per_group = layout.n_heads // layout.groups
    for head in range(layout.n_heads):
        group = {other for other in range(layout.n_heads) if other // per_group == head // per_group}
        for role, expected in (("q", {head}), ("k", group), ("v", group)):
            weight = linear_weight(model.get_submodule(attention.units(role).module))
            saved = weight.clone()
            perturb(weight, attention.head_slice(role, head))
            assert changed_heads(before, head_outputs(model, layout, layer)) == expected, (role, head)
            weight.copy_(saved)
    assert not changed_heads(before, head_outputs(model, layout, layer))

    for role in ("q", "k", "v"):
        for head in range(layout.n_heads):
            perturb(linear_weight(model.get_submodule(attention.units(role).module)), attention.head_slice(role, head))
    assert changed_heads(before, head_outputs(model, layout, layer)) == set(range(layout.n_heads))


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_the_columns_of_o_read_the_head_and_nothing_else(name, layer):
    layout = ALL[name]
    model = layout.model()
    attention = ModelGeometry.of(model)[layer]
    projection = model.get_submodule(layout.projections[layer])
    weight = linear_weight(projection)
    for head in range(layout.n_heads):
        x = torch.zeros(layout.n_heads, weight.shape[1] // layout.n_heads)
        x[head] = 1
        with torch.no_grad():
            output = projection(x.flatten()[None]) - projection(torch.zeros(1, x.numel()))
        torch.testing.assert_close(output[0], weight[:, attention.head_slice("o", head)].sum(1))


@pytest.mark.parametrize("name", ALL)
def test_the_slices_cover_each_projection_exactly_once(name):
    model = ALL[name].model()
    for attention in ModelGeometry.of(model).values():
        indices = {}
        for role in ROLES:
            units = attention.units(role)
            assert len(units.starts) == (attention.n_kv_heads if role in ("k", "v") else attention.n_heads)
            own = units.indices(range(len(units.starts))).tolist()
            indices.setdefault((units.module, units.dim), []).extend(own)
        for (module, dim), covered in indices.items():
            assert sorted(covered) == list(range(linear_weight(model.get_submodule(module)).shape[dim])), module


@pytest.mark.parametrize("half", [0, 1])
def test_a_gated_query_is_of_one_head_with_its_gate(half):
    """Of the rows of a head's query projection, the first half are its queries and the second its output gate."""
    layout = LAYOUTS["qwen3-next"]
    model = layout.model()
    attention = ModelGeometry.of(model)[1]
    before = head_outputs(model, layout, 1)
    rows = attention.head_slice("q", 2)
    assert rows.stop - rows.start == 2 * attention.head_dim
    start = rows.start + half * attention.head_dim
    perturb(model.get_submodule(attention.q.module).weight.data, slice(start, start + attention.head_dim))
    assert changed_heads(before, head_outputs(model, layout, 1)) == {2}


@torch.no_grad()
def run(model, layout):
    return model(**layout.batch())[0]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_head_sparse_changes_the_slices_of_its_head_and_nothing_else(name, layer):
    layout = ALL[name]
    # Frozen, as PEFT freezes it: PyTorch rounds differently in Jamba's Mamba layers where no weight wants a gradient.
    model = layout.model().requires_grad_(False)
    attention = ModelGeometry.of(model)[layer]
    before, weights = run(model, layout), copy.deepcopy(model.state_dict())
    heads = HeadSet([(layer, 2)])

    adapted = get_peft_model(model, HeadSparseConfig(heads=heads))
    assert torch.equal(run(adapted, layout), before)
    model = adapted.unload()

    expected = {}
    for role in ROLES:
        units = attention.units(role)
        nothing = torch.zeros_like(linear_weight(model.get_submodule(units.module)), dtype=torch.bool)
        lines = attention.head_slice(role, 2)
        expected.setdefault(units.module, nothing)[lines if units.dim == ROWS else (slice(None), lines)] = True
    adapted = get_peft_model(model, HeadSparseConfig(heads=heads, init_weights=False))
    output = run(adapted, layout)
    assert not torch.equal(output, before)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(run(merged, layout), output, atol=1e-5, rtol=1e-4)
    for key, weight in merged.state_dict().items():
        module, _, parameter = key.rpartition(".")
        if parameter == "weight" and module in expected:
            differs = weight != weights[key]
            if isinstance(merged.get_submodule(module), Conv1D):
                differs = differs.T
            assert torch.equal(differs, expected.pop(module)), module
        else:
            assert torch.equal(weight, weights[key]), key
    assert not expected


def test_addresses_of_several_stacks_survive_saving(tmp_path):
    layout = LAYOUTS["t5"]
    heads = HeadSet([("encoder.0", 1), ("cross.1", 2), ("decoder.0", 3)])
    adapted = get_peft_model(layout.model(), HeadSparseConfig(heads=heads, init_weights=False))
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(layout.model(), tmp_path)
    assert loaded.peft_config["default"].heads == heads.by_layer()
    assert torch.equal(run(loaded, layout), run(adapted, layout))


@pytest.mark.parametrize("method", [method for method in get_args(LocalizeMethod) if method != "random"])
def test_a_model_in_another_layout_gets_the_same_scores(method):
    llama, batch = tiny_model(), random_batch()
    phi3 = load_benchmark("fused_layout").phi3_of(llama)
    with torch.no_grad():
        torch.testing.assert_close(phi3(**batch).logits, llama(**batch).logits)
    scores = [localize_heads(model, [batch, random_batch(seed=1)], method=method).values for model in (llama, phi3)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-3, atol=0)


def test_taylor_reads_transposed_weights_the_right_way():
    model, batch = LAYOUTS["gpt2"].model(), random_batch(rows=1)
    model(**batch).loss.backward()
    attention = model.transformer.h[1].attn
    fused, output = (
        (layer.weight.grad * layer.weight).detach().abs() for layer in (attention.c_attn, attention.c_proj)
    )
    own = slice(24, 36)  # head 2 of 4, D = 12, in each of the blocks of 48
    expected = sum(fused[:, block : block + 48][:, own].sum() for block in (0, 48, 96)) + output[own].sum()
    scores = localize_heads(LAYOUTS["gpt2"].model(), [batch], method="taylor")
    assert float(scores.values[1, 2]) == pytest.approx(float(expected), rel=1e-4)
