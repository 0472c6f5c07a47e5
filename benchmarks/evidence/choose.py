"""The stages before the training: heads by a method, rows by a scorer; each is done once, and kept in a file."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from environment import machine, now
from localize import CHOICES
from localize_report import distinct
from torch import nn
from trl import SFTConfig

from p2d_peft import HeadScores, HeadSet, P2DDataSelector, localize_heads
from p2d_peft.files import read_json, write_json
from p2d_peft.heads import ModelGeometry
from p2d_peft.selection.policies import Diverse, Policy, RoundRobin
from p2d_peft.selection.samples import prepare_samples

from .problem import Split, as_dataset
from .profile import ALL_HEADS, PARTS, Cell


HEADS, ROWS = "heads", "rows"
# of files that do not say where they were made
UNKNOWN_MACHINE = {"cpu": "unknown"}


@dataclasses.dataclass
class Seconds:
    """Of a stretch of work: by the clock, and of this process on all its cores."""

    wall: float = 0.0
    cpu: float = 0.0


class Stopwatch:
    """Context that measures [`Seconds`], the accelerator's work included."""

    def __enter__(self) -> Stopwatch:
        self._start = _now()
        return self

    def __exit__(self, *error: object) -> None:
        end = _now()
        self.seconds = Seconds(end[0] - self._start[0], end[1] - self._start[1])


def _now() -> tuple[float, float]:
    return now(), time.process_time()


class Chooser:
    """
    Chooses heads and rows for cells, with a model that stays as it is.

    Args:
        folder (`Path`): Where scores are kept, and looked for.
        load (`Callable[[], nn.Module]`): Loads the model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        arguments (`SFTConfig`): How rows become tokens.
        autocast (`Callable[[], AbstractContextManager]`): Makes the context in which models run.
        batch_size (`int`): Rows a forward pass.
    """

    def __init__(
        self,
        folder: Path,
        load: Callable[[], nn.Module],
        tokenizer: Any,
        arguments: SFTConfig,
        autocast: Callable[[], AbstractContextManager[Any]],
        batch_size: int,
    ) -> None:
        self.folder, self.load, self.tokenizer, self.arguments = folder, load, tokenizer, arguments
        self.autocast, self.batch_size = autocast, batch_size

    def scores(self, problem: Split, cell: Cell, method: str, seed: int) -> tuple[HeadScores, Seconds]:
        """The scores that a method gives the heads on the target's samples, and what finding them took."""
        path = self._heads_file(cell, method, seed)
        if not path.exists():
            with Stopwatch() as watch:
                batches: list[Any] = []
                if problem.target:
                    samples = prepare_samples(
                        as_dataset(problem.target), self.tokenizer, self.arguments, name="target"
                    )
                    batches = [batch for _, batch in samples.batches(self.batch_size, torch.device("cpu"))]
                model = self.load()
                batches = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
                with self.autocast():
                    # random heads are others for another target
                    number = zlib.crc32(f"{cell.target} {seed}".encode())
                    scores = localize_heads(model, batches, method, seed=number)  # type: ignore[arg-type]
            scores = dataclasses.replace(scores, model_id=None)  # a path here
            _write(path, watch.seconds, scores=scores.to_dict())
        content = read_json(path)
        return HeadScores.from_dict(content["scores"]), Seconds(**content["seconds"])

    def localize_seconds(self, problem: Split, cell: Cell, seed: int) -> Seconds:
        """What finding the heads took that a cell scores by and trains: once, where one method finds both."""
        of_each = [self.scores(problem, cell, method, seed)[1] for method in _methods(cell)]
        return Seconds(sum(seconds.wall for seconds in of_each), sum(seconds.cpu for seconds in of_each))

    def trained_heads(self, problem: Split, cell: Cell, seed: int) -> HeadSet | None:
        """The heads to train, if heads are."""
        parameters = cell.parameters
        if parameters.method is None:
            return None
        if parameters.method == ALL_HEADS:
            return ModelGeometry.of(self.load()).heads
        return CHOICES[parameters.choice](self.scores(problem, cell, parameters.method, seed)[0], parameters.ratio)

    def _scoring_heads(self, problem: Split, cell: Cell, seed: int, model: nn.Module) -> HeadSet | None:
        method, part = cell.data.heads, PARTS[cell.data.part] if cell.data.part else None
        if method is None:
            return None
        if method != ALL_HEADS:
            scores = self.scores(problem, cell, method, seed)[0]
            return scores.top(per_layer="even", first_layers=part)
        heads = ModelGeometry.of(model).heads
        if part is None:
            return heads
        n_layers = ModelGeometry.of(model).shape[0]
        return HeadSet(head for head in heads if head.layer < round(part * n_layers))

    def rows(self, problem: Split, cell: Cell, seed: int) -> tuple[list[int], Seconds]:
        """The rows of the pool that a scorer keeps, and what scoring all of them took."""
        data = cell.data
        if data.scorer == "full":
            return list(range(len(problem.pool))), Seconds()
        path = self._rows_file(cell, seed)
        if not path.exists():
            model = self.load()
            policies: list[Policy] = [RoundRobin()] if data.robin else []
            if data.diverse:
                policies.append(Diverse())
            selector = P2DDataSelector(
                model,
                self.tokenizer,
                heads=self._scoring_heads(problem, cell, seed, model),
                target=as_dataset(problem.samples) if problem.samples else None,
                scorer=data.scorer,  # type: ignore[arg-type]
                ratio=data.ratio,
                policies=policies,
                args=self.arguments,
                batch_size=self.batch_size,
                seed=seed,
            )
            with Stopwatch() as watch, self.autocast():
                selector.select(as_dataset(problem.pool))
            if selector.scores is None or selector.scores.isnan().any():
                raise ValueError(f"{path.name}: rows without an answer to score")
            _write(path, watch.seconds, rows=selector.rows)
        content = read_json(path)
        return content["rows"], Seconds(**content["seconds"])

    def machines(self, cell: Cell, seed: int) -> list[dict[str, Any]]:
        """Where what finding a cell's heads and rows took was measured, once it was; each machine once."""
        files = [self._heads_file(cell, method, seed) for method in _methods(cell)]
        if cell.data.scorer != "full":
            files.append(self._rows_file(cell, seed))
        return distinct(read_json(path).get("machine", UNKNOWN_MACHINE) for path in files)

    def _heads_file(self, cell: Cell, method: str, seed: int) -> Path:
        return self.folder / HEADS / f"{cell.target}-{method}-seed{seed}.json"

    def _rows_file(self, cell: Cell, seed: int) -> Path:
        name = str(cell.data).replace(":", ".").replace("/", "_")
        return self.folder / ROWS / f"{cell.setting}-{cell.target}-{name}-seed{seed}.json"


def _methods(cell: Cell) -> set[str]:
    """The methods that find the heads by which a cell scores and those that it trains."""
    return {method for method in (cell.data.heads, cell.parameters.method) if method not in (None, ALL_HEADS)}


def _write(path: Path, seconds: Seconds, **found: Any) -> None:
    write_json(path, {**found, "seconds": dataclasses.asdict(seconds), "machine": machine()})
