"""
Starting `p2d sft` in several processes by accelerate's own launcher, as `trl sft` does: `--accelerate_config` names a
file or one of TRL's configurations, and all else that `p2d sft` does not know goes to `accelerate launch`.
"""

from __future__ import annotations

import argparse
import os
import subprocess

import torch
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument


def is_launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ


def launch_arguments(unknown: list[str], command: list[str]) -> argparse.Namespace | None:
    """
    What to call accelerate's launcher with.

    Args:
        unknown (`list[str]`): Arguments that `p2d sft` does not know.
        command (`list[str]`): The arguments of `p2d`. The processes get all of them, and pass over those of the
            launcher.

    Returns:
        `argparse.Namespace`: or None where there is nothing to launch: no argument says so, there is at most one GPU,
        and the user has not configured accelerate.

    Raises:
        `ValueError`: if `accelerate launch` does not know one of them either.
    """
    several = torch.accelerator.device_count() > 1
    if not unknown and not several and not os.path.isfile(default_config_file):
        return None
    arguments = [*resolve_accelerate_config_argument(unknown), "--module", "p2d_peft.cli", *command]
    known, left = launch_command_parser().parse_known_args(arguments)
    if left or known.training_script != "p2d_peft.cli":
        raise ValueError(f"Neither `p2d sft` nor `accelerate launch` knows {' '.join(left or unknown)}.")
    return known


def launch(arguments: argparse.Namespace) -> None:
    """
    Call accelerate's launcher and wait.

    Raises:
        `SystemExit`: with exit code 2, if a process failed; it has told why itself.
    """
    try:
        launch_command(arguments)
    except (subprocess.CalledProcessError, ChildFailedError):
        raise SystemExit(2) from None
