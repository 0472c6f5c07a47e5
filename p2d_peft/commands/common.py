"""What commands share: how a model and heads are named and loaded, and how a plot is saved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..heads import HeadSet


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

DATA = "a .jsonl, .json, .parquet or .csv file, a folder of `save_to_disk`, or a name on the Hub with :split"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that [`load`] reads."""
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument(
        "--dtype", default="auto", help="of its weights: auto, float32, bfloat16, float16 (%(default)s)"
    )
    parser.add_argument("--device", help="where it runs; a GPU if there is one")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens a row is cut off at (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a forward pass (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="for all that is random (%(default)s)")


def load(args: argparse.Namespace) -> tuple[nn.Module, PreTrainedTokenizerBase, SFTConfig]:
    """The model, its tokenizer, and how rows become tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    model = model.to(args.device or accelerator or "cpu")
    config = SFTConfig(bf16=False, report_to="none", max_length=args.max_length)
    return model, AutoTokenizer.from_pretrained(args.model), config


def read_heads(name: str) -> HeadSet:
    """The heads in a `.json` file, or in the folder or Hub repository of an adapter or a head set."""
    return HeadSet.load(name) if Path(name).suffix == ".json" else HeadSet.from_pretrained(name)


def save_plot(ax: Any, path: Path) -> None:
    """Save a drawing and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(path)
    print(f"drawn to {path}")
