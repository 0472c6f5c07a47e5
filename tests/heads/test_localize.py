import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset

from p2d_peft import P2DConfig
from p2d_peft.heads import HeadSet, ModelGeometry, localize_heads
from p2d_peft.heads.localize import LocalizeMethod, needs_weights

from ..model_checks import assert_unchanged, mixed_state, snapshot
from ..tiny_models import ARCHITECTURES, FEW, LAYOUTS, random_batch, tiny_model


METHODS = get_args(LocalizeMethod)
BLIND = ("magnitude", "random")  # look at no sample
SEEING = tuple(method for method in METHODS if method not in BLIND)
SIGNED = ("ablation", "trained")
SLOW = ("ablation", "trained")  # passes for each head
PAGE = Path(__file__).parents[2] / "docs" / "localization.md"
PER_SAMPLE = tuple(method for method in SEEING if method != "proxy")


def text_to_text(rows=3, padding=0, seed=0):
    """A batch for an encoder-decoder; sources and labels are of different lengths."""
    source, target = random_batch(rows, 9, seed, padding), random_batch(rows, 6, seed + 1, min(padding, 2))
    return {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": target["labels"]}


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for method in METHODS for name in (FEW if method in SLOW else ARCHITECTURES)],
)
def test_every_head_gets_a_finite_score_and_the_model_stays_as_it_was(name, method):
    model = mixed_state(tiny_model(name))
    before = snapshot(model)
    scores = localize_heads(model, [random_batch(padding=3), random_batch(seed=1)], method=method, seed=3)
    assert_unchanged(model, before)
    assert scores.values.shape == (3, 4) and scores.values.isfinite().all()
    assert (scores.values >= 0).all() or method in SIGNED
    assert len(scores.values.unique()) > 1
    assert (scores.method, scores.seed, scores.n_samples) == (method, 3, None if method in BLIND else 4)
    assert len(scores.top(0.25)) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox", "falcon-gqa", "codegen", "phi3", "qwen3-next", "deepseek-v3", "jamba"]
)
def test_heads_are_localized_in_other_layouts(name, method):
    model = LAYOUTS[name].model()
    before = snapshot(model)
    scores = localize_heads(model, [random_batch()], method=method)
    assert_unchanged(model, before)
    geometry = ModelGeometry.of(model)
    assert scores.n_heads == len(geometry.heads)
    assert all(scores.values[head] > 0 or method in SIGNED for head in geometry.heads)
    assert all(scores.values[head] != 0 for head in geometry.heads)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_heads_are_localized_in_encoder_decoders(name, method):
    model = LAYOUTS[name].model()
    before = snapshot(model)
    scores = localize_heads(model, [text_to_text()], method=method)
    assert_unchanged(model, before)
    assert scores.layers == ("cross.0", "cross.1", "decoder.0", "decoder.1", "encoder.0", "encoder.1")
    assert scores.values.shape == (6, 4) and len(scores.values.unique()) > 20
    heads = scores.top(k=5)
    assert heads <= ModelGeometry.of(model).heads
    best = scores.values.flatten().argmax().item()
    assert (scores.layers[best // 4], best % 4) in heads


@pytest.mark.parametrize("method", PER_SAMPLE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_neither_batching_nor_padding_changes_the_scores_of_samples(name, method):
    batch = random_batch(rows=4, padding=4)
    together = localize_heads(LAYOUTS[name].model(), [batch], method=method).values
    one_by_one = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)]
    one_by_one[3] = {key: value[:, :7] for key, value in one_by_one[3].items()}
    alone = localize_heads(LAYOUTS[name].model(), one_by_one, method=method).values
    torch.testing.assert_close(alone, together, rtol=2e-4, atol=1e-6 if method in SIGNED else 1e-9)
    wide = {key: torch.nn.functional.pad(batch[key], (5, 0), value=fill) for key, fill in PADDING.items()}
    on_the_left = localize_heads(LAYOUTS[name].model(), [wide], method=method).values
    torch.testing.assert_close(on_the_left, together, rtol=2e-4, atol=1e-6 if method in SIGNED else 1e-9)


PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


@pytest.mark.parametrize("method", PER_SAMPLE)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_does_not_change_the_scores_in_encoder_decoders(name, method):
    batch = text_to_text(rows=2)
    wide = {key: torch.nn.functional.pad(value, (0, 4), value=PADDING[key]) for key, value in batch.items()}
    scores = [localize_heads(LAYOUTS[name].model(), [b], method=method).values for b in (batch, wide)]
    torch.testing.assert_close(scores[1], scores[0], rtol=2e-4, atol=1e-6 if method in SIGNED else 1e-9)


@pytest.mark.parametrize("method", SEEING)
def test_the_first_label_counts_in_encoder_decoders_alone(method):
    labels = torch.full((4, 6), -100)
    labels[:, 0] = torch.tensor([5, 6, 7, 8])
    batch = {**text_to_text(rows=4), "labels": labels}
    scores = localize_heads(LAYOUTS["t5"].model(), [batch], method=method)
    # with one token to attend to, q and k of the decoder's own attention get no gradient; the others do
    assert scores.values.isfinite().all() and (scores.values[:2] != 0).all()
    causal = {**random_batch(rows=4, tokens=6), "labels": labels}
    with pytest.raises(ValueError, match="no sample with a token that counts"):
        localize_heads(tiny_model(), [causal], method=method)


@pytest.mark.parametrize("method", SEEING)
def test_the_model_stays_as_it_was_when_a_pass_raises(method):
    model = mixed_state(tiny_model())

    def batches():
        yield random_batch()
        raise RuntimeError("reader died")

    before = snapshot(model)
    with pytest.raises(RuntimeError, match="reader died"):
        localize_heads(model, batches(), method=method)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", SEEING)
def test_the_model_stays_as_it_was_when_it_raises(method):
    """At a time when hooks are on the model, weights are changed and gradients are required."""
    model = mixed_state(tiny_model())
    before = snapshot(model)
    passes, last = [], LAST_PASS.get(method, 3)

    def fail(module, args):
        passes.append(module)
        if len(passes) == last:
            raise RuntimeError("device died")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device died"):
        localize_heads(model, [random_batch(seed=seed) for seed in range(3)], method=method)
    handle.remove()
    assert len(passes) == last
    assert_unchanged(model, before)


# 3 passes over what is held out, then 3 a step
LAST_PASS = {"trained": 8}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_scores(method):
    runs = [localize_heads(tiny_model(), [random_batch()], method=method, seed=7).values for _ in range(2)]
    assert torch.equal(*runs)


def test_a_seed_of_numpy_is_kept_as_an_integer():
    scores = localize_heads(tiny_model(), [], method="random", seed=np.int64(3))
    expected = localize_heads(tiny_model(), [], method="random", seed=3)
    assert type(scores.seed) is int and torch.equal(scores.values, expected.values)


def test_random_depends_on_the_seed_alone():
    a, b = (localize_heads(tiny_model(seed=s), [random_batch(seed=s)], method="random", seed=1) for s in (0, 1))
    other = localize_heads(tiny_model(), [random_batch()], method="random", seed=2)
    assert torch.equal(a.values, b.values) and not torch.equal(a.values, other.values)


def test_bf16_models_move_in_the_proxy_run_and_come_back():
    model = tiny_model(dtype=torch.bfloat16)
    before = snapshot(model)
    scores = localize_heads(model, [random_batch()], method="proxy")
    assert_unchanged(model, before)
    assert (scores.values > 0).all()


# not `agreement` and not the differences of losses, whose noise is that of bfloat16
@pytest.mark.parametrize("method", ["proxy", "taylor", "gate", "fisher", "gain", "gain_sgd", "magnitude", "random"])
def test_scores_under_autocast_are_close_to_those_without(method):
    exact = localize_heads(tiny_model(), [random_batch(rows=8)], method=method).values.flatten()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = localize_heads(tiny_model(), [random_batch(rows=8)], method=method).values.flatten()
    assert torch.corrcoef(torch.stack([rounded, exact]))[0, 1] > 0.9


@pytest.mark.parametrize("method", ["proxy", "gate", "taylor"])
def test_the_callers_no_grad_and_what_else_a_collator_hands_on_change_nothing(method):
    batch = random_batch()
    expected = localize_heads(tiny_model(), [batch], method=method).values
    batch |= {"text": ["one", "two"], "num_items_in_batch": torch.tensor(20)}
    with torch.no_grad():
        assert torch.equal(localize_heads(tiny_model(), [batch], method=method).values, expected)


@pytest.mark.parametrize("method", ["ablation", "gate"])
def test_compiled_layers_have_the_scores_of_others(method):
    model, batch = tiny_model(), random_batch()
    expected = localize_heads(model, [batch], method=method).values
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        model(**batch)
    assert torch.equal(localize_heads(model, [batch], method=method).values, expected)


def test_eight_bit_floats_are_quantized_weights():
    model = tiny_model()
    model.model.layers[1].self_attn.q_proj.weight.data = torch.zeros(32, 32).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8"):
        localize_heads(model, [], method="magnitude")


def test_heads_whose_output_is_thrown_away_score_nothing_by_taylor():
    model = tiny_model("llama-mha-bias")
    columns = ModelGeometry.of(model)[1].head_slice("o", 2)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, columns] = 0
    scores = localize_heads(model, [random_batch()], method="taylor").values
    assert scores[1, 2] == 0 and (scores > 0).sum() == 11


def test_missing_layers_stay_missing():
    scores = localize_heads(_hybrid(), [random_batch()], method="random")
    assert scores.values[0].isnan().all() and scores.values[1].isfinite().all()
    assert scores.n_heads == 4


def _hybrid():
    # a model whose first layer has no attention: an attention-free stand-in is enough for `random`
    model = tiny_model()
    model.model.layers[0].self_attn = torch.nn.Identity()
    model.model.layers[2].self_attn = torch.nn.Identity()
    return model


def test_errors_name_the_argument_and_the_way_out():
    model = tiny_model()
    with pytest.raises(
        ValueError, match=r"`method` must be one of 'proxy', 'taylor', .*'random', or a function, got 'magic'"
    ):
        localize_heads(model, [], method="magic")
    for method in SEEING:
        with pytest.raises(ValueError, match="no sample with a token that counts"):
            localize_heads(model, [], method=method)
        uncounted = {**random_batch(), "labels": torch.full((2, 11), -100)}
        with pytest.raises(ValueError, match="no sample with a token that counts"):
            localize_heads(model, [uncounted], method=method)


@pytest.mark.parametrize("method", SEEING)
def test_scores_that_are_no_numbers_are_an_error_not_a_ranking(method):
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * math.nan)  # the weights are numbers
    before = snapshot(model)
    with pytest.raises(ValueError, match="gave no finite score for 12 of 12 heads"):
        localize_heads(model, [random_batch()], method=method)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])
def test_meta_weights_are_refused_before_any_pass(method):
    with torch.device("meta"):
        model = type(tiny_model())(tiny_model().config)
    with pytest.raises(ValueError, match=r"no values in 'model\.embed_tokens\.weight': it is on the meta device"):
        localize_heads(model, [random_batch()], method=method)


def test_a_method_of_ones_own_takes_the_place_of_a_name():
    def output_norm(model, geometry, batches, seed):
        model.eval().requires_grad_(False)  # is undone
        torch.rand(1)
        n_samples = sum(len(batch["input_ids"]) for batch in batches)
        return {layer: torch.arange(part.n_heads) + float(n_samples + seed) for layer, part in geometry.items()}

    model = mixed_state(tiny_model())
    before = snapshot(model)
    scores = localize_heads(model, [random_batch(), random_batch()], method=output_norm, seed=10)
    assert_unchanged(model, before)
    assert (scores.method, scores.n_samples) == ("output_norm", 4)
    assert scores.values.tolist() == [[14.0, 15.0, 16.0, 17.0]] * 3


class OfWrongShape:
    def __init__(self, scores):
        self.scores = scores

    def __call__(self, model, geometry, batches, seed):
        return self.scores


@pytest.mark.parametrize(
    ("scores", "got"),
    [({0: torch.ones(4), 2: torch.ones(4)}, "layer 1, got nothing"), ({0: torch.ones(3)}, r"layer 0, got \(3,\)")],
)
def test_what_a_method_of_ones_own_leaves_out_is_named(scores, got):
    with pytest.raises(ValueError, match=rf"`method`='OfWrongShape' must give a tensor of shape \(4,\) for {got}"):
        localize_heads(tiny_model(), [random_batch()], method=OfWrongShape(scores))


def test_a_method_that_is_neither_name_nor_function_is_refused():
    with pytest.raises(ValueError, match=r"`method` must be one of .* or a function, got 3"):
        localize_heads(tiny_model(), [random_batch()], method=3)


def test_batches_that_are_no_text_are_named():
    with pytest.raises(ValueError, match=r"`batches` must hold .* got a dict without \['input_ids'\]"):
        localize_heads(LAYOUTS["whisper"].model(), [{"input_features": None, "labels": None}], method="gate")


def test_a_loader_of_a_stream_whose_length_nobody_knows_is_read():
    class Stream(IterableDataset):
        def __iter__(self):
            return (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))

    batch = random_batch(4)
    streamed = localize_heads(tiny_model(), DataLoader(Stream(), batch_size=2), method="gate")
    assert torch.allclose(streamed.values, localize_heads(tiny_model(), [batch], method="gate").values)


@pytest.mark.parametrize("method", SEEING)
def test_labels_that_are_no_tokens_of_the_model_are_named(method):
    batch = random_batch()
    batch["labels"][0, -1] = -1  # another library's sign for what does not count
    with pytest.raises(ValueError, match="`batches` holds the token id -1"):
        localize_heads(tiny_model(), [batch], method=method)


@pytest.mark.parametrize("method", ["proxy", "gate", "taylor"])
def test_int32_tokens_and_a_mask_of_none_give_the_same_scores(method):
    batch = random_batch()
    expected = localize_heads(tiny_model(), [batch], method=method).values
    short = {name: batch[name].int() for name in ("input_ids", "labels")}
    assert torch.equal(
        localize_heads(tiny_model(), [{**short, "attention_mask": None}], method=method).values, expected
    )


@pytest.mark.parametrize("method", ["proxy", "gate", "taylor", "fisher", "gain", "agreement"])
def test_attention_that_does_not_run_is_named(method):
    model = tiny_model()
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(ValueError, match=r"does not depend on 'model\.layers\.1\.self_attn\.\w+': it did not run"):
        localize_heads(model, [random_batch()], method=method)


def test_the_result_leads_to_a_head_set():
    assert isinstance(localize_heads(tiny_model(), [random_batch()], method="taylor").top(0.1), HeadSet)


def test_every_method_is_described():
    for text in (localize_heads.__doc__, P2DConfig.__doc__, PAGE.read_text(encoding="utf-8")):
        for method in METHODS:
            assert f'`"{method}"`' in text or f"| `{method}` |" in text, method


def test_the_table_knows_the_groups():
    assert localize_heads(tiny_model(), [random_batch()], method="random").n_kv_heads == (2,) * 3
    jamba = localize_heads(LAYOUTS["jamba"].model(), [random_batch()], method="random")
    geometry = ModelGeometry.of(LAYOUTS["jamba"].model())
    assert jamba.n_kv_heads == tuple(geometry[n].n_kv_heads if n in geometry else 0 for n in geometry.rows)
    assert 0 in jamba.n_kv_heads


def test_no_method_is_the_default():
    """None was better than a draw, and a draw is not what localizing is for."""
    with pytest.raises(TypeError, match="'method'"):
        localize_heads(tiny_model(), [random_batch()])
    assert needs_weights("proxy") and not needs_weights("gate")


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_model_is_localized_by_what_looks_at_no_weights(method, one_process):
    batch = random_batch()
    expected = localize_heads(tiny_model(), [batch], method).values
    model = tiny_model()
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    if needs_weights(method):
        message = rf"`method`='{method}' needs whole weights, but '.*q_proj.weight' is sharded .* before the model is sharded"
        with pytest.raises(ValueError, match=message):
            localize_heads(model, [batch], method)
    else:
        torch.testing.assert_close(localize_heads(model, [batch], method).values, expected, rtol=1e-4, atol=1e-6)
