"""The progress bar of a scoring: rows, tokens a second and the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from datasets.config import HF_DATASETS_DISABLE_PROGRESS_BARS
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging
from transformers.utils.logging import tqdm


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """
    Context in which `datasets` shows no bars of its own: one for each step of each part would bury the scoring's. Unless
    `HF_DATASETS_DISABLE_PROGRESS_BARS=0` says that it has to.
    """
    shown = HF_DATASETS_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def no_bars() -> Iterator[None]:
    """Context without bars, of `datasets` or of what goes by transformers' switch, as ours do."""
    shown = logging.is_progress_bar_enabled()
    with quiet_datasets():
        if shown:
            logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()


class ScoringProgress:
    """
    Counts what passes through the model, and shows it.

    Args:
        desc (`str`): What is going on.
        total (`int`, *optional*): Rows to score; unknown for streams.
        passes (`int`): How often each row passes through the model.
        shown (`bool`): Whether there is a bar; one process of several has it.
    """

    def __init__(self, desc: str, total: int | None, passes: int, shown: bool) -> None:
        self.n_tokens = 0
        self._passes = max(passes, 1)
        self._passed = 0
        self._base: int | None = None
        self._shown = 0  # not read off the bar, which is a dummy where bars are switched off
        self._start = time.perf_counter()
        self._bar = tqdm(total=total, desc=desc, unit="row", disable=not shown)

    def start_shard(self) -> None:
        """From here on rows count; what was read before, the target and a sample, does not."""
        self._base, self._passed = self._shown, 0

    def passed(self, n_rows: int, n_tokens: int) -> None:
        """Some rows passed through the model."""
        self.n_tokens += n_tokens
        rate = self.n_tokens / max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        if self._base is not None:
            self._passed += n_rows
            self._show(self._base + self._passed // self._passes)

    def end_shard(self, n_rows: int) -> None:
        """A shard is done, with the rows that needed no pass. What is read until the next one does not count."""
        assert self._base is not None
        self._show(self._base + n_rows)
        self._base = None

    def _show(self, n_rows: int) -> None:
        self._bar.update(n_rows - self._shown)
        self._shown = n_rows

    def close(self) -> None:
        self._bar.close()
