import math
from contextlib import contextmanager
from typing import get_args

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from trl import SFTConfig

from p2d_peft.heads import HeadSet, ModelGeometry, localize_heads
from p2d_peft.selection import P2DDataSelector, RowScores, Scorer, engine, less
from p2d_peft.selection.policies import Diverse, Quotas
from p2d_peft.selection.selector import ScorerName, needs_heads

from ..model_checks import assert_unchanged, mixed_state, snapshot
from ..tiny_data import KINDS, prompt_completion, rows, text
from ..tiny_models import ARCHITECTURES, FEW, LAYOUTS, random_batch, tiny_model, tiny_tokenizer


HEADS = HeadSet([(0, 1), (1, 0), (1, 3)])
BY_HEADS = ("affinity", "gradient", "icl", "influence")
WITHOUT_MODEL = ("bm25", "length", "random")
WITH_MODEL = (*BY_HEADS, "ifd", "less", "perplexity", "rds")
SCORERS = (*WITH_MODEL, *WITHOUT_MODEL)
# `ifd` is for rows with a prompt
KINDS_BY_SCORER = [
    (kind, scorer) for scorer in SCORERS for kind in KINDS if scorer != "ifd" or kind not in ("text", "conversational")
]


@pytest.fixture(autouse=True)
def _cheap_less(monkeypatch):
    for name, value in (("RANK", 2), ("N_EPOCHS", 1), ("N_FEATURES", 512)):
        monkeypatch.setattr(less, name, value)


def selector(model=None, scorer="affinity", target=None, heads=HEADS, **kwargs):
    return P2DDataSelector(
        tiny_model() if model is None else model,
        tiny_tokenizer(),
        heads=heads,
        target=prompt_completion(4, seed=1) if target is None else target,
        scorer=scorer,
        **kwargs,
    )


def test_every_scorer_is_tested_here_and_tells_whether_it_needs_heads():
    assert sorted(SCORERS) == list(get_args(ScorerName))
    assert [scorer for scorer in get_args(ScorerName) if needs_heads(scorer)] == list(BY_HEADS)


@pytest.mark.parametrize(("kind", "scorer"), KINDS_BY_SCORER)
def test_selects_from_all_that_sft_trainer_takes(kind, scorer):
    pool = KINDS[kind]()
    selected = selector(scorer=scorer, target=KINDS[kind](4, seed=1), ratio=0.25).select(pool)
    assert len(selected) == 6
    assert selected.column_names == [*pool.column_names, "p2d_score"]
    scores = selector(scorer=scorer, target=KINDS[kind](4, seed=1)).score(pool)
    assert scores.shape == (24,) and scores.dtype == torch.float64
    best = sorted(sorted(range(24), key=lambda row: -scores[row])[:6])
    assert selected.remove_columns("p2d_score").to_list() == pool.select(best).to_list()
    assert selected["p2d_score"][:] == scores[best].tolist()


@pytest.mark.parametrize(
    ("name", "scorer"),
    # `icl` reads attention weights, which gemma2's own implementation caps: refused, see test_attention.py
    [(name, scorer) for name in ARCHITECTURES for scorer in WITH_MODEL if (name, scorer) != ("gemma2", "icl")]
    + [("llama", scorer) for scorer in WITHOUT_MODEL],
)
def test_works_on_every_architecture_and_leaves_the_model_alone(name, scorer):
    # a window that reaches back to the demonstrations of `icl`
    model = mixed_state(tiny_model(name, sliding_window=256))
    before = snapshot(model)
    scores = selector(model, scorer=scorer).score(prompt_completion())
    assert_unchanged(model, before)
    assert scores.isfinite().all() and len(scores.unique()) > (4 if scorer == "length" else 12)


@pytest.mark.parametrize("scorer", WITH_MODEL)
def test_the_model_is_left_alone_when_a_pass_raises(scorer):
    model = mixed_state(tiny_model())
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("boom")

    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(fail)
    handle_of_first = model.model.layers[0].register_forward_hook(fail)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="boom"):
        selector(model, scorer=scorer).score(prompt_completion())
    assert_unchanged(model, before)
    handle.remove()
    handle_of_first.remove()


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_in_bf16_are_those_in_fp32_to_rounding(scorer):
    exact = selector(scorer=scorer).score(prompt_completion())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = selector(scorer=scorer).score(prompt_completion())
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05 * float(exact.std()))
    # rounded: a model that is made in bf16 may draw other weights
    half = selector(tiny_model().to(torch.bfloat16), scorer=scorer).score(prompt_completion())
    assert torch.corrcoef(torch.stack([half, exact]))[0, 1] > 0.95


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_same_seed_gives_the_same_rows(scorer):
    a, b = (selector(scorer=scorer, seed=3).select(prompt_completion()).to_list() for _ in range(2))
    assert a == b


def test_another_seed_gives_other_random_rows():
    a, b = (selector(scorer="random", seed=seed, ratio=0.5).select(text())["text"][:] for seed in (0, 1))
    assert a != b
    assert len({tuple(selector(scorer="random", seed=seed).score(text()).tolist()) for seed in (-1, -2, 1, 2)}) == 4


# `less` trains in batches
@pytest.mark.parametrize("scorer", ["affinity", "gradient", "ifd", "influence", "perplexity", "rds"])
def test_scores_do_not_depend_on_the_batch_size(scorer):
    scores = [selector(scorer=scorer, batch_size=size).score(prompt_completion()) for size in (1, 7)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


# `icl` puts neighbours together, and `random` draws by shard
@pytest.mark.parametrize("scorer", [scorer for scorer in SCORERS if scorer not in ("icl", "random")])
def test_scores_do_not_depend_on_the_shards(scorer, monkeypatch):
    whole = selector(scorer=scorer).score(prompt_completion())
    monkeypatch.setattr(engine, "SHARD_ROWS", 10)
    torch.testing.assert_close(selector(scorer=scorer).score(prompt_completion()), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scorer", BY_HEADS)
def test_all_heads_and_random_heads_score_too(scorer):
    model, pool = tiny_model(), prompt_completion()
    every = ModelGeometry.of(model).heads
    drawn = localize_heads(model, [random_batch()], method="random").top(0.25)
    scores = [selector(model, scorer=scorer, heads=heads).score(pool) for heads in (HEADS, every, drawn)]
    assert all(found.isfinite().all() for found in scores)
    assert len({tuple(found.tolist()) for found in scores}) == 3


@pytest.mark.parametrize("name", FEW)
def test_affinity_of_the_target_with_itself_is_maximal(name):
    """A target of one sample has the affinity 1 with itself, which nothing exceeds."""
    pool = prompt_completion()
    for row in (0, 7):
        scores = selector(tiny_model(name), target=pool.select([row])).score(pool)
        assert scores.argmax() == row and scores[row] == pytest.approx(1, abs=1e-5)
        assert scores.max() <= 1 + 1e-5 and scores.min() >= -1 - 1e-5


def test_affinity_looks_at_nothing_but_the_selected_heads():
    pool, before, after = prompt_completion(), tiny_model("llama-mha-bias"), tiny_model("llama-mha-bias")
    attention = after.model.layers[1].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[12:36] += 1  # heads 1 and 2 of layer 1, D = 12; selected are 0 and 3
    args = {"target": prompt_completion(4, seed=1)}
    assert torch.equal(selector(before, **args).score(pool), selector(after, **args).score(pool))
    with torch.no_grad():
        attention.v_proj.weight[:12] += torch.randn(12, 48)
    assert not torch.equal(selector(before, **args).score(pool), selector(after, **args).score(pool))


def test_perplexity_is_the_models_own_loss():
    model, pool = tiny_model(), prompt_completion(5)
    scores = selector(model, scorer="perplexity").score(pool)
    tokenizer = tiny_tokenizer()
    for row, score in zip(pool, scores, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + "</s>")["input_ids"]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            assert model(input_ids=ids, labels=labels).loss.item() == pytest.approx(score.item(), rel=1e-5)


# one group, all of the target's samples; and three groups, whose queries take turns and come round
@pytest.mark.parametrize(("n_rows", "n_queries"), [(8, 3), (20, 9)])
def test_icl_equals_the_definition_with_whole_prompts_and_eager_attention(n_rows, n_queries):
    """Against one plain forward pass a query over the whole prompt, with all attention weights at hand."""
    pool, target = prompt_completion(n_rows), prompt_completion(n_queries, seed=1)
    scores = selector(scorer="icl", target=target, seed=5).score(pool)

    tokenizer, eager = tiny_tokenizer(), tiny_model(attn_implementation="eager")
    generator = torch.Generator().manual_seed(hash((5, 0)))  # of the seed and the first row
    order = torch.randperm(n_rows, generator=generator).tolist()
    turns = torch.randperm(n_queries, generator=generator).tolist()

    def ids(row):
        return tokenizer(row["prompt"] + row["completion"] + "</s>")["input_ids"]

    expected = torch.zeros(n_rows, dtype=torch.float64)
    for turn, first in enumerate(range(0, n_rows, 8)):
        group = order[first : first + 8]
        asked = [turns[(4 * turn + i) % n_queries] for i in range(min(4, n_queries))]
        demonstrations = [ids(pool[row]) for row in group]
        prompt = [token for demonstration in demonstrations for token in demonstration]
        for query in target.select(asked):
            answer_from = len(prompt) + len(tokenizer(query["prompt"])["input_ids"])
            whole = torch.tensor([prompt + ids(query)])
            with torch.no_grad():
                output = eager(input_ids=whole, output_attentions=True)
            predicting = range(answer_from - 1, whole.shape[1] - 1)
            log_probs = output.logits.log_softmax(-1)[0, predicting].gather(1, whole[0, answer_from:, None])
            quality = log_probs.mean().exp()
            start = 0
            for row, demonstration in zip(group, demonstrations, strict=True):
                end = start + len(demonstration)
                of_heads = [
                    output.attentions[layer][0, head, predicting, start:end].sum(-1).mean() for layer, head in HEADS
                ]
                expected[row] += quality * torch.stack(of_heads).mean() / len(demonstration) / len(asked)
                start = end
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=0)


def test_ties_go_to_the_lower_row_and_count_is_exact():
    chosen = selector(ratio=0.5).choose(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]))
    assert chosen == [0, 1]
    assert selector(num_samples=3).choose(torch.tensor([1.0, math.nan, 1.0, 0.0])) == [0, 2, 3]
    assert selector(ratio=1e-9).choose(torch.zeros(5)) == [0]
    with pytest.raises(ValueError, match="`choose` knows no lengths, which `max_tokens` is about; use `select`"):
        selector(max_tokens=100).choose(torch.zeros(5))


def test_rows_without_a_counted_token_are_named_and_never_taken(caplog):
    made = rows(6)
    made[1]["prompt"] = made[4]["prompt"] = "x" * 60
    args = SFTConfig(bf16=False, report_to="none", max_length=40)
    scorer = selector(scorer="perplexity", ratio=1.0, args=args)
    pool = Dataset.from_list(made)
    with caplog.at_level("WARNING", logger="p2d_peft"):
        assert scorer.score(pool).isnan().nonzero().flatten().tolist() == [1, 4]
        assert len(scorer.select(pool)) == 4
    assert "2 of 6 rows of the pool have no token that counts and will not be selected: rows 1, 4." in caplog.text


def test_heads_that_see_no_demonstration_are_reported(caplog):
    model = tiny_model("mistral", sliding_window=4)
    with caplog.at_level("WARNING", logger="p2d_peft"):
        assert (selector(model, scorer="icl").score(prompt_completion()) == 0).all()
    assert "gave all 24 rows the same score" in caplog.text


@pytest.mark.parametrize("kind", ["pandas", "numpy", "arrow", "torch"])
def test_a_pool_keeps_its_format_and_is_scored_as_without(kind):
    pool, target = prompt_completion(), prompt_completion(4, seed=1)
    policies = [Diverse(), Quotas("task", {"copy": 0.5})]
    expected = selector(target=target, policies=policies).select(pool)
    chosen = selector(target=target.with_format(kind), policies=policies)
    selected = chosen.select(pool.with_format(kind))
    assert selected.format["type"] == kind and selected.column_names == expected.column_names
    assert selected.with_format(None).to_list() == expected.to_list()
    assert chosen.estimate(pool.with_format(kind)).n_rows == 24


def test_an_earlier_score_is_replaced():
    once = selector(scorer="random", ratio=0.5).select(text())
    twice = selector(scorer="perplexity", ratio=0.5).select(once)
    assert twice.column_names == ["text", "p2d_score"] and len(twice) == 6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scorer": "magic"}, r"`scorer` must be one of 'affinity', 'bm25', .*, 'rds', or a `Scorer`, got 'magic'"),
        (
            {"ratio": 0.1, "num_samples": 3},
            r"only one of `ratio`, `num_samples` and `max_tokens`, got {'ratio': 0\.1, 'num_samples': 3}",
        ),
        ({"ratio": 0}, r"`ratio` must be in \(0, 1\], got 0"),
        ({"ratio": 1.5}, r"`ratio` must be in \(0, 1\], got 1\.5"),
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        selector(**kwargs)


@pytest.mark.parametrize("seed", [None, 1.5, "42", True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(TypeError, match=f"`seed` must be an integer, got {seed!r}"):
        selector(seed=seed)


def test_a_seed_may_be_of_numpy(tmp_path):
    seeds = (3, np.int64(3))
    first, again = (selector(scorer="random", seed=seed, cache_dir=tmp_path, num_samples=4) for seed in seeds)
    assert first.select(text()).to_list() == again.select(text()).to_list()
    assert again.report.n_resumed == 24


def test_missing_heads_and_targets_are_named():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match="`scorer`='affinity' needs `heads`"):
        P2DDataSelector(model, tokenizer, target=text())
    with pytest.raises(ValueError, match="`scorer`='icl' needs `target`"):
        P2DDataSelector(model, tokenizer, heads=HEADS, scorer="icl")
    with pytest.raises(ValueError, match=r"\(7, 0\), but layer 7 has no heads"):
        P2DDataSelector(model, tokenizer, heads=HeadSet([(7, 0)]), target=text())
    assert len(P2DDataSelector(model, tokenizer, scorer="random").select(text())) == 2


def test_several_stacks_of_attention_are_refused():
    model = LAYOUTS["t5"].model()
    for scorer in BY_HEADS:
        with pytest.raises(ValueError, match=r"T5ForConditionalGeneration\) has several \(cross, decoder, encoder\)"):
            P2DDataSelector(model, tiny_tokenizer(), heads=HeadSet([("encoder.0", 1)]), target=text(), scorer=scorer)


def test_encoder_decoders_are_refused_by_what_runs_them():
    model, target = LAYOUTS["bart"].model(), text(3)
    for scorer in ("ifd", "less", "perplexity", "rds"):
        with pytest.raises(ValueError, match=r"\(BartForConditionalGeneration\) is an encoder-decoder.*; use 'bm25'"):
            P2DDataSelector(model, tiny_tokenizer(), target=target, scorer=scorer)
    for scorer in WITHOUT_MODEL:
        assert len(P2DDataSelector(model, tiny_tokenizer(), target=target, scorer=scorer).select(text())) == 2


@pytest.mark.parametrize("scorer", ["affinity", "gradient", "ifd", "influence", "perplexity", "rds"])
@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_before_a_row_are_no_part_of_it(scorer, config):
    model = get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    scores = selector(model, scorer).score(prompt_completion())
    assert scores.isfinite().all() and len(scores.unique()) > 12
    alone = selector(model, scorer, batch_size=1).score(prompt_completion())
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)


def test_too_many_rows_and_nothing_to_learn_are_errors_before_any_pass():
    model = tiny_model()
    model.forward = None  # any pass would fail
    with pytest.raises(ValueError, match="`num_samples`=25 is more than the 24 rows of the pool"):
        selector(model, num_samples=25).select(text())
    args = SFTConfig(bf16=False, report_to="none", max_length=3)
    for scorer, name in (("affinity", "target"), ("perplexity", "pool"), ("random", "pool")):
        with pytest.raises(ValueError, match=rf"No row of `{name}` has a token that counts.*`max_length`=3"):
            selector(model, scorer, args=args).select(prompt_completion())


# prompts are what `ifd` needs
@pytest.mark.parametrize("scorer", [scorer for scorer in WITH_MODEL if scorer != "ifd"])
def test_scores_that_are_no_numbers_are_an_error_with_row_numbers(scorer):
    model = tiny_model()
    letter = tiny_tokenizer().convert_tokens_to_ids("q")
    # the weights are numbers, what is made of them is none
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == letter)[..., None], math.nan)
    )
    pool = Dataset.from_list([{"text": "abc"}, {"text": "qqq"}, {"text": "abd"}])
    with pytest.raises(ValueError, match=r"gave no finite score to \d of 3 rows of the pool: rows"):
        selector(model, scorer=scorer, target=text(3)).score(pool)


def test_a_scorer_of_ones_own():
    """As in the docs: shorter rows first."""

    @contextmanager
    def shortest(context):
        yield lambda samples: RowScores(torch.tensor([-float(len(ids)) for ids in samples.input_ids]))

    own = Scorer("shortest", shortest, needs_heads=False, needs_target=False)
    selected = selector(scorer=own, num_samples=5).select(text())
    lengths = [len(tiny_tokenizer()(row["text"])["input_ids"]) for row in text()]
    assert sorted(lengths)[:5] == sorted(len(tiny_tokenizer()(row["text"])["input_ids"]) for row in selected)
    with pytest.raises(ValueError, match="`scorer`='picky' needs `target`"):
        P2DDataSelector(tiny_model(), tiny_tokenizer(), scorer=Scorer("picky", shortest, False, needs_target=True))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda n: torch.rand(n), TypeError, r"`scorer`='own' must give `RowScores` of a tensor, got tensor\("),
        (lambda n: RowScores([1.0] * n), TypeError, r"must give `RowScores` of a tensor, got \[1\.0, 1\.0"),
        (
            lambda n: RowScores(torch.rand(1)),
            ValueError,
            r"each of the 24 samples of a call, got scores of shape \(1,\)",
        ),
        (lambda n: RowScores(torch.rand(n, 1)), ValueError, r"got scores of shape \(24, 1\)"),
    ],
)
def test_what_a_scorer_of_ones_own_gives_is_looked_at(given, error, message):
    @contextmanager
    def opened(context):
        yield lambda samples: given(len(samples))

    own = Scorer("own", opened, needs_heads=False, needs_target=False)
    with pytest.raises(error, match=message):
        selector(scorer=own).score(text())
