import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from trl import SFTConfig, SFTTrainer

from p2d_peft.heads import HeadSet
from p2d_peft.passed_tokens import passed_tokens
from p2d_peft.selection import P2DDataSelector, engine, icl_scorer
from p2d_peft.selection.policies import RoundRobin
from p2d_peft.selection.scoring import RowScores, Scorer
from p2d_peft.selection.selector import _SCORERS

from ..tiny_data import conversational, prompt_completion, rows
from ..tiny_models import tiny_model, tiny_tokenizer
from .test_selector import selector


SCORERS = tuple(_SCORERS)
SHARDED = [name for name, scorer in _SCORERS.items() if not scorer.whole_pool]
ALONE = [name for name in SHARDED if not _SCORERS[name].needs_sample]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(engine, "SHARD_ROWS", 5)  # five shards of 24 rows


def watched(scoring, calls, at=None, then=None):
    """Note the first row of each call of a selector's scorer, and do something at one of them."""
    scorer = scoring.engine.scorer

    @contextmanager
    def opened(context):
        with scorer.open(context) as score_rows:

            def score(samples):
                if len(calls) == at:
                    then()
                calls.append(samples.rows[0])
                return score_rows(samples)

            yield score

    opened.__wrapped__ = scorer.open  # it is the same scorer
    scoring.engine = replace(scoring.engine, scorer=replace(scorer, open=opened))
    return scoring


@pytest.mark.parametrize("scorer", SCORERS)
def test_several_shards_give_what_one_gives(scorer, monkeypatch):
    found = selector(scorer=scorer).score(prompt_completion())
    assert found.isfinite().all() and len(found.unique()) > (4 if scorer == "length" else 12)
    if scorer == "icl" or scorer == "random":  # which look at a call as a whole
        return
    monkeypatch.setattr(engine, "SHARD_ROWS", 100)
    torch.testing.assert_close(found, selector(scorer=scorer).score(prompt_completion()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scorer", SHARDED)
def test_shards_know_nothing_of_one_another(scorer):
    """The rows of a shard have the same scores, to the bit, whatever the other shards hold."""
    made = rows(15)
    changed = [*made[:5], *rows(5, seed=9), *made[10:]]
    model, sample = tiny_model(), Dataset.from_list(made)
    scores = []
    for pool in (made, changed):
        scoring = selector(model, scorer)
        # the sample of the pool is all that they share
        engine_ = scoring.engine
        object.__setattr__(
            engine_, "_sample", lambda pool, engine_=engine_: engine_.prepare(sample.select([0, 1]), "pool")
        )
        scores.append(scoring.score(Dataset.from_list(pool)))
    same = torch.cat([torch.arange(5), torch.arange(10, 15)])
    assert torch.equal(scores[0][same], scores[1][same])


@pytest.mark.parametrize("scorer", SCORERS)
def test_streams_have_the_scores_of_datasets(scorer):
    pool = prompt_completion()

    def generate():
        yield from pool

    # all of the pool is in the sample here, so that it is the same for both
    scoring = selector(scorer=scorer, ratio=1.0)
    scored = scoring.select(pool).to_list()
    for stream in (pool.to_iterable_dataset(num_shards=2), IterableDataset.from_generator(generate)):
        assert scoring.select(stream).to_list() == scored
    scoring = selector(scorer=scorer, ratio=0.3)
    best = sorted(sorted(range(24), key=lambda row: -scored[row]["p2d_score"])[:7])
    assert scoring.select(pool.to_iterable_dataset()).to_list() == [scored[row] for row in best]


@pytest.mark.parametrize("scorer", ALONE)
def test_one_shard_of_a_stream_is_in_memory_at_a_time(scorer):
    read, seen = [], []

    def generate():
        for row in rows(24):
            read.append(row)
            yield row

    scoring = watched(selector(scorer=scorer), calls := [])
    prepare = engine.prepare_samples

    def prepared(dataset, *args):
        seen.append((len(dataset), len(read)))
        return prepare(dataset, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "prepare_samples", prepared)
        scoring.score(IterableDataset.from_generator(generate))
    of_pool = seen[-5:]
    assert [n for n, _ in of_pool] == [5, 5, 5, 5, 4]
    assert all(n_read <= 5 * (index + 1) + 1 for index, (_, n_read) in enumerate(of_pool))
    assert calls == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("scorer", SHARDED)
def test_a_run_that_failed_goes_on_where_it_was(scorer, tmp_path, caplog):
    expected = selector(scorer=scorer).score(prompt_completion())

    def interrupt():
        raise KeyboardInterrupt

    first = watched(selector(scorer=scorer, cache_dir=tmp_path), [], at=3, then=interrupt)
    with caplog.at_level("WARNING", logger="p2d_peft"), pytest.raises(KeyboardInterrupt):
        first.score(prompt_completion())
    assert f"The scores of 15 rows are kept in '{tmp_path}': the same run, started again, goes on" in caplog.text

    second = watched(selector(scorer=scorer, cache_dir=tmp_path), calls := [])
    assert torch.equal(second.score(prompt_completion()), expected)
    assert calls == [15, 20] and second.report.n_resumed == 15 and second.report.resumed_seconds > 0
    third = watched(selector(scorer=scorer, cache_dir=tmp_path), calls := [])
    # a stream of the same rows is the same pool
    assert torch.equal(third.score(prompt_completion().to_iterable_dataset()), expected)
    assert calls == [] and third.report.n_resumed == 24
    nothing = {"n_resumed": 0, "resumed_seconds": 0, "resumed_tokens": 0, "seconds": 0}
    assert replace(third.report, **nothing) == replace(second.report, **nothing)


@pytest.mark.parametrize("scorer", SHARDED)
def test_what_is_taken_over_says_what_it_took(scorer, tmp_path, monkeypatch):
    model = tiny_model()

    real_time, waited = time.perf_counter, []
    monkeypatch.setattr(engine.time, "perf_counter", lambda: real_time() + sum(waited))
    first = watched(selector(model, scorer, cache_dir=tmp_path), [], at=2, then=lambda: waited.append(1_000.0))
    with passed_tokens(model) as passed:
        first.score(prompt_completion())
        of_first = passed()
    assert (first.report.resumed_seconds, first.report.resumed_tokens) == (0, 0)
    again = selector(model, scorer, cache_dir=tmp_path)
    again.score(prompt_completion())
    assert 1_000 < again.report.resumed_seconds < first.report.seconds
    assert again.report.resumed_tokens == of_first and again.report.seconds < 1_000


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path):
    pool = prompt_completion()

    def run():
        torch.set_num_threads(1)
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        watched(selector(scorer="affinity", cache_dir=tmp_path), [], at=2, then=kill).score(pool)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    again = watched(selector(scorer="affinity", cache_dir=tmp_path), calls := [])
    assert torch.equal(again.score(pool), selector(scorer="affinity").score(pool))
    assert calls == [10, 15, 20] and again.report.n_resumed == 10


def test_a_damaged_shard_is_scored_again(tmp_path):
    expected = selector(cache_dir=tmp_path).score(prompt_completion())
    (path,) = tmp_path.glob("*/shard-000001.arrow")
    path.write_bytes(path.read_bytes()[:-100])
    again = watched(selector(cache_dir=tmp_path), calls := [])
    assert torch.equal(again.score(prompt_completion()), expected)
    assert calls == [5] and again.report.n_resumed == 19


def test_what_was_scored_for_policies_is_kept_with_it(tmp_path):
    first = selector(cache_dir=tmp_path, policies=[RoundRobin()], num_samples=6).select(prompt_completion())
    again = watched(selector(cache_dir=tmp_path, policies=[RoundRobin()], num_samples=6), calls := [])
    assert again.select(prompt_completion()).to_list() == first.to_list()
    assert calls == [] and again.report.n_resumed == 24


def _other_weight():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-7
    return model


def _other_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "!"
    return tokenizer


def _args(**changes):
    return SFTConfig(bf16=False, report_to="none", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": _other_weight},
        {"model": lambda: tiny_model(rms_norm_eps=1e-4)},
        {"tokenizer": _other_tokenizer},
        {"heads": HeadSet([(0, 1), (1, 0)])},
        {"target": prompt_completion(3, seed=1)},
        {"scorer": "icl"},
        {"seed": 43},
        {"batch_size": 4},
        {"policies": [RoundRobin()]},
        {"args": _args(max_length=20)},
        {"args": _args(completion_only_loss=False)},
        {"args": _args(eos_token="<s>")},
        {"formatting_func": lambda row: row["prompt"]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_with_anything_else_nothing_is_taken_over(changes, tmp_path):
    def scoring(model=tiny_model, tokenizer=tiny_tokenizer, **kwargs):
        defaults = {"heads": HeadSet([(0, 1)]), "target": prompt_completion(4, seed=1), "args": _args()}
        return P2DDataSelector(model(), tokenizer(), cache_dir=tmp_path, **(defaults | kwargs))

    pool = prompt_completion(6)
    scoring().score(pool)
    other = scoring(**changes)
    other.score(pool)
    assert other.report.n_resumed == 0
    again = scoring()
    again.score(pool)
    assert again.report.n_resumed == 6  # they lie side by side


@pytest.mark.parametrize("scorer", ALONE)
def test_of_another_pool_the_shards_that_are_the_same_are_taken_over(scorer, tmp_path):
    made = rows(24)
    selector(scorer=scorer, cache_dir=tmp_path).score(Dataset.from_list(made))
    made[12] = {**made[12], "prompt": made[12]["prompt"] + "?"}
    again = watched(selector(scorer=scorer, cache_dir=tmp_path), calls := [])
    assert torch.equal(again.score(Dataset.from_list(made)), selector(scorer=scorer).score(Dataset.from_list(made)))
    assert calls == [10] and again.report.n_resumed == 19


def test_where_the_sample_of_the_pool_changed_nothing_is_taken_over(tmp_path):
    made = rows(24)
    selector(cache_dir=tmp_path).score(Dataset.from_list(made))
    made[12] = {**made[12], "prompt": made[12]["prompt"] + "?"}
    again = selector(cache_dir=tmp_path)
    again.score(Dataset.from_list(made))
    assert again.report.n_resumed == 0


def test_nothing_is_written_without_a_folder_and_only_arrow_and_json_with_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    selector().score(prompt_completion())
    assert list(tmp_path.iterdir()) == []
    selector(cache_dir="scores").score(prompt_completion())
    names = sorted(path.name for path in tmp_path.glob("scores/*/*"))
    assert names == ["run.json", *(f"shard-{index:06}.arrow" for index in range(5))]
    (run,) = tmp_path.glob("scores/*/run.json")
    assert json.loads(run.read_text())["scorer"] == "affinity"


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_scoring_leaves_no_files_beside_the_pool(scorer, kind, tmp_path):
    if kind == "arrow":
        for name, dataset in (("pool", conversational()), ("target", conversational(4, seed=1))):
            dataset.save_to_disk(tmp_path / name)
        pool, target = (load_from_disk(tmp_path / name) for name in ("pool", "target"))
    else:
        for name, dataset in (("pool", conversational()), ("target", conversational(4, seed=1))):
            dataset.to_parquet(tmp_path / f"{name}.parquet")
        pool, target = (
            load_dataset("parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train", cache_dir=tmp_path)
            for name in ("pool", "target")
        )
    assert pool.cache_files
    before = sorted(tmp_path.glob("**/*"))
    # in whole conversations all tokens count, which leaves 'ifd' no prompts
    args = SFTConfig(str(tmp_path), bf16=False, report_to="none", assistant_only_loss=scorer == "ifd")
    found = selector(scorer=scorer, target=target, args=args)
    scores = found.score(pool)
    found.estimate(pool)
    assert sorted(tmp_path.glob("**/*")) == before
    again = selector(scorer=scorer, target=conversational(4, seed=1), args=args)
    assert torch.equal(scores, again.score(conversational()))
    assert torch.equal(scores, found.score(pool.with_format("torch")))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_the_report_counts_what_sft_trainer_would_cut(mode, tmp_path):
    args = SFTConfig(str(tmp_path), bf16=False, report_to="none", max_length=17, truncation_mode=mode)
    pool = prompt_completion()

    def trained_on(args):
        trainer = SFTTrainer(tiny_model(), args, train_dataset=pool, processing_class=tiny_tokenizer())
        return trainer.train_dataset

    cut, whole = trained_on(args), trained_on(_args(max_length=None))
    counted = [any(label != -100 for label in labels[1:]) for labels in cut["labels"]]
    scoring = selector(scorer="perplexity", args=args)
    scoring.score(pool)
    report = scoring.report
    assert report.n_rows == 24
    assert report.n_truncated == sum(
        len(a) < len(b) for a, b in zip(cut["input_ids"], whole["input_ids"], strict=True)
    )
    assert 0 < report.n_truncated < 24
    assert report.uncounted_rows == tuple(row for row in range(24) if not counted[row])
    assert report.n_tokens == sum(len(ids) for ids, counts in zip(cut["input_ids"], counted, strict=True) if counts)
    assert report.n_resumed == 0 and report.seconds > 0


def test_scores_that_are_no_numbers_are_named_from_all_shards():
    model = tiny_model()
    letter = tiny_tokenizer().convert_tokens_to_ids("Q")
    # the weights are numbers, what is made of them is none
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == letter)[..., None], torch.nan)
    )
    made = rows(24)
    for row in (3, 11, 23):
        made[row]["prompt"] = "Q" + made[row]["prompt"]
    with pytest.raises(ValueError, match=r"no finite score to 3 of 24 rows of the pool: rows 3, 11, 23\."):
        selector(model, scorer="perplexity").score(Dataset.from_list(made))


def test_a_shard_without_a_token_that_counts_is_no_error():
    made = rows(24)
    for row in range(5, 10):
        made[row]["prompt"] = "x" * 50
    args = _args(max_length=40)
    scoring = selector(args=args, policies=[RoundRobin()], ratio=0.5)
    assert scoring.score(Dataset.from_list(made)).isnan().nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert scoring.report.uncounted_rows == (5, 6, 7, 8, 9)
    assert len(scoring.select(Dataset.from_list(made))) == 12


@pytest.mark.parametrize("scorer", SCORERS)
def test_pools_that_are_none_are_named(scorer):
    with pytest.raises(
        TypeError, match=r"`pool` must be a `datasets\.Dataset` or `datasets\.IterableDataset`, got list"
    ):
        selector(scorer=scorer).score([{"text": "a"}])
    empty = prompt_completion().select([])
    for pool in (empty, IterableDataset.from_generator(lambda: iter(()))):
        with pytest.raises(ValueError, match="`pool` has no rows"):
            selector(scorer=scorer).score(pool)
    with pytest.raises(ValueError, match="`pool` has no rows"):
        selector(scorer=scorer).estimate(empty)
    with pytest.raises(TypeError, match="to forecast, got IterableDataset"):
        selector(scorer=scorer).estimate(prompt_completion().to_iterable_dataset())


@pytest.mark.parametrize("needs_sample", [False, True])
def test_a_forecast_is_right_where_each_row_takes_the_same_time(needs_sample, monkeypatch):
    """By a clock of its own: 2 seconds to open, 1 a row."""
    now, seen = [0.0], []
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(engine, "SAMPLE_ROWS", 10)

    @contextmanager
    def opened(context):
        sampled = set(context.sample.rows) if needs_sample else set()
        now[0] += 2 + len(sampled)

        def score(samples):
            new = [row for row in samples.rows if row not in sampled]
            seen.extend(new)
            now[0] += len(new)
            return RowScores(torch.rand(len(samples)))

        yield score

    scorer = Scorer("own", opened, needs_heads=False, needs_target=False, needs_sample=needs_sample)
    pool = prompt_completion(100)
    for size in (100, 60):
        scoring = selector(scorer="random", batch_size=2)
        scoring.engine = replace(scoring.engine, scorer=scorer)
        seen.clear()
        estimate = scoring.estimate(pool.select(range(size)))
        assert estimate.n_rows == size
        assert estimate.measured_rows == len(seen) == 16
        assert estimate.measured_seconds == 2 + 16 + 10 * needs_sample
        assert estimate.seconds == pytest.approx(2 + size)
        monkeypatch.setattr(engine, "SHARD_ROWS", 100)
        scoring.score(pool.select(range(size)))
        assert scoring.report.seconds == pytest.approx(estimate.seconds)
        assert estimate.n_tokens == pytest.approx(scoring.report.n_tokens, rel=0.15)


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_forecast_of_a_pool_that_is_measured_in_full(scorer):
    scoring = selector(scorer=scorer)
    estimate = scoring.estimate(prompt_completion(10))
    scoring.score(prompt_completion(10))
    assert estimate.n_tokens == scoring.report.n_tokens and estimate.n_rows == 10
    assert 0 < estimate.seconds <= estimate.measured_seconds + 1e-6


_TWO_PROCESSES = """
import json, sys
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from p2d_peft.selection import engine
from p2d_peft.selection.fingerprint import model_fingerprint
from tests.selection.test_selector import SCORERS, selector
from tests.tiny_data import prompt_completion
from tests.tiny_models import tiny_model

torch.set_num_threads(1)
engine.SHARD_ROWS = 5
found = {}
for scorer in SCORERS:
    for kind, pool in (("dataset", prompt_completion()), ("stream", prompt_completion().to_iterable_dataset())):
        chosen = selector(scorer=scorer, ratio=0.3, cache_dir=f"{sys.argv[1]}/{kind}")  # each scored anew
        rows = chosen.select(pool).to_list()
        found[f"{scorer} {kind}"] = [chosen.score(pool).tolist(), rows, chosen.report.n_resumed]
# sets of strings have another order in each process
lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "k_proj", "up_proj"])
found["fingerprint"] = model_fingerprint(get_peft_model(tiny_model(), lora))
# fewer shards than processes
found["one shard"] = selector(scorer="perplexity").score(prompt_completion(4)).tolist()
state = PartialState()
assert state.num_processes == 2
with open(f"{sys.argv[1]}/{state.process_index}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_TWO_PROCESSES)
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ
        | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random", "ACCELERATE_USE_CPU": "true"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    assert first == second
    for scorer in SCORERS:
        alone = selector(scorer=scorer, ratio=0.3, cache_dir=tmp_path / "dataset")
        kept = alone.select(prompt_completion()).to_list()
        assert alone.report.n_resumed == 24  # what several processes scored is good for one
        expected = selector(scorer=scorer).score(prompt_completion()).tolist()
        for kind in ("dataset", "stream"):
            assert first[f"{scorer} {kind}"] == [expected, kept, 24]
    assert first["one shard"] == selector(scorer="perplexity").score(prompt_completion(4)).tolist()


@pytest.mark.parametrize("holder", ["processing_class", "formatting_func", "scorer"])
def test_without_a_hash_of_what_scores_depend_on_none_are_kept(holder, tmp_path, caplog):
    unpicklable = (number for number in ())
    changes = {
        "processing_class": {},
        "formatting_func": {"formatting_func": lambda row: row["prompt"] + "".join(unpicklable)},
        "scorer": {"scorer": replace(_SCORERS["perplexity"], options=unpicklable)},
    }[holder]
    found = selector(cache_dir=tmp_path / "kept", **changes)
    expected = selector(**changes).score(prompt_completion())
    if holder == "processing_class":
        found.engine.processing_class.source = unpicklable
    assert torch.equal(found.score(prompt_completion()), expected)
    assert f"`{holder}` cannot be hashed (cannot pickle 'generator' object). No scores are kept in" in caplog.text
    assert not (tmp_path / "kept").exists()


def test_another_function_of_the_same_name_is_another_scorer(tmp_path):
    @contextmanager
    def by_length(context):
        def score(samples):
            return RowScores(torch.tensor([float(len(ids)) for ids in samples.input_ids]))

        yield score

    @contextmanager
    def by_shortness(context):
        def score(samples):
            return RowScores(torch.tensor([-float(len(ids)) for ids in samples.input_ids]))

        yield score

    found = []
    for function in (by_length, by_length, by_shortness):
        scorer = Scorer("mine", function, needs_heads=False, needs_target=False)
        chosen = selector(scorer=scorer, cache_dir=tmp_path)
        found.append((chosen.score(prompt_completion()), chosen.report.n_resumed))
    assert [resumed for _, resumed in found] == [0, 24, 0]
    assert torch.equal(found[2][0], -found[0][0])


def test_a_transform_is_not_left_out_without_a_word():
    pool = prompt_completion().with_transform(lambda rows: {"text": rows["completion"]})
    for ask in (selector().score, selector().select, selector().estimate):
        with pytest.raises(ValueError, match=r"`pool` has a transform \(`with_transform`\).*`pool.map"):
            ask(pool)


def _penalized(penalty):
    model = tiny_model()
    model.generation_config.repetition_penalty = penalty
    return model


@pytest.mark.parametrize(("scorer", "counts"), [(icl_scorer(lambda answer, right: len(answer)), True), ("icl", False)])
def test_how_a_model_generates_counts_where_it_generates(scorer, counts, tmp_path):
    pool = prompt_completion(6)
    for penalty, resumed in ((1.0, 0), (5.0, 0 if counts else 6), (1.0, 6)):
        found = selector(_penalized(penalty), scorer, cache_dir=tmp_path)
        found.score(pool)
        assert found.report.n_resumed == resumed


@pytest.mark.parametrize("token", [-1, 300])
def test_a_token_without_an_embedding_is_named_with_its_row(token):
    pool = Dataset.from_dict({"input_ids": [[7, 8, 9]] * 12 + [[7, token]] + [[7, 8]]})
    with pytest.raises(
        ValueError, match=f"`pool` holds the token id {token} in row 12, but `model` has embeddings for"
    ):
        selector(scorer="perplexity").score(pool)
