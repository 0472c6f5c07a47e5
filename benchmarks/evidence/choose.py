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
from localize import CHOICES
from torch import nn
from trl import SFTConfig

from p2d_peft import HeadScores, HeadSet, P2DDataSelector, localize_heads
from p2d_peft.files import read_json, write_json
from p2d_peft.heads import ModelGeometry
from p2d_peft.selection.samples import prepare_samples

from .problem import Split, as_dataset
from .profile import ALL_HEADS, Cell, Parameters


HEADS, ROWS = "heads", "rows"


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
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter(), time.process_time()


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

    def heads(self, problem: Split, cell: Cell, parameters: Parameters, seed: int) -> tuple[HeadSet, Seconds]:
        """The heads that a method finds on the target's samples, and what finding them took."""
        if parameters.method == ALL_HEADS:
            return ModelGeometry.of(self.load()).heads, Seconds()
        path = self.folder / HEADS / f"{cell.target}-{parameters.method}-seed{seed}.json"
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
                    scores = localize_heads(model, batches, parameters.method, seed=number)  # type: ignore[arg-type]
            scores = dataclasses.replace(scores, model_id=None)  # a path here
            write_json(path, {"scores": scores.to_dict(), "seconds": dataclasses.asdict(watch.seconds)})
        content = read_json(path)
        heads = CHOICES[parameters.choice](HeadScores.from_dict(content["scores"]), parameters.ratio)
        return heads, Seconds(**content["seconds"])

    def rows(self, problem: Split, cell: Cell, seed: int) -> tuple[list[int], Seconds]:
        """The rows of the pool that a scorer keeps, and what scoring all of them took, finding its heads included."""
        data = cell.data
        if data.scorer == "full":
            return list(range(len(problem.pool))), Seconds()
        # scores are the same for all ratios
        scored_by = str(dataclasses.replace(data, ratio=0.1)).replace(":", ".").replace("/", "_")
        path = self.folder / ROWS / f"{cell.setting}-{cell.target}-{scored_by}-seed{seed}.json"
        model = self.load()
        heads, localized = None, Seconds()
        if data.heads:
            heads, localized = self.heads(problem, cell, Parameters("heads", data.heads), seed)
            if data.lower:
                n_layers = ModelGeometry.of(model).shape[0]
                heads = HeadSet(head for head in heads if 2 * head.layer < n_layers)
        selector = P2DDataSelector(
            model,
            self.tokenizer,
            heads=heads,
            target=as_dataset(problem.target) if problem.target else None,
            scorer=data.scorer,  # type: ignore[arg-type]
            ratio=data.ratio,
            args=self.arguments,
            batch_size=self.batch_size,
            seed=seed,
        )
        if not path.exists():
            with Stopwatch() as watch, self.autocast():
                scores = selector.score(as_dataset(problem.pool))
            if scores.isnan().any():
                raise ValueError(f"{path.name}: rows without an answer to score")
            rounded = [float(f"{score:.9g}") for score in scores.tolist()]
            write_json(path, {"scores": rounded, "seconds": dataclasses.asdict(watch.seconds)})
        content = read_json(path)
        seconds = Seconds(**content["seconds"])
        return selector.choose(torch.tensor(content["scores"], dtype=torch.float64)), Seconds(
            seconds.wall + localized.wall, seconds.cpu + localized.cpu
        )
