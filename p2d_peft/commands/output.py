"""What a command prints: one line for an error, and bars and messages as far as they are wanted."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import NoReturn

from ..printable import printable


# Of what is meant for a reader the message says it all; other classes, such as KeyError, say little without their name.
_SPEAKING = (ValueError, TypeError, OSError, ImportError, RuntimeError)


class OneLineErrors:
    """Mixin of parsers that tell of an error in one line, where argparse prints the usage before."""

    prog: str

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {printable(message)} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


class OneLineParser(OneLineErrors, argparse.ArgumentParser):
    """The parser of `p2d`."""


def error_line(error: BaseException) -> str:
    """What is wrong, in one line."""
    text = printable(str(error))
    return text if text and isinstance(error, _SPEAKING) else ": ".join(filter(None, (type(error).__name__, text)))


@contextmanager
def output_as_wanted(quiet: bool, debug: bool) -> Iterator[None]:
    """
    Context in which a command prints as its user wants it to.

    Where `HF_HUB_DISABLE_PROGRESS_BARS` switches bars off, those of `datasets` are off, too, which has a variable of its
    own. What libraries say of their future is for those who write programs.

    Args:
        quiet (`bool`): Print warnings and errors alone.
        debug (`bool`): Print what libraries say of their future.
    """
    from huggingface_hub.utils import are_progress_bars_disabled

    from ..selection.progress import no_bars

    with ExitStack() as stack:
        if quiet or are_progress_bars_disabled():
            stack.enter_context(no_bars())
        if quiet:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        if not debug:
            stack.enter_context(warnings.catch_warnings())
            for category in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", category)
        yield
