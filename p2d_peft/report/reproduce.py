"""The commands that make a run again."""

from __future__ import annotations

import re
import shlex

from ..heads.hub import HEADS_NAME
from .run_report import P2DReport


# What may stand behind "--", or before "==": a report may come from anyone, and its commands are there to be copied.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def reproduction(report: P2DReport) -> list[str]:
    """
    The commands that install what a run used and make it again. What the report cannot know stands there in capitals:
    the data, and the folder to write to. Of an adapter other than HeadSparse it knows the kind alone, so a comment says
    what has to be given.

    Args:
        report ([`P2DReport`]): The report. Whatever is in it becomes one word of the shell, and nothing more.
    """
    packages = [
        f"{name}=={version.partition('+')[0]}"  # "+cpu" and the like are on no index
        for name, version in report.versions.items()
        if name != "python"
        and _NAME.fullmatch(name)
        and _NAME.fullmatch(f"v{version}".replace(".", "").partition("+")[0])
    ]
    options = {"model_name_or_path": report.model or "MODEL", "dataset_name": "POOL"}
    if report.arguments.get("p2d") is not False:
        options["target_dataset_name"] = "TARGET"
        if report.heads is not None and report.localize_method is None:
            options["heads_file"] = f"RUN/{HEADS_NAME}"
    arguments = {"seed": report.seed, **report.arguments}
    adapter = arguments.pop("peft_type", None)
    for name, value in arguments.items():
        if _NAME.fullmatch(name) and value is not None:
            options[name] = str(value).lower() if isinstance(value, bool) else str(value)
    if adapter == "LORA":
        options["use_peft"] = "true"
    options["output_dir"] = "AGAIN"
    lines = ["p2d sft", *(f"--{name} {shlex.quote(value)}" for name, value in options.items())]
    train = " \\\n    ".join(lines)
    if isinstance(adapter, str) and _NAME.fullmatch(adapter):
        how = "add its --lora_ options" if adapter == "LORA" else "pass it to P2DTrainer as peft_config"
        train = f"# The adapter was {adapter}, and its configuration is not in the report: {how}.\n{train}"
    return [shlex.join(["pip", "install", *packages]), train]
