"""
`p2d sft`, in the forms of TRL's `sft` script: the same flags and recipes, and those of P2D.

    p2d sft --config examples/recipes/p2d.yaml --learning_rate 1e-3
    accelerate launch scripts/p2d_sft.py --config examples/recipes/p2d.yaml
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import is_progress_bar_enabled
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset

from ..dataset_files import is_local, is_whole, read_dataset
from ..trainer import P2DConfig
from ..trainer.state import P2DState
from .common import read_heads
from .launch import is_launched, launch, launch_arguments
from .output import OneLineErrors


# Optional[...] rather than X | None, and no `from __future__ import annotations`: HfArgumentParser reads the types.
@dataclass
class P2DScriptArguments(ScriptArguments):
    r"""
    Arguments of the script: all of [`~trl.ScriptArguments`], and where to find what else a [`P2DTrainer`] takes. Wherever
    a dataset is named, a `.jsonl`, `.json`, `.parquet` or `.csv` file or a folder that `save_to_disk` wrote will do.

    Parameters:
        target_dataset_name (`str`, *optional*):
            Samples of the task that heads and rows are chosen for. By default they are drawn from the training data.
        target_dataset_config (`str`, *optional*):
            Its configuration's name.
        target_dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        heads_file (`str`, *optional*):
            Heads to be used in place of localizing: a file that `p2d heads` wrote, or the folder or Hub id of an adapter.
    """

    target_dataset_name: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "Path or name of a dataset with samples of the task that heads and rows are chosen for. By default "
            "they are drawn from the training data."
        },
    )
    target_dataset_config: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "Configuration name of the target dataset."}
    )
    target_dataset_split: str = field(default="train", metadata={"help": "Split of the target dataset."})
    heads_file: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "Heads to be used in place of localizing: a file that `p2d heads` wrote, or the folder or Hub id of "
            "an adapter."
        },
    )


def make_parser(prog: Optional[str] = None) -> TrlParser:  # noqa: UP045
    """
    The script's `TrlParser`, as TRL's scripts make theirs.

    Args:
        prog (`str`, *optional*): The program's name in its help.
    """
    return _Parser((P2DScriptArguments, P2DConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


class _Parser(OneLineErrors, TrlParser):
    """TRL's parser, whose usage takes some hundred lines, and whose `--resume_from_checkpoint` takes nothing but a folder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (resume,) = (action for action in self._actions if action.dest == "resume_from_checkpoint")
        resume.nargs, resume.const, resume.type = "?", True, _checkpoint
        resume.help = "Folder of a checkpoint to go on from; with no folder, the last checkpoint in `output_dir`."


def _checkpoint(text: str) -> str | bool:
    """What `train()` is to go on from: a checkpoint's folder, or whether to take the last one."""
    return {"true": True, "false": False}.get(text.lower(), text)


def main(
    script_args: P2DScriptArguments,
    training_args: P2DConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Train, save, and push to the Hub if that is asked for.

    The adapter is HeadSparse; with `use_peft` it is the LoRA of `model_args`, and with `p2d=False` there is none but
    that.

    Raises:
        `ValueError`: if no training data is named, no evaluation data is found where `eval_strategy` asks for it, or
            there is no checkpoint to go on from.
    """
    from trl import get_peft_config, get_quantization_config

    from ..trainer import P2DTrainer

    _check_checkpoint(training_args)
    heads = None if script_args.heads_file is None else read_heads(script_args.heads_file)
    train_dataset, eval_dataset = _training_data(script_args, dataset_args, training_args.eval_strategy != "no")
    target = None
    if script_args.target_dataset_name is not None:
        target = read_dataset(
            script_args.target_dataset_name, script_args.target_dataset_config, script_args.target_dataset_split
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = P2DTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        target_dataset=target,
        heads=heads,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    output = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.log_metrics("train", output.metrics)
    trainer.accelerator.print(
        f"saved to {training_args.output_dir}; `p2d report {training_args.output_dir}` tells what was chosen"
    )
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=_name_on_hub(script_args, dataset_args))
        trainer.accelerator.print(f"pushed to https://huggingface.co/{trainer.hub_model_id}")
    # DDP before the process group: the group's last reference is freed by it else, which waits, with Python's lock held, for a
    # thread that may wait for that lock (torch 2.13, Gloo)
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def _check_checkpoint(args: P2DConfig) -> None:
    """Look at the checkpoint to go on from before anything is loaded; `train()` reads it when all is there."""
    checkpoint = args.resume_from_checkpoint
    if checkpoint is True:
        checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
        if checkpoint is None:
            raise ValueError(
                f"`resume_from_checkpoint`=True, but there is no checkpoint in `output_dir`='{args.output_dir}'. Give the "
                "folder of one, or leave it out to start anew."
            )
    if checkpoint and args.p2d:
        P2DState.load(checkpoint)


def _training_data(
    script_args: P2DScriptArguments, dataset_args: DatasetMixtureConfig, with_eval: bool
) -> tuple[Any, Any]:
    """The pool and, if it is asked for, the evaluation data: of a mixture, or of one dataset, as `trl sft` has them."""
    if dataset_args.datasets:
        mixture = get_dataset(dataset_args)
        if with_eval and "test" not in mixture:
            raise ValueError("`eval_strategy` asks for evaluation data; give `test_split_size` with `datasets`.")
        return mixture["train"], mixture["test"] if with_eval else None
    name = script_args.dataset_name
    if name is None:
        raise ValueError("There is no training data: give `dataset_name`, or `datasets` in a recipe.")
    if with_eval and is_whole(name):
        raise ValueError(
            f"`eval_strategy` asks for evaluation data, but `dataset_name`='{name}' has no splits. Give a "
            "folder with a train and a test split, or the file as `datasets` with `test_split_size`."
        )
    splits = (script_args.dataset_train_split, script_args.dataset_test_split if with_eval else None)
    train, test = (
        None if split is None else read_dataset(name, script_args.dataset_config, split, script_args.dataset_streaming)
        for split in splits
    )
    return train, test


def _name_on_hub(script_args: P2DScriptArguments, dataset_args: DatasetMixtureConfig) -> Optional[str]:  # noqa: UP045
    """The training data's name for the card, which links to it: of a mixture and of what is local there is none."""
    name = script_args.dataset_name
    return None if dataset_args.datasets or name is None or is_local(name) else name


def run(arguments: list[str], of_p2d: Sequence[str] = ()) -> None:
    """
    Run `p2d sft`: here, or through accelerate's launcher where there is something to launch; see [`launch_arguments`].

    Args:
        arguments (`list[str]`): What stands behind `p2d sft`.
        of_p2d (`Sequence[str]`, *optional*): What stands between `p2d` and `sft`.
    """
    launched = is_launched()
    *parsed, of_recipe, of_line = make_parser(prog="p2d sft").parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    launcher = launch_arguments(of_recipe + of_line, [*of_p2d, "sft", *arguments])
    if launched or launcher is None:
        if not is_progress_bar_enabled():  # Trainer's bar alone does not ask
            parsed[1].disable_tqdm = True
        main(*parsed)
    else:
        launch(launcher)
