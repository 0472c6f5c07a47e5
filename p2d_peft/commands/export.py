"""`p2d export`: a trained adapter as files that need no `p2d_peft`."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

from ..files import check_new, unfinished
from .common import DTYPES, count


Format = Literal["lora", "merged"]

# folders of a run that hold adapters which are none of its own: copies, and what training goes on from
_OTHERS = ("lora", "checkpoint-*", "last-checkpoint")


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `p2d`."""
    export = commands.add_parser("export", help="turn a trained adapter into LoRA or into a merged model")
    export.add_argument("adapter", metavar="RUN_OR_ADAPTER", help="folder of a run or of an adapter, or a Hub id")
    export.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist")
    export.add_argument(
        "--format",
        choices=get_args(Format),
        default="lora",
        help="lora: for PEFT, vLLM and others; merged: the whole model (%(default)s)",
    )
    export.add_argument(
        "--max-rank", type=count, help="cut modules of a higher rank down to this one; by default nothing is lost"
    )
    export.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of what is written; auto: the adapter's, merged the base's"
    )
    export.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export and say what was lost."""
    export_adapter(args.adapter, args.output, args.format, args.max_rank, args.dtype)


def export_adapter(
    adapter: str, output: str | Path, format: Format = "lora", max_rank: int | None = None, dtype: str = "auto"
) -> None:
    """
    Write an adapter as LoRA or merged into its base, with its tokenizer, in full or not at all.

    Args:
        adapter (`str`): Folder of an adapter or of a run, of which the last checkpoint is taken where the training did
            not end; or an adapter's Hub id.
        output (`str` or `Path`): Folder to write.
        format (`str`, *optional*, defaults to `"lora"`): `"lora"`, for HeadSparse adapters; or `"merged"`, for any.
        max_rank (`int`, *optional*): See [`~tuners.head_sparse.save_as_lora`].
        dtype (`str`, *optional*, defaults to `"auto"`): Of the written weights: `"float32"`, `"bfloat16"`, `"float16"`,
            or as they are, which is the adapter's for LoRA and the base model's for merged.

    Raises:
        `ValueError`: if `output` exists, `adapter` holds no adapter, one of another method or a damaged one, or
            `max_rank` is given with `format="merged"`. Nothing is loaded before.
    """
    check_new(output)
    if format == "merged" and max_rank is not None:
        raise ValueError(f"`max_rank`={max_rank} is for `format`='lora'; a merged model has no rank.")
    adapter = _find_adapter(adapter)

    import torch
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoTokenizer

    from ..tuners import HeadSparseConfig
    from ..tuners.head_sparse import save_as_lora

    config = PeftConfig.from_pretrained(adapter)
    if format == "lora" and not isinstance(config, HeadSparseConfig):
        raise ValueError(f"'{adapter}' is no HeadSparse adapter but {config.peft_type.value}; merge it.")
    tokenizer_source = _tokenizer_folder(adapter)
    if format == "merged":
        tokenizer_source = tokenizer_source or config.base_model_name_or_path
    _check_weights(adapter)
    try:
        tokenizer = None if tokenizer_source is None else AutoTokenizer.from_pretrained(tokenizer_source)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT goes on without them
            # a LoRA holds nothing of the base, so that only what is merged need be loaded in the dtype asked for
            model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype if format == "merged" else "auto")
    except Exception as error:
        base = config.base_model_name_or_path
        raise ValueError(f"'{adapter}' cannot be loaded on its base model '{base}': {error}") from error
    with unfinished(output) as folder:
        if format == "merged":
            model.merge_and_unload(safe_merge=True).save_pretrained(folder)
            print(f"merged into {config.base_model_name_or_path}")
        else:
            if dtype != "auto":
                model = model.to(getattr(torch, dtype))
            report = save_as_lora(model, folder, max_rank=max_rank)
            lost = f"a relative error of {report.error:.2e}" if report.error else "nothing lost"
            print(f"LoRA of rank {max(report.ranks.values())}, {lost}")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    print(f"written to {output}")


def _check_weights(adapter: str) -> None:
    """Look at an adapter's weights before its base model is loaded. Files that would be unpickled are none."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import SafetensorError, safe_open

    path = os.path.join(adapter, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"'{adapter}' has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter anew, other files are not read."
        )
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or cut off: {error}. Take another checkpoint.") from error


def _tokenizer_folder(adapter: str) -> str | None:
    """Where an adapter's tokenizer is: beside it or, of an adapter that has a name, in the run's folder around it."""
    for folder in (adapter, os.path.dirname(os.path.abspath(adapter))):
        if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
            return folder
    return None


def _find_adapter(name: str) -> str:
    """The folder that holds the adapter that a run, an adapter or a Hub id stands for."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from peft.utils import CONFIG_NAME
    from transformers.trainer_utils import get_last_checkpoint

    try:
        root = name if os.path.isdir(name) else _download(name)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"There is no folder '{name}' to find an adapter in, and from the Hub: {error}") from error
    for folder in filter(None, (root, get_last_checkpoint(root))):
        found = _adapters_in(folder)
        if len(found) > 1:
            names = ", ".join(map(os.path.basename, found))
            raise ValueError(f"'{folder}' has the adapters {names}; give the folder of one, such as '{found[0]}'.")
        if found:
            return found[0]
    raise ValueError(f"'{name}' has no {CONFIG_NAME}, nor has a checkpoint in it: there is no adapter to export.")


def _adapters_in(folder: str) -> list[str]:
    """The folders of the adapters that PEFT saved into a folder: that one or, if they have names, some in it."""
    from peft.utils import CONFIG_NAME

    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        return [folder]
    found = sorted(path.parent for path in Path(folder).glob(f"*/{CONFIG_NAME}"))
    return [str(path) for path in found if not any(path.match(other) for other in _OTHERS)]


def _download(name: str) -> str:
    """What of a run on the Hub can be exported: no checkpoints, and folders only if the adapter is in none but those."""
    from huggingface_hub import snapshot_download
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

    root: str = snapshot_download(name, ignore_patterns=["*/*"])
    if not os.path.isfile(os.path.join(root, CONFIG_NAME)):
        wanted = [f"*/{file}" for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)]
        snapshot_download(name, allow_patterns=wanted, ignore_patterns=[f"{other}/*" for other in _OTHERS])
    return root
