import pytest
from transformers.utils import logging

from p2d_peft.selection import engine, progress
from p2d_peft.selection.progress import ScoringProgress

from ..tiny_data import prompt_completion
from .test_selector import selector


class Bar:
    """A progress bar that keeps its steps."""

    made: list["Bar"] = []

    def __init__(self, total, desc, unit, disable):
        self.total, self.desc, self.shown, self.steps, self.closed = total, desc, not disable, [], False
        Bar.made.append(self)

    def update(self, n):
        self.steps.append(n)

    def set_postfix_str(self, text, refresh):
        self.postfix = text

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    Bar.made = []
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(engine, "SHARD_ROWS", 7)
    return Bar.made


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_rows_count_once_however_often_they_pass(bars, passes):
    counted = ScoringProgress("rows", 10, passes, shown=True)
    counted.passed(100, 1000)  # the target
    for n_rows in (6, 4):
        counted.start_shard()
        for _ in range(passes):
            for _ in range(n_rows // 2):
                counted.passed(2, 20)
        counted.end_shard(n_rows)
        counted.passed(50, 10)  # between shards
    counted.close()
    (bar,) = bars
    assert sum(bar.steps) == bar.total == 10 and min(bar.steps) >= 0 and bar.closed
    assert counted.n_tokens == 1000 + 100 * passes + 2 * 10
    if passes:
        assert bar.steps[0] == 2 // passes
        assert bar.postfix.endswith(" tokens/s")


@pytest.mark.parametrize("scorer", ["affinity", "icl", "perplexity", "random"])
def test_the_bar_ends_at_the_size_of_the_pool_also_after_a_resumed_run(bars, scorer, tmp_path):
    pool = prompt_completion()
    selector(scorer=scorer, cache_dir=tmp_path).score(pool)
    next(tmp_path.glob("*/shard-000002.arrow")).unlink()
    selector(scorer=scorer, cache_dir=tmp_path).score(pool)
    for bar in bars:
        assert sum(bar.steps) == bar.total == 24 and min(bar.steps) >= 0 and bar.shown and bar.closed
        assert bar.desc == f"Select ({scorer})"


def test_a_stream_has_no_total(bars):
    selector(scorer="perplexity").score(prompt_completion().to_iterable_dataset())
    assert bars[0].total is None and sum(bars[0].steps) == 24


def test_nothing_is_printed_where_bars_are_switched_off(capsys, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    logging.disable_progress_bar()
    selector(num_samples=3).select(prompt_completion())
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.strip() == ""  # the tokenizer's training prints empty lines


def test_the_one_bar_is_that_of_the_scoring(capsys, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    selector(scorer="perplexity").score(prompt_completion())
    printed = capsys.readouterr().err
    assert "Select (perplexity)" in printed and "tokens/s" in printed
    assert "Tokenizing" not in printed and "EOS" not in printed
