"""What commands share: how numbers, a model and heads are named, checked and loaded, and how a plot is saved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..argument_checks import check_count, check_share
from ..files import check_writable, replacing
from ..heads import HeadSet


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

DATA = "a .jsonl, .json, .parquet or .csv file, a folder of `save_to_disk`, or a name on the Hub with :split"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def share(text: str) -> float:
    """A share of something, as an argument."""
    return _checked(float, check_share, text)


def count(text: str) -> int:
    """A number of things, as an argument."""
    return _checked(int, check_count, text)


def _checked(kind: Any, check: Any, text: str) -> Any:
    try:
        value = kind(text)
        check("", value)
    except ValueError:
        wanted = "a number in (0, 1]" if kind is float else "an integer of at least 1"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that [`load_tokenizer`] and [`load_model`] read."""
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of its weights: auto, float32, bfloat16, float16 (%(default)s)",
    )
    parser.add_argument("--device", help="where it runs; a GPU if there is one")
    parser.add_argument("--max-length", type=count, default=1024, help="tokens a row is cut off at (%(default)s)")
    parser.add_argument("--batch-size", type=count, default=8, help="rows a forward pass (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="for all that is random (%(default)s)")


def load_tokenizer(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, SFTConfig]:
    """The model's tokenizer, and how rows become tokens."""
    from transformers import AutoTokenizer
    from trl import SFTConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except Exception as error:  # what is missing or damaged, a dozen classes tell of, and few name the model
        raise ValueError(f"The tokenizer of --model '{args.model}' cannot be loaded: {error}") from error
    return tokenizer, SFTConfig(bf16=False, report_to="none", max_length=args.max_length)


def load_model(args: argparse.Namespace, heads: HeadSet | None = None, needs_heads: bool = True) -> nn.Module:
    """
    The model, on its device. What can be wrong with its attention, and with `heads` for it, is found before its weights are
    loaded.
    """
    from transformers import AutoModelForCausalLM

    from ..trainer.checks import geometry_of_saved

    device = _device(args.device)
    try:
        geometry = geometry_of_saved(args.model) if needs_heads else None
    except OSError as error:
        raise ValueError(f"--model '{args.model}' cannot be loaded: {error}") from error
    if geometry is not None and heads is not None:
        geometry.check(heads)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    except Exception as error:
        raise ValueError(f"--model '{args.model}' cannot be loaded: {error}") from error
    return model.to(device)


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # of torch builds without it, an assertion
        raise ValueError(f"--device '{name}' is not there: {error}") from error


def read_heads(name: str) -> HeadSet:
    """The heads in a `.json` file, or in the folder or Hub repository of an adapter or a head set."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).suffix == ".json":
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file '{name}' to read heads from; `p2d heads` writes one.")
        return HeadSet.load(name)
    try:
        return HeadSet.from_pretrained(name)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"There is no folder '{name}' to read heads from, and from the Hub: {error}") from error


def check_plot(path: Path) -> None:
    """
    Check, before any work, that a drawing can be saved.

    Raises:
        `ImportError`: if matplotlib is missing.
        `ValueError`: if it knows no such format.
        `OSError`: as [`check_writable`] does.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: `pip install 'p2d_peft[plots]'`.") from error
    if path.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--plot '{path}' has an ending that matplotlib does not know; take .png, .svg or .pdf.")
    check_writable(path)


def save_plot(ax: Any, path: Path) -> None:
    """Save a drawing, whole or not at all, and say where."""
    with replacing(path) as temporary:
        ax.figure.savefig(temporary, format=path.suffix[1:])
    print(f"drawn to {path}")
