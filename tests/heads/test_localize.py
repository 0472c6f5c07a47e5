import math

import pytest
import torch

from p2d_peft.heads import HeadSet, ModelGeometry, localize_heads

from ..model_checks import assert_unchanged, mixed_state, snapshot
from ..tiny_models import ARCHITECTURES, random_batch, tiny_model


METHODS = ("proxy", "taylor", "random")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_head_gets_a_finite_score_and_the_model_stays_as_it_was(name, method):
    model = mixed_state(tiny_model(name))
    before = snapshot(model)
    scores = localize_heads(model, [random_batch(padding=3), random_batch(seed=1)], method=method, seed=3)
    assert_unchanged(model, before)
    assert scores.values.shape == (3, 4) and scores.values.isfinite().all() and (scores.values >= 0).all()
    assert len(scores.values.unique()) > 1
    assert (scores.method, scores.seed, scores.n_samples) == (method, 3, None if method == "random" else 4)
    assert len(scores.top(0.25)) == 3


@pytest.mark.parametrize("method", ["proxy", "taylor"])
def test_the_model_stays_as_it_was_when_a_pass_raises(method):
    model = mixed_state(tiny_model())

    def batches():
        yield random_batch()
        raise RuntimeError("reader died")

    before = snapshot(model)
    with pytest.raises(RuntimeError, match="reader died"):
        localize_heads(model, batches(), method=method)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_scores(method):
    runs = [localize_heads(tiny_model(), [random_batch()], method=method, seed=7).values for _ in range(2)]
    assert torch.equal(*runs)


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


@pytest.mark.parametrize("method", METHODS)
def test_scores_under_autocast_are_close_to_those_without(method):
    exact = localize_heads(tiny_model(), [random_batch(rows=8)], method=method).values.flatten()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = localize_heads(tiny_model(), [random_batch(rows=8)], method=method).values.flatten()
    assert torch.corrcoef(torch.stack([rounded, exact]))[0, 1] > 0.9


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
    with pytest.raises(ValueError, match=r"`method` must be one of 'proxy', 'taylor', 'random', got 'magic'"):
        localize_heads(model, [], method="magic")
    for method in ("proxy", "taylor"):
        with pytest.raises(ValueError, match="no sample with a token that counts"):
            localize_heads(model, [], method=method)
        uncounted = {**random_batch(), "labels": torch.full((2, 11), -100)}
        with pytest.raises(ValueError, match="no sample with a token that counts"):
            localize_heads(model, [uncounted], method=method)


@pytest.mark.parametrize("method", ["proxy", "taylor"])
def test_scores_that_are_no_numbers_are_an_error_not_a_ranking(method):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="gave no finite score for 12 of 12 heads"):
        localize_heads(model, [random_batch()], method=method)
    assert_unchanged(model, before)


def test_meta_weights_are_refused_before_any_pass():
    with torch.device("meta"):
        model = type(tiny_model())(tiny_model().config)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj\.weight' is .* on meta"):
        localize_heads(model, [random_batch()], method="taylor")


def test_the_result_leads_to_a_head_set():
    assert isinstance(localize_heads(tiny_model(), [random_batch()], method="taylor").top(0.1), HeadSet)


def test_the_cache_of_an_autocast_around_it_hides_no_change_of_the_weights():
    batches = [random_batch(seed=seed) for seed in range(6)]
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model()(**batches[0])  # as a trainer's loop may have done before
        within = localize_heads(tiny_model(), batches).values
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = localize_heads(tiny_model(), batches).values
    assert torch.equal(within, expected)
