"""Runs arms: one result file each, and none twice."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import statistics
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from answers import judge_answers
from environment import device, load_average, machine, processes_per_device, versions
from quickstart import fast_dtype
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from p2d_peft.files import read_json, write_json
from p2d_peft.memory import PeakMemory, memory_kind
from p2d_peft.selection.samples import prepare_samples

from . import adapt
from .base import few_shot, judge_options, judge_passages, line_ends
from .choose import Chooser, Stopwatch
from .problem import Row, Split, as_dataset, split, task_names
from .profile import ANY, Arm, Cell, Profile


ARMS, BASE, SETTINGS = "arms", "base", "settings.json"


class Runner:
    """
    The model, the rows and the folder that arms share.

    Args:
        profile ([`Profile`]): What there is to run.
        tasks (`dict[str, list[dict]]`): The rows, see [`bigbench.fetch`].
        model (`str`): The model's folder or Hub id.
        folder (`Path`): Where results are written to.
        command (`str`): What was called, to be put into the results.
        jobs (`int`): Processes that are at work at the same time, this one among them.

    Raises:
        `SystemExit`: if `folder` holds results of other sizes, another model or another training.
    """

    def __init__(
        self, profile: Profile, tasks: dict[str, list[Row]], model: str, folder: Path, command: str, jobs: int = 1
    ) -> None:
        self.profile, self.tasks, self.model, self.folder, self.command = profile, tasks, model, folder, command
        self.jobs = jobs
        training = profile.training
        self.device = device()
        dtype = fast_dtype() if training.dtype == "auto" else getattr(torch, training.dtype)
        self.bf16 = dtype == torch.bfloat16
        self._check_settings(str(dtype).removeprefix("torch."))
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        with tempfile.TemporaryDirectory() as unused:
            self.arguments = self._arguments(Path(unused), epochs=1, lr=1e-3, seed=0)
        self.chooser = Chooser(folder, self._load, self.tokenizer, self.arguments, self._autocast, training.batch_size)

    def _check_settings(self, dtype: str) -> None:
        settings = {
            "model": Path(self.model).name,
            "problem": dataclasses.asdict(self.profile.problem),
            "training": {**dataclasses.asdict(self.profile.training), "dtype": dtype},
            "rows_sha256": hashlib.sha256(repr(self.tasks).encode()).hexdigest(),
        }
        path = self.folder / SETTINGS
        if path.exists() and (there := read_json(path)) != settings:
            raise SystemExit(
                f"'{self.folder}' holds results with other settings ({_differing(there, settings)}). Name another --output (for "
                "scripts/evidence.sh another RESULTS)."
            )
        write_json(path, settings)

    def _load(self) -> nn.Module:
        dtype = getattr(torch, self.profile.training.model_dtype)
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        return model.to(self.device).eval().requires_grad_(False)

    def _autocast(self) -> AbstractContextManager[Any]:
        # Without its cache, which would not notice that a method changes weights between two passes.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def _arguments(self, folder: Path, *, epochs: int, lr: float, seed: int) -> Any:
        return adapt.training_arguments(
            self.profile.training, folder, epochs=epochs, lr=lr, seed=seed, bf16=self.bf16, on_cpu=adapt.on_cpu()
        )

    # -- stages before the arms, which they share

    def localize(self, cell: Cell, method: str, seed: int) -> None:
        """Score the heads by a method, unless that was done."""
        self.chooser.scores(self._problem(cell, seed), cell, method, seed)

    def select(self, cell: Cell, seed: int) -> None:
        """Choose the rows of a cell, unless that was done."""
        self.chooser.rows(self._problem(cell, seed), cell, seed)

    def _tested(self, cell: Cell) -> list[str]:
        return self.profile.targets() if cell.target == ANY else [cell.target]

    def _problem(self, cell: Cell, seed: int) -> Split:
        return split(self.tasks, cell, self._tested(cell), self.profile.problem, seed)

    def _other_task(self, target: str) -> str | None:
        """The task after the target, of which one sees what training on the target does to others; None where there is no other."""
        names = task_names(self.tasks)
        return None if target == ANY or len(names) < 2 else names[(names.index(target) + 1) % len(names)]

    # -- arms

    def path(self, arm: Arm) -> Path:
        """The file of an arm's result."""
        return self.folder / ARMS / arm.file

    def best_rate(self, cell: Cell) -> float:
        """The learning rate with the lowest NLL on the validation rows, for the first seed."""
        rates = self.profile.rates(cell)
        if len(rates) == 1:
            return rates[0]
        found = {lr: read_json(self.path(Arm(cell, self.profile.seeds[0], lr))) for lr in rates}
        return min(rates, key=lambda lr: statistics.mean(of["nll"] for of in found[lr]["validation"].values()))

    def run(self, arm: Arm) -> dict[str, Any]:
        """Do one arm and write its file."""
        cell, seed = arm.cell, arm.seed
        tested, problem = self._tested(cell), self._problem(cell, seed)
        rows, select = self.chooser.rows(problem, cell, seed)
        heads = self.chooser.trained_heads(problem, cell, seed)
        localize = self.chooser.localize_seconds(problem, cell, seed)
        chosen = [problem.pool[row] for row in rows]

        set_seed(seed)
        model = adapt.with_adapter(self._load(), adapt.adapter_config(cell.parameters.adapter, heads, seed))
        n_trained = adapt.trained_parameters(model)
        memory = PeakMemory()
        with tempfile.TemporaryDirectory() as folder:
            arguments = self._arguments(Path(folder), epochs=cell.epochs, lr=arm.lr, seed=seed)
            memory.resume()
            with Stopwatch() as watch:
                log = adapt.train(model, self.tokenizer, as_dataset(chosen), arguments)
            memory.pause()
            size = adapt.checkpoint_bytes(model, Path(folder) / "checkpoint")
        model.eval()
        result = {
            "setting": cell.setting,
            "target": cell.target,
            "data": str(cell.data),
            "parameters": str(cell.parameters),
            "epochs": cell.epochs,
            "seed": seed,
            "lr": arm.lr,
            "test": {name: self._judged(model, problem.test[name], options=True) for name in tested},
            "validation": {name: self._judged(model, problem.validation[name]) for name in tested}
            if seed == self.profile.seeds[0]
            else None,
            "passages_nll": self._passages(model, problem),
            "other_task": self._judged_on_other(model, cell.target),
            "rows": len(rows),
            "rows_of_target": sum(row["task"] == cell.target for row in chosen),
            "rows_right": sum(row["right"] for row in chosen),
            "tokens": self._tokens(chosen),
            "seconds": {
                "select": dataclasses.asdict(select),
                "localize": dataclasses.asdict(localize),
                "train": dataclasses.asdict(watch.seconds),
            },
            "chosen_on": self.chooser.machines(cell, seed),
            "training": log,
            "peak_memory_bytes": memory.bytes,
            "memory_kind": memory_kind(),
            "trained_parameters": n_trained,
            "checkpoint_bytes": size,
            "heads": None if heads is None else heads.to_dict()["heads"],
            **self._provenance(),
        }
        write_json(self.path(arm), result)
        return result

    def base(self, target: str) -> None:
        """The model as it is, once for each target: zero-shot, and with a few of the target's samples before it."""
        path = self.folder / BASE / f"{target}.json"
        if path.exists():
            return
        cell = next(cell for cell in self.profile.cells() if cell.target == target)
        problem = split(self.tasks, cell, [target], self.profile.problem, self.profile.seeds[0])
        model = self._load()
        shots = few_shot(problem.target)
        result = {
            "target": target,
            "test": self._judged(model, problem.test[target], options=True),
            "few_shot": self._judged(
                model, [{**row, "prompt": shots + row["prompt"]} for row in problem.test[target]], after_shots=True
            ),
            "passages_nll": self._passages(model, problem),
            "other_task": self._judged_on_other(model, target),
            **self._provenance(),
        }
        write_json(path, result)

    # -- what a model is worth

    def _judged(
        self, model: nn.Module, rows: list[Row], options: bool = False, after_shots: bool = False
    ) -> dict[str, Any]:
        arguments, ends = copy.copy(self.arguments), []
        if after_shots:  # samples before the question may be longer than what is trained on
            arguments.max_length, ends = None, line_ends(self.tokenizer)
        samples = prepare_samples(as_dataset(rows), self.tokenizer, arguments, name="test")
        batches = (batch for _, batch in samples.batches(2 * self.profile.training.batch_size, self.device))
        found = judge_answers(model, batches, self.tokenizer.eos_token_id, self._autocast, ends)
        # in an order that is the same for all arms: results are compared row by row
        found["right"] = "".join("1" if right else "0" for right in found["right"])
        if options:
            asked = rows[: self.profile.problem.option_rows]
            found |= judge_options(model, asked, self.tokenizer, self.arguments, self._autocast)
        return found

    def _judged_on_other(self, model: nn.Module, target: str) -> dict[str, Any] | None:
        """The NLL of another task's test rows, which are in no pool and no target."""
        name = self._other_task(target)
        if name is None:
            return None
        found = self._judged(model, self.tasks[name][: self.profile.problem.test_rows])
        return {"task": name, "nll": found["nll"]}

    def _passages(self, model: nn.Module, problem: Split) -> float:
        length = self.profile.training.max_tokens_of_passage
        return judge_passages(model, problem.passages, self.tokenizer, length, self._autocast)

    def _tokens(self, rows: list[Row]) -> int:
        return prepare_samples(as_dataset(rows), self.tokenizer, self.arguments).n_tokens

    def _provenance(self) -> dict[str, Any]:
        return {
            "threads": torch.get_num_threads(),
            "processes_per_device": processes_per_device(self.jobs),
            "load_average": load_average(),
            "command": self.command,
            "machine": machine(),
            "versions": versions(),
        }


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """In a line, which of the settings differ, those of a group one by one."""
    found = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [_differing(old, new)] * (old != new)
        elif old != new:
            found.append(f"{name}: {old} there, {new} here")
    return "; ".join(found)
