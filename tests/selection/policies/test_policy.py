"""Policies together, through the selector."""

import dataclasses
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset

from p2d_peft.heads import HeadSet
from p2d_peft.selection import P2DDataSelector, length
from p2d_peft.selection.policies import Diverse, LengthBetween, Policy, Quotas, RoundRobin, WithoutNearDuplicates

from ...tiny_data import prompt_completion, rows
from ...tiny_models import tiny_model, tiny_tokenizer


def selector(scorer="affinity", **kwargs):
    return P2DDataSelector(
        tiny_model(),
        tiny_tokenizer(),
        heads=HeadSet([(0, 1), (1, 0), (1, 3)]),
        target=prompt_completion(4, seed=1),
        scorer=scorer,
        **kwargs,
    )


def pool_with_copies(n=40):
    """Rows of two tasks, each of them twice, shuffled."""
    made = [{**row, "prompt": row["prompt"] + f" for the {index}th time"} for index, row in enumerate(rows(n))] * 2
    random.Random(0).shuffle(made)
    return Dataset.from_list(made)


ALL = (
    [LengthBetween(least=5)],
    [RoundRobin()],
    [Diverse()],
    [WithoutNearDuplicates()],
    [Quotas("task", {"copy": 0.75})],
    [LengthBetween(least=5), WithoutNearDuplicates(), Quotas("task", {"copy": 0.5, "count": 0.5}), Diverse()],
)


@pytest.mark.parametrize("policies", ALL, ids=lambda policies: "-".join(type(policy).__name__ for policy in policies))
@pytest.mark.parametrize("size", [{"num_samples": 7}, {"max_tokens": 200}], ids=lambda size: next(iter(size)))
def test_streams_give_the_rows_that_datasets_give(policies, size):
    """Without a sample of the pool, which for a stream is another one: all of it is sampled here."""
    pool = pool_with_copies()
    chosen = selector(policies=policies, **size)
    kept = chosen.select(pool)
    assert kept.column_names == [*pool.column_names, "p2d_score"] and len(kept) > 0

    def stream():
        yield from pool

    assert chosen.select(IterableDataset.from_generator(stream)).to_list() == kept.to_list()


@pytest.mark.parametrize("scorer", ["affinity", "icl", "perplexity", "random"])
def test_duplicates_then_quotas_then_a_budget_of_tokens(scorer):
    """None of the rows that the quotas pull up is a copy, the shares hold, and the budget is filled."""
    pool = pool_with_copies()
    policies = [WithoutNearDuplicates(), Quotas("task", {"copy": 0.5, "count": 0.5})]
    chosen = selector(scorer, policies=policies, max_tokens=500)
    kept = chosen.select(pool)
    assert len(set(kept["prompt"])) == len(kept)
    n_tokens = [len(p + c) + 1 for p, c in zip(kept["prompt"], kept["completion"], strict=True)]
    counts = Counter(kept["task"])
    assert abs(counts["copy"] - counts["count"]) <= 2
    assert 500 - min(n_tokens) < sum(n_tokens) <= 500
    # the same the other way round, only that what is dropped as a copy no longer fills its share
    kept = selector(scorer, policies=policies[::-1], num_samples=12).select(pool)
    assert len(set(kept["prompt"])) == len(kept) == 12


def test_a_budget_takes_the_best_rows_that_fit():
    pool = prompt_completion()
    scored = selector("perplexity")
    scores = scored.score(pool).tolist()
    lengths = [len(row["prompt"] + row["completion"]) + 1 for row in pool]
    expected, left = [], 100
    for row in sorted(range(24), key=lambda row: -scores[row]):
        if lengths[row] <= left:
            expected.append(row)
            left -= lengths[row]
    kept = selector("perplexity", max_tokens=100).select(pool)
    assert kept.remove_columns("p2d_score").to_list() == pool.select(sorted(expected)).to_list()


@pytest.mark.parametrize("policy", [RoundRobin(), Diverse()])
def test_a_budget_of_tokens_is_a_number_of_rows_where_those_that_are_left_are_equally_long(policy):
    """However long the rows are that were dropped before."""
    draw = random.Random(0)
    made = [[draw.randint(7, 80) for _ in range(8 if index % 2 else 80)] for index in range(120)]
    pool = Dataset.from_dict({"input_ids": made, "labels": made})
    kept = []
    for size in ({"max_tokens": 24 * 8}, {"num_samples": 24}):
        chosen = selector(policies=[LengthBetween(most=10), policy], **size)
        chosen.select(pool)
        kept.append(chosen.rows)
    assert kept[0] == kept[1] and len(kept[0]) == 24


def test_rows_that_exceed_a_budget_alone_take_no_shorter_copy_with_them():
    copies = [{"prompt": "copy abcdefgh:", "completion": " abcdefgh" + "!" * more} for more in (3, 0)]
    policies = [WithoutNearDuplicates(0.5)]
    chosen = selector("length", max_tokens=24, policies=policies)
    assert chosen.select(Dataset.from_list(copies))["completion"][:] == [" abcdefgh"]


def test_a_budget_that_nothing_fits_and_policies_that_leave_nothing_are_errors():
    with pytest.raises(ValueError, match=r"No row is left within `max_tokens`=2 after 0 `policies`"):
        selector("random", max_tokens=2).select(prompt_completion())
    with pytest.raises(ValueError, match=r"No row is left after 1 `policies`; loosen them"):
        selector("random", policies=[LengthBetween(least=1000)]).select(prompt_completion())


def test_too_few_rows_are_told(caplog):
    with caplog.at_level("WARNING", logger="p2d_peft"):
        kept = selector("random", num_samples=60, policies=[WithoutNearDuplicates()]).select(pool_with_copies())
    assert len(kept) == 40 and "The policies left 40 rows; 60 were asked for." in caplog.text


def test_what_a_scorer_cannot_give_is_an_error():
    needed = r"`policies` need scores for each of the target's samples, which `scorer`='{}' does not give"
    with pytest.raises(ValueError, match=needed.format("perplexity") + r"; use one of \['affinity', 'bm25', "):
        selector("perplexity", policies=[RoundRobin()])
    needed_features = r"`policies` need features of rows, which `scorer`='{}' does not "
    for scorer in ("perplexity", "icl", "bm25"):
        with pytest.raises(ValueError, match=needed_features.format(scorer) + r"give; use one of \['affinity', 'grad"):
            selector(scorer, policies=[Diverse()])
    promising = dataclasses.replace(length.SCORER, name="promising", per_target=True, features=True)
    with pytest.raises(ValueError, match=needed.format("promising")):
        selector(promising, policies=[RoundRobin()]).select(prompt_completion())
    with pytest.raises(ValueError, match=needed_features.format("promising") + "have"):
        selector(promising, policies=[Diverse()]).select(prompt_completion())


def test_a_column_that_is_not_there_is_named():
    policies = [Quotas("source", {"math": 1.0})]
    with pytest.raises(ValueError, match=r"`pool` has no column 'source', only \['task', 'prompt', 'completion'\]"):
        selector("random", policies=policies).select(prompt_completion())

    def unread():
        raise AssertionError("the stream was read")
        yield

    features = prompt_completion().features
    with pytest.raises(ValueError, match=r"`pool` has no column 'source', only \['task', 'prompt', 'completion'\]"):
        selector("random", policies=policies).select(IterableDataset.from_generator(unread, features=features))

    def stream():
        yield from rows()

    with pytest.raises(ValueError, match="`pool` has no value in the column 'source'"):
        selector("random", policies=policies).select(IterableDataset.from_generator(stream))


def test_ones_own_policy():
    class Backwards(Policy):
        def __call__(self, rows, ranking):
            assert ranking.scores.shape == ranking.n_tokens.shape == (24,)
            return reversed(list(rows))

    scores = selector("random").score(prompt_completion())
    kept = selector("random", num_samples=1, policies=[Backwards()]).select(prompt_completion())
    assert kept["p2d_score"][:] == [torch.min(scores)]
