"""Folders as a run leaves them, without a run."""

import json
import math
import random
from pathlib import Path

import torch

from p2d_peft.heads import HeadScores
from p2d_peft.report.data_records import Group, Histogram, Sample, SamplesRecord, SelectionRecord

from .test_run_report import report


# What a row, a column, a file or a report may hold to break out of a page, wherever it is put.
HOSTILE = '</pre></script><script>window.broken=1</script><img src=x onerror=window.broken=1>" onmouseover="window.broken=1\' {{7*7}} \u202e\ud800&lt;'
N_LAYERS, N_HEADS = 30, 9


def head_scores(seed: int = 0) -> HeadScores:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(N_LAYERS, N_HEADS, generator=generator).square()
    return HeadScores(values, "proxy", layers=tuple(range(N_LAYERS)))


def histogram(low: float, high: float, at: float, width: float, share: float) -> Histogram:
    """Of 1,220 rows, of which those beyond a share are kept."""
    draw = random.Random(0)
    edges = [low + (high - low) * index / 40 for index in range(41)]
    kept, left_out = [0] * 40, [0] * 40
    values = sorted(min(max(draw.gauss(at, width), low), high - 1e-9) for _ in range(1220))
    for place, value in enumerate(values):
        (kept if place >= share * 1220 else left_out)[math.floor((value - low) / (high - low) * 40)] += 1
    return Histogram(edges, kept, left_out)


def sample(row: int, score: float, kept: bool, text: str) -> Sample:
    return Sample(row, score, kept, len(text.split()) + 8, text, shortened=False)


def write_run(folder: Path, text: str = "", seed: int = 0, **changes: object) -> Path:
    """
    A run's folder with all that a page can show.

    Args:
        folder (`Path`): Where.
        text (`str`, *optional*): What to put behind every string that others could have written.
        seed (`int`, *optional*, defaults to 0): Of the head scores.
        **changes: To the report's fields.
    """
    scores = head_scores(seed)
    heads = scores.top(0.1, per_layer="even")
    scores.save(folder / "p2d_head_scores.json")
    heads.save_pretrained(folder)
    values = {
        "stage_seconds": {"localize": 10.6, "select": 51.1, "train": 88.3},
        "stage_tokens": {"localize": 6_100, "select": 171_000, "train": 52_400},
        "stage_peak_memory": {"localize": 2_200_000_000, "select": 1_400_000_000, "train": 2_900_000_000},
        "reference_seconds": 2317.0,
        "reference_relative_error": 0.03,
        "aer": 0.0647,
        "speedup": 15.45,
        "model": f"HuggingFaceTB/SmolLM2-135M-Instruct{text}",
        "n_heads": N_LAYERS * N_HEADS,
        "layer_heads": {str(layer): N_HEADS for layer in range(N_LAYERS)},
        "heads": heads.to_dict()["heads"],
        "localize_method": f"proxy{text}",
        "pool_rows": 1220,
        "pool_tokens": 162_000,
        "selected_rows": 122,
        "selected_tokens": 17_500,
        "scorer": f"affinity{text}",
        "scoring_heads": scores.top(0.1, per_layer="even", first_layers=0.33).to_dict()["heads"],
        "trainable_parameters": 3_686_400,
        "total_parameters": 138_201_408,
        "arguments": {"learning_rate": 0.002, "num_train_epochs": 3, "optim": f"adamw{text}", "bf16": True},
        "device": f"cpu{text}",
        "versions": {**report().versions, f"torch{text}": f"2.13.0{text}"},
    }
    report(**{**values, **changes}).save(folder / "p2d_report.json")
    SelectionRecord(
        scorer=f"affinity{text}",
        policies=[f"Quotas{text}"],
        pool_rows=1220,
        kept_rows=122,
        unscored_rows=3,
        cut=0.51,
        passed_over=4,
        scores=histogram(-1, 1, 0.1, 0.3, 0.9),
        lengths=histogram(10, 410, 130, 60, 0.9),
    ).save(folder / "p2d_selection.json")
    family = "Noah is married to Anna. They have a child called Andrew.\n\nWhat relation is Andrew to Anna? son"
    SamplesRecord(
        columns={
            f"task{text}": [Group("family", 120, 118), Group(f"chess{text}", 600, 4), Group(None, 500, 0)],
        },
        best=[sample(row, 0.97 - row / 100, True, f"{family}{text}") for row in range(10)],
        worst=[sample(900 + row, -0.9 + row / 100, False, f"1. e4 e5 2. Nf3 Nc6{text}") for row in range(10)],
    ).save(folder / "_p2d_samples.json")
    log = [
        {"step": step, "epoch": step / 31, "loss": 3 * math.exp(-step / 20) + 0.4, "learning_rate": 2e-3 * (1 - step / 93),
         "grad_norm": 1 + 1 / step, "mean_token_accuracy": 1 - 0.6 * math.exp(-step / 30)}
        for step in range(1, 94, 2)
    ]  # fmt: skip
    log += [
        {"step": step, "eval_loss": 3.1 * math.exp(-step / 20) + 0.6, "eval_runtime": 3.0, f"eval_a{text}_loss": 1.0}
        for step in (31, 62, 93)
    ]
    log.append({"step": 93, "train_runtime": 88.3, "train_loss": 1.0})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 148_000)
    (folder / "lora").mkdir(exist_ok=True)
    (folder / "lora" / "adapter_model.safetensors").write_bytes(b"\0" * 251_000)
    (folder / "checkpoint-93").mkdir(exist_ok=True)
    (folder / "checkpoint-93" / "optimizer.pt").write_bytes(b"\0" * 297_000)
    return folder
