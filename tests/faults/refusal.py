"""How a bad input has to end: told of by name, before the model is run, with nothing lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from p2d_peft.cli import main


class Case(NamedTuple):
    """
    A bad input.

    Args:
        name: What is bad about it.
        call: The call with it.
        error: The class of the error.
        said: What the message has to say: the argument, its value, the way out.
    """

    name: str
    call: Callable[[], Any]
    error: type[BaseException]
    said: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.name


def cases(*table: Case) -> pytest.MarkDecorator:
    """A table of cases as the parameters of a test."""
    assert len({case.name for case in table}) == len(table)
    return pytest.mark.parametrize("case", table, ids=[case.name for case in table])


@contextmanager
def no_forward_pass() -> Iterator[None]:
    """Context in which each forward pass of a module, whichever, is an error."""

    def fail(module: torch.nn.Module, inputs: Any) -> None:
        raise AssertionError(f"{type(module).__name__} was run")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(case: Case, folder: Path | None = None) -> None:
    """Check how a case ends, and that it leaves a folder as it is."""
    before = None if folder is None else contents(folder)
    with no_forward_pass(), pytest.raises(case.error) as raised:
        case.call()
    assert type(raised.value) is case.error or not issubclass(case.error, (TypeError, ValueError))
    message = str(raised.value)
    assert all(part in message for part in case.said), message
    if folder is not None:
        assert contents(folder) == before


def assert_command_refused(arguments: list[str], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Check that `p2d` ends with exit code 2 and one line, before the model is run."""
    capsys.readouterr()
    with no_forward_pass():
        try:
            code = main(arguments)
        except SystemExit as stopped:  # argparse
            code = stopped.code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1, printed.err
    assert lines[0].startswith(f"p2d {arguments[0]}: ") and lines[0].isprintable()
    assert all(part in lines[0] for part in said), lines[0]
