"""The model card of a run: how to load the adapter, what was chosen, and what it cost."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME
from transformers.integrations import is_wandb_available
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from ..heads import ModelGeometry
from ..report import P2DReport
from ..report.pictures import COSTS_NAME, CURVES_NAME, DATA_NAME, save_pictures
from ..report.run_folder import Run
from ..report.run_report import library_versions
from .saved_files import PICTURE_NAME, adapter_folder, is_head_sparse, lora_folder, save_heads
from .state import P2DState


if TYPE_CHECKING:
    from .p2d_trainer import P2DTrainer

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_MARKUP = re.compile(r"([\\`*_\[\]<>#|~&!$])")


def complete_model_card(trainer: P2DTrainer, model_name: str | None) -> None:
    """
    Put our card in the place of the one that TRL has just written, and keep its metadata. TRL's stays where it is right:
    before training, for a model without P2D in it, and for one that the adapter was merged into.

    Args:
        trainer (`P2DTrainer`): The trainer, on its main process.
        model_name (`str`, *optional*): The card's title.
    """
    folder, model = Path(trainer.args.output_dir), trainer.accelerator.unwrap_model(trainer.model)
    state, head_sparse, in_training = trainer._p2d_state, is_head_sparse(model), trainer.is_in_train
    if not is_peft_model(model) or (state is None and not head_sparse):
        return
    save_heads(folder, model, trainer.heads, trainer.head_scores)  # the card shows them

    data = ModelCard.load(folder / REPOCARD_NAME).data
    data.library_name = "peft"
    data.pipeline_tag = "text-generation"
    # the Hub refuses cards that name what cannot be a repository
    base, dataset = data.base_model, data.datasets
    data.base_model, data.datasets = (name if is_repo_id(name) else None for name in (base, dataset))

    has_lora = head_sparse and not in_training and (folder / lora_folder(model) / CONFIG_NAME).is_file()
    values: dict[str, Any] = {
        "title": inline(model_name or folder.name),
        "method": _method(model),
        "base_model": "a model that is not on the Hub" if data.base_model is None else link(data.base_model),
        "dataset": dataset and link(dataset, "datasets/"),
        "paper_title": trainer._paper.get("title"),
        "paper_id": trainer._paper.get("id"),
        "citation": trainer._paper.get("citation"),
        "is_head_sparse": head_sparse,
        "repo_literal": literal(trainer.hub_model_id or folder.name),
        "base_literal": literal(data.base_model or "path/to/the/base/model"),
        "subfolder_literal": _path_literal(adapter_folder(model)),
        "lora_literal": _path_literal(lora_folder(model)) if has_lora else None,
        "choices": None if state is None else _choices(model, state),
        "costs": None if trainer.report is None or in_training else _costs(trainer.report),
        "picture_names": {"costs": COSTS_NAME, "data": DATA_NAME, "curves": CURVES_NAME},
        "pictures": {} if trainer.report is None or in_training else _pictures(folder),
        "picture": PICTURE_NAME if (folder / PICTURE_NAME).is_file() else None,
        "versions": library_versions().items(),
        "tracking": ", ".join(_tracking_links()),
    }
    ModelCard.from_template(data, template_path=str(_TEMPLATE), **values).save(folder / REPOCARD_NAME)


def _pictures(folder: Path) -> dict[str, str]:
    """The plots of a finished run, saved for the card, with what is on them; none where they cannot be drawn."""
    try:
        return save_pictures(folder, Run.read(folder))
    except (ImportError, ValueError) as error:  # without matplotlib, or where someone meddled with the folder
        logger.info("The card has no plots. %s", error)
        return {}


@dataclass(frozen=True)
class _Choices:
    """What was chosen, as the template shows it."""

    trains_heads: bool
    heads_are_drawn: bool
    heads_by_layer: dict[Any, list[int]] | None
    table: list[tuple[str, ...]]


def _choices(model: Any, state: P2DState) -> _Choices:
    table: list[tuple[str, ...]] = []
    if state.heads is not None:
        by = "given" if state.localize_method is None else f"`{state.localize_method}`"
        n_heads = len(ModelGeometry.of(model).heads)
        table.append(("heads", *_part(len(state.heads), n_heads), by))
        if state.scoring_heads is not None and state.scoring_heads != state.heads:
            table.append(("heads that score", *_part(len(state.scoring_heads), n_heads), by))
    if state.rows is None:
        table.append(("rows", "all", _number(state.pool_rows), _percent(1), ""))
    else:
        # users' scorers have any name
        table.append(("rows", *_part(len(state.rows), state.pool_rows), inline(state.scorer)))
        table.append(("tokens", *_part(state.selected_tokens, state.pool_tokens), ""))
    return _Choices(
        trains_heads=is_head_sparse(model),
        heads_are_drawn=state.localize_method == "random",
        heads_by_layer=None if state.heads is None else state.heads.by_layer(),
        table=table,
    )


def _part(chosen: int | None, of: int | None) -> tuple[str, str, str]:
    share = "" if chosen is None or of is None else _percent(chosen / of)
    return _number(chosen), _number(of), share


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


@dataclass(frozen=True)
class _Costs:
    """What it cost, as the template shows it."""

    stages: list[tuple[str, ...]]  # stage, seconds, tokens, peak memory
    memory_kind: str | None
    weights: str
    epochs: str
    aer: str


def _costs(report: P2DReport) -> _Costs:
    tokens, peaks = report.stage_tokens, report.stage_peak_memory
    stages: list[tuple[str, ...]] = [
        (stage, f"{seconds:,.1f}", _number(tokens.get(stage)), _gibibytes(peaks.get(stage)))
        for stage, seconds in report.stage_seconds.items()
    ]
    total = sum(report.stage_seconds.values())
    stages.append(
        ("all", f"{total:,.1f}", _number(sum(tokens.values())), _gibibytes(max(peaks.values(), default=None)))
    )
    if report.aer is None or report.reference_seconds is None:
        aer = "There is no AER, since the reference (full fine-tuning on all rows) was neither measured nor estimated."
    else:
        error = report.reference_relative_error
        source = "estimated" if report.reference_source == "estimated" else "measured"
        stages.append(
            (
                f"full fine-tuning on all rows, {source}",
                f"{report.reference_seconds:,.1f}{'' if error is None else f' ± {_percent(error)}'}",
                "",
                "",
            )
        )
        aer = (
            f"The Alignment Efficiency Ratio (AER), all stages over full fine-tuning on all rows, is {report.aer:.3g}: a "
            f"speed-up of {report.speedup:.3g}."
        )
    return _Costs(
        stages=stages,
        memory_kind=report.peak_memory_kind,
        weights=f"{report.trainable_parameters:,} of {report.total_parameters:,}",
        epochs=f"{report.epochs:.3g} epoch{'' if report.epochs == 1 else 's'}",
        aer=aer,
    )


def _gibibytes(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.2f} GiB"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _method(model: Any) -> str:
    """The adapter's method with its article, to begin a sentence with."""
    if is_head_sparse(model):
        return "A HeadSparse"
    return f"A PEFT ({inline(model.peft_config[model.active_adapter].peft_type.value)})"


def _tracking_links() -> Iterable[str]:
    if is_wandb_available():
        import wandb

        if wandb.run is not None:
            yield f"[Weights & Biases]({wandb.run.url})"
    for name, url in (("Trackio", get_trackio_space_url()), ("Comet", get_comet_experiment_url())):
        if url is not None:
            yield f"[{name}]({url})"


def is_repo_id(name: Any) -> bool:
    """Whether a value may be the id of a Hub repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None


def inline(text: Any) -> str:
    """Any text as one line of markdown that shows the text, whatever markup it holds."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def link(name: Any, kind: str = "") -> str:
    """The name of a repository as a link to it, if it can be one; `kind` is `"datasets/"` for data sets."""
    return f"[{inline(name)}](https://huggingface.co/{kind}{name})" if is_repo_id(name) else inline(name)


def literal(text: str) -> str:
    """A text as a literal of Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _path_literal(path: Path) -> str | None:
    return None if path == Path() else literal(path.as_posix())
