"""The evidence's harness runs, on a tiny model; and what it says follows from what it measured."""

import dataclasses
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import typing
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from p2d_peft import HeadScores, P2DConfig
from p2d_peft.heads import ModelGeometry
from p2d_peft.selection import selector
from p2d_peft.selection.policies import Diverse, RoundRobin
from p2d_peft.selection.samples import prepare_samples

from .benchmark_files import BENCHMARKS, load_benchmark
from .tiny_data import rows
from .tiny_models import tiny_model, tiny_tokenizer


run_evidence = load_benchmark("run_evidence")
adapt, base, bigbench, choose, claims, defaults, page, plots, problem, profile, runner, schedule, summary, tasks = (
    load_benchmark(f"evidence.{name}")
    for name in (
        "adapt",
        "base",
        "bigbench",
        "choose",
        "claims",
        "defaults",
        "page",
        "plots",
        "problem",
        "profile",
        "runner",
        "schedule",
        "summary",
        "tasks",
    )
)
answers = load_benchmark("answers")
environment = load_benchmark("environment")
ROOT = BENCHMARKS.parent
PROFILES = sorted((BENCHMARKS / "evidence" / "profiles").glob("*.yaml"))


def tiny_tasks():
    made = {
        name: [{**row, "task": name, "options": []} for row in rows(200, seed) if row["task"] == name]
        for seed, name in enumerate(("copy", "count"))
    }
    for row in made["count"]:
        right = row["completion"].strip()
        row["options"] = [right, str(int(right) + 1)]
    for name, of_task in made.items():
        made[name] = list({row["prompt"]: row for row in of_task}.values())
    return {**made, "passages": [{"text": f"a text of {word} words"} for word in ("some", "many", "few")]}


def a_profile(**changes):
    return {
        "model": "tiny",
        "seeds": [0, 1],
        "problem": {
            "pool_rows": 20,
            "own_rows": 30,
            "target_rows": 4,
            "validation_rows": 6,
            "test_rows": 10,
            "passages": 3,
            "option_rows": 4,
        },
        "training": {"batch_size": 4, "dtype": "float32"},
        "learning_rates": {"full": [1e-2], "heads": [1e-4, 3e-1], "lora-attention": [1e-3]},
        "arms": [
            {
                "settings": ["mixed"],
                "targets": ["copy", "count"],
                "data": [claims.P2D[0]],
                "parameters": [claims.P2D[1], "lora-attention"],
                "epochs": [3],
            },
            {
                "settings": ["mixed"],
                "targets": ["copy"],
                "data": ["affinity:random/first/robin"],
                "parameters": ["heads:proxy/last"],
                "epochs": [3],
                "seeds": [0],
            },
            {
                "settings": ["mixed"],
                "targets": ["any"],
                "data": ["full"],
                "parameters": ["full"],
                "epochs": [3],
                "seeds": [0],
            },
        ],
        **changes,
    }


def write_profile(folder, **changes):
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(a_profile(**changes)))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of results, and the arguments that made them."""
    folder = tmp_path_factory.mktemp("evidence")
    tiny_model(num_hidden_layers=4).save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    path = write_profile(folder)
    arguments = ["run", str(path), "--model", str(folder / "tiny"), "--output", str(folder / "results")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_evidence, "load_tasks", lambda *_: tiny_tasks())
        run_evidence.main([*arguments, "--jobs", "2"])
    return folder / "results", arguments


@pytest.fixture
def with_tiny_tasks(monkeypatch):
    monkeypatch.setattr(run_evidence, "load_tasks", lambda *_: tiny_tasks())


def tiny_arguments(folder):
    training = profile.Training(batch_size=4)
    return adapt.training_arguments(training, folder, epochs=1, lr=1e-2, seed=0, bf16=False, on_cpu=True)


def test_a_profile_in_full(results, with_tiny_tasks, monkeypatch):
    folder, arguments = results
    files = sorted((folder / "arms").iterdir())
    read = [json.loads(path.read_text()) for path in files]
    # two targets by two rates with the first seed and one with the second, LoRA with one rate, one more cell, the reference
    assert len(files) == len(read) == 2 * (2 + 1) + 2 * (1 + 1) + 2 + 1
    text = "".join(path.read_text() for path in folder.rglob("*.json"))
    assert str(folder.parent) not in text and "copy " not in text  # it is published, without a path or a row
    for result in read:
        assert result["seconds"]["train"]["cpu"] > 0 and result["trained_parameters"] > 0
        assert (result["validation"] is None) == (result["seed"] == 1)
        for target, test in result["test"].items():
            assert len(test["right"]) == 10 and test["right"].count("1") == 10 * test["exact_match"]
            assert ("options_accuracy" in test) == (target == "count")
    for result in read:
        cell = a_cell("mixed", result["target"], result["data"], result["parameters"])
        _says_what_it_trained_on(result, cell, folder)
        other = {"copy": "count", "count": "copy"}.get(result["target"])
        assert (result["other_task"] or {}).get("task") == other
    for target, other in (("copy", "count"), ("count", "copy")):  # the other task's test rows
        untrained = [json.loads((folder / "base" / f"{name}.json").read_text()) for name in (target, other)]
        assert untrained[0]["other_task"]["nll"] == pytest.approx(untrained[1]["test"]["nll"], rel=1e-5)
    # the second seed has the rate that was best on the validation rows
    of_cell = [r for r in read if (r["target"], r["data"], r["parameters"]) == ("copy", *claims.P2D)]
    first = {r["lr"]: r["validation"]["copy"]["nll"] for r in of_cell if r["seed"] == 0}
    assert [r["lr"] for r in of_cell if r["seed"] == 1] == [min(first, key=first.get)]

    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    monkeypatch.setattr(run_evidence.Runner, "run", lambda *_: pytest.fail("an arm was run again"))
    run_evidence.main(arguments)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def _says_what_it_trained_on(result, cell, folder):
    """The rows and heads of an arm's result are those that were chosen, and its counts are theirs."""
    tested = ["copy", "count"] if cell.target == profile.ANY else [cell.target]
    made = problem.split(tiny_tasks(), cell, tested, sizes(), result["seed"])
    chosen = made.pool
    if cell.data.scorer != "full":
        name = (
            f"{cell.setting}-{cell.target}-{str(cell.data).replace(':', '.').replace('/', '_')}-seed{result['seed']}"
        )
        chosen = [made.pool[row] for row in json.loads((folder / "rows" / f"{name}.json").read_text())["rows"]]
        assert result["seconds"]["select"]["cpu"] > 0 and result["seconds"]["localize"]["cpu"] > 0
    assert result["rows"] == len(chosen) == (40 if cell.data.scorer == "full" else 4)
    assert result["rows_of_target"] == sum(row["task"] == cell.target for row in chosen)
    samples = prepare_samples(problem.as_dataset(chosen), tiny_tokenizer(), tiny_arguments(folder))
    assert result["tokens"] == samples.n_tokens
    assert result["training"]["steps"] == 3 * math.ceil(len(chosen) / 4) and len(result["training"]["losses"]) == 3
    method = cell.parameters.method
    if method is None:
        assert result["heads"] is None
        return
    file = folder / "heads" / f"{cell.target}-{method}-seed{result['seed']}.json"
    scores = HeadScores.from_dict(json.loads(file.read_text())["scores"])
    assert scores.method == method
    assert result["heads"] == choose.CHOICES[cell.parameters.choice](scores, 0.1).to_dict()["heads"]


def test_an_arm_is_trained_as_it_says(results, tmp_path, monkeypatch):
    """Its rows, epochs, rate and seed go into the training; no training is needed to see that."""
    folder, arguments = results
    shutil.copytree(folder, tmp_path / "results")
    ran = run_evidence.make_runner(
        1, profile.Profile.read(arguments[1]), tiny_tasks(), arguments[3], tmp_path / "results", ""
    )
    given, seeds = [], []
    monkeypatch.setattr(adapt, "train", lambda model, tokenizer, rows, training: given.append((rows, training)) or {})
    monkeypatch.setattr(runner, "set_seed", seeds.append)
    monkeypatch.setattr(runner.Runner, "_judged", lambda *_, **__: {"nll": 0.0})
    monkeypatch.setattr(runner.Runner, "_passages", lambda *_: 0.0)
    cell = a_cell("mixed", "copy", *claims.P2D)
    ran.run(profile.Arm(cell, 1, 0.3))
    ((rows, training),) = given
    assert (training.num_train_epochs, training.learning_rate, training.seed, seeds) == (3, 0.3, 1, [1])
    made = problem.split(tiny_tasks(), cell, ["copy"], sizes(), 1)
    numbers = json.loads((folder / "rows" / "mixed-copy-affinity.random_fifth_robin-seed1.json").read_text())["rows"]
    assert numbers != list(range(4))  # or the pool's first rows would do
    assert rows["prompt"] == [made.pool[row]["prompt"] for row in numbers]

    shots = []
    monkeypatch.setattr(runner, "few_shot", lambda rows: shots.append(rows) or "")
    (tmp_path / "results" / "base" / "copy.json").unlink()
    ran.base("copy")
    assert shots == [problem.split(tiny_tasks(), cell, ["copy"], sizes(), 0).target]


def test_the_rate_is_that_of_the_validation_rows(tmp_path):
    cell = a_cell("mixed", "copy", *claims.P2D)
    for lr, validation, test in ((1e-3, 1.0, 3.0), (3e-3, 2.0, 2.0)):
        found = {"validation": {"copy": {"nll": validation}}, "test": {"copy": {"nll": test}}}
        (tmp_path / profile.Arm(cell, 0, lr).file).write_text(json.dumps(found))
    asked = SimpleNamespace(seeds=[0, 1], rates=lambda _: [3e-3, 1e-3])
    of = SimpleNamespace(profile=asked, path=lambda arm: tmp_path / arm.file)
    assert runner.Runner.best_rate(of, cell) == 1e-3


def test_an_arm_is_the_same_when_it_is_run_again_alone(results, with_tiny_tasks, tmp_path):
    folder, arguments = results
    shutil.copytree(folder, tmp_path / "results")
    name = "mixed-copy-affinity.random_first_robin-heads.proxy_last-epochs3-lr0.3-seed0.json"
    for path in [tmp_path / "results" / "arms" / name, *(tmp_path / "results" / "rows").iterdir()]:
        path.unlink()
    run_evidence.main([*arguments[:-1], str(tmp_path / "results")])
    before, after = (json.loads((root / "arms" / name).read_text()) for root in (folder, tmp_path / "results"))
    assert (before["processes_per_device"], after["processes_per_device"]) == (2, 1)
    for changing in ("seconds", "peak_memory_bytes", "load_average", "command", "processes_per_device"):
        del before[changing], after[changing]
    assert before == after


def test_a_rerun_is_compared_with_the_first_run(results, tmp_path, capsys):
    folder, _ = results
    rerun = tmp_path / "rerun"
    shutil.copytree(folder, rerun)
    n_arms = len(list((rerun / "arms").iterdir()))
    run_evidence.main(["compare", str(rerun), "--output", str(folder), "--save", str(tmp_path / "compared.json")])
    found = json.loads((tmp_path / "compared.json").read_text())
    assert json.loads(capsys.readouterr().out) == {name: found[name] for name in found if name != "where"}
    # the arms without a target are judged on both
    assert found["arms"] == n_arms and found["equal"] == found["judgements"] > n_arms
    assert found["largest_difference"] == {"nll": 0, "exact_match": 0}
    assert found["cpu_seconds"][0] == found["cpu_seconds"][1] > 0 and found["where"][0][0]["machine"]["cpus"] > 0
    path = next(path for path in (rerun / "arms").iterdir() if "copy" in path.name)
    arm = json.loads(path.read_text())
    arm["test"]["copy"]["nll"] += 0.25
    path.write_text(json.dumps(arm))
    next(path for path in (rerun / "arms").iterdir() if "count" in path.name).unlink()
    found = run_evidence.compare(rerun, folder)
    assert (found["arms"], found["judgements"] - found["equal"]) == (n_arms - 1, 1)
    assert found["largest_difference"]["nll"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="have no arm in common"):
        run_evidence.compare(tmp_path, folder)


def test_other_sizes_go_into_another_folder(results, with_tiny_tasks, tmp_path):
    _, arguments = results
    path = write_profile(tmp_path, problem={**a_profile()["problem"], "test_rows": 5})
    message = r"holds results with other settings \(test_rows: 10 there, 5 here\)\. Name another"
    with pytest.raises(SystemExit, match=message):
        run_evidence.main([arguments[0], str(path), *arguments[2:]])


def test_samples_before_a_question_may_be_longer_than_what_is_trained_on(results, tmp_path):
    folder, arguments = results
    tokenizer = AutoTokenizer.from_pretrained(arguments[3])
    longest = max(len(tokenizer(row["prompt"] + row["completion"]).input_ids) for row in tiny_tasks()["copy"]) + 1
    path = write_profile(tmp_path, training={"batch_size": 4, "dtype": "float32", "max_length": longest})
    made = profile.Profile.read(path)
    short = run_evidence.make_runner(1, made, tiny_tasks(), arguments[3], tmp_path / "results", "")
    short.base("copy")
    read = [json.loads((of / "base" / "copy.json").read_text()) for of in (tmp_path / "results", folder)]
    assert read[0]["few_shot"] == read[1]["few_shot"] and read[0]["test"] == read[1]["test"]
    # what has no room for an answer is no answer that is right
    with pytest.raises(ValueError, match="no answer's token"):
        answers.judge_answers(None, [{"labels": torch.tensor([[-100, 5], [-100, -100]])}], 2, None)


def test_after_samples_an_answer_may_end_with_a_line_break():
    """As theirs do; what goes on after the right answer is another answer all the same."""
    tokenizer = tiny_tokenizer()
    ends = base.line_ends(tokenizer)
    texts = [tokenizer.decode([token]) for token in ends]
    assert texts and all(text.startswith("\n") for text in texts)
    line_end, eos, more = ends[0], tokenizer.eos_token_id, next(i for i in range(len(tokenizer)) if i not in ends)
    labels = torch.tensor([[-100, 5, 6, eos]])
    batch = {"input_ids": labels.clamp(min=0), "labels": labels, "attention_mask": torch.ones_like(labels)}

    def judged(last, ends):
        said = torch.tensor([[5, 6, last, 0]])
        logits = torch.nn.functional.one_hot(said, len(tokenizer)).float() * 9

        def model(input_ids, logits_to_keep, **_):
            return SimpleNamespace(logits=logits[:, -logits_to_keep:])

        return answers.judge_answers(model, [batch], eos, nullcontext, ends)

    assert judged(eos, [])["right"] == judged(eos, ends)["right"] == judged(line_end, ends)["right"] == [True]
    assert judged(line_end, [])["right"] == judged(more, ends)["right"] == [False]
    # the mean over the two answer's tokens and the end, which is the sum over what may end it
    logits = torch.zeros(len(tokenizer)).index_fill(0, torch.tensor(line_end), 9.0)
    of_end = logits.logsumexp(0) - logits[sorted({eos, *ends})].logsumexp(0)
    sure = torch.zeros(len(tokenizer)).index_fill(0, torch.tensor(5), 9.0).log_softmax(0)[5]
    assert judged(line_end, ends)["nll"] == pytest.approx(float(of_end - 2 * sure) / 3, abs=1e-5)


def test_the_stages_that_arms_share_come_first_and_once(tmp_path):
    read = profile.Profile.read(write_profile(tmp_path))
    before, rows_chosen = schedule.shared_stages(read)
    done = [(piece.method, *map(str, piece.arguments)) for piece in (*before, *rows_chosen)]
    assert len(set(done)) == len(done)
    assert [piece.method for piece in before].count("localize") == 2 * 2 + 1  # two targets and seeds, and random heads
    assert [piece.method for piece in rows_chosen] == ["select"] * (2 * 2 + 1)
    first = profile.first_arms(read)
    assert first[0].cell.data.scorer == "full" and all(arm.seed == 0 for arm in first)  # the longest comes first
    further = profile.further_arms(read, lambda cell: 1e-4)
    assert len({arm.file for arm in (*first, *further)}) == len(first) + len(further) == 13
    assert all(arm.seed == 1 for arm in further)


def test_the_summary(results):
    folder, _ = results
    evidence = summary.read_evidence(folder)
    reference = evidence.lines["mixed", "copy", "full", "full", 3]
    assert evidence.aer(reference) == 1.0  # nothing is chosen, and it is its own measure
    ours = evidence.lines[("mixed", "copy", *claims.P2D, 3)]
    charged = ours.seconds("localize") + ours.seconds("select") + ours.seconds("train")
    assert evidence.aer(ours) == pytest.approx(charged / reference.seconds("train"))
    other = evidence.lines["mixed", "copy", "affinity:random/first/robin", "heads:proxy/last", 3]
    # heads by one method are found once, whatever they do
    of_proxy, of_random = (
        json.loads((folder / "heads" / f"copy-{method}-seed0.json").read_text())["seconds"]["cpu"]
        for method in ("proxy", "random")
    )
    assert ours.results[0]["seconds"]["localize"]["cpu"] == of_random
    assert other.results[0]["seconds"]["localize"]["cpu"] == of_proxy + of_random

    # it was tested on both targets, but is one training: what it took holds for a target that it was not tested on
    del evidence.lines[("mixed", "copy", "full", "full", 3)]
    assert evidence.aer(ours) == pytest.approx(charged / reference.seconds("train"))
    evidence = summary.read_evidence(folder)

    compared = summary.compare(evidence, claims.P2D, claims.LORA)
    lora = [evidence.lines[("mixed", target, *claims.LORA, 3)] for target in ("copy", "count")]
    p2d = [evidence.lines[("mixed", target, *claims.P2D, 3)] for target in ("copy", "count")]
    mean = sum(a.mean("exact_match") - b.mean("exact_match") for a, b in zip(p2d, lora, strict=True)) / 2
    assert compared.pairs == 4
    assert compared.exact_match["mean"] == pytest.approx(mean)
    assert compared.exact_match["low"] <= mean <= compared.exact_match["high"]
    assert summary.compare(evidence, claims.P2D, ("bm25", "heads:proxy/last")) is None


def evidence_of(sides, memory_kind="process", processes=1, targets="abcd"):
    """Made-up results of targets, two seeds and 40 test rows: for each side how many are right, its seconds and NLL."""
    lines = {}
    for (data, parameters), (right, seconds, nll) in sides.items():
        for target in targets:
            test = {"right": "1" * right + "0" * (40 - right), "exact_match": right / 40, "nll": nll}
            stage = {"cpu": seconds, "wall": 0.0} if memory_kind == "process" else {"cpu": 0.0, "wall": seconds}
            nothing = {"cpu": 0.0, "wall": 0.0}
            arm = {"seconds": {"localize": nothing, "select": nothing, "train": stage}, "passages_nll": nll}
            arm |= {"memory_kind": memory_kind, "processes_per_device": processes, "machine": {"cpu": "one"}}
            key = ("mixed", target, data, parameters, 3)
            arm |= dict(zip(("setting", "target", "data", "parameters", "epochs"), key, strict=True))
            lines[key] = summary.Line(*key, 1e-3, {0: arm, 1: arm}, {0: test, 1: test})
    base = {target: {"passages_nll": 1.0} for target in targets}
    return summary.Evidence({}, base, lines, [], 0, [], [])


SIDES = {
    claims.P2D: (30, 8.0, 1.0),
    claims.FOUND: (30, 8.0, 1.0),
    (defaults.TRIED[0], claims.FOUND[1]): (30, 8.0, 1.0),
    (defaults.TRIED[0], "heads:proxy"): (30, 9.0, 1.0),
    (claims.FOUND[0], "heads:random/late"): (20, 8.0, 1.5),
    claims.LORA: (28, 9.0, 1.2),
    ("random", claims.P2D[1]): (15, 8.0, 2.0),
    ("affinity:random/fifth/robin", claims.FOUND[1]): (30, 8.0, 1.0),
    ("affinity:all/fifth/robin", claims.FOUND[1]): (25, 8.0, 1.0),
    ("full", "full"): (30, 100.0, 1.0),
}
LORA_ON_FOUND = (claims.FOUND[0], claims.LORA[1])


def test_claims():
    heads, data, coupling, whole, forgetting = claims.judge(evidence_of(SIDES))
    assert heads.verdict == claims.HELD
    assert "+25.0 points" in heads.figures[0] and "4 of 4 targets" in heads.figures[0]
    assert data.verdict == claims.UNDECIDED and "own pool: not run" in data.figures
    assert coupling.verdict == claims.NOT_HELD  # no better than rows by random heads
    assert whole.verdict == claims.HELD and "AER 0.080" in whole.figures[1]
    assert forgetting.verdict == claims.HELD and len(forgetting.figures) == 1
    without_kv = claims.judge(
        evidence_of({**SIDES, claims.WITHOUT_KV: (28, 8.0, 0.5), LORA_ON_FOUND: (28, 9.0, 1.2)})
    )[4]
    assert "on rows by found heads: NLL of unrelated passages -0.700" in without_kv.figures[1]
    assert len(without_kv.figures) == 3

    worse = {**SIDES, ("full", "full"): (35, 100.0, 1.0), ("random", claims.P2D[1]): (29, 8.0, 1.0)}
    worse[claims.LORA] = (28, 9.0, 0.9)
    verdicts = [claim.verdict for claim in claims.judge(evidence_of(worse))]
    assert verdicts[1:] == [claims.NOT_HELD, claims.NOT_HELD, claims.NOT_HELD, claims.NOT_HELD]
    expensive = {**SIDES, claims.P2D: (30, 11.0, 1.0)}
    assert claims.judge(evidence_of(expensive))[3].verdict == claims.NOT_HELD
    nothing = claims.judge(evidence_of({}))
    assert {claim.verdict for claim in nothing} == {claims.UNDECIDED}


def test_no_claim_is_decided_by_half_of_the_targets():
    """The other half could turn each: a mean, and how many of the four are better."""
    worse = {**SIDES, ("full", "full"): (35, 100.0, 1.0), ("random", claims.P2D[1]): (29, 8.0, 1.0)}
    for sides in (SIDES, worse):
        assert {claim.verdict for claim in claims.judge(evidence_of(sides, targets="ab"))} == {claims.UNDECIDED}
    # the first one counts: with two targets of which none is better three can't be reached
    alike = {**SIDES, (claims.FOUND[0], "heads:random/late"): (30, 8.0, 1.5)}
    verdicts = [claims.judge(evidence_of(alike, targets=targets))[0].verdict for targets in ("a", "ab", "abc")]
    assert verdicts == [claims.UNDECIDED, claims.NOT_HELD, claims.NOT_HELD]
    # by another method it still can, as long as that one has no more than a target
    alike |= {
        (claims.FOUND[0], "heads:gain/late"): (30, 8.0, 1.0),
        (claims.FOUND[0], "heads:magnitude/late"): (40, 8.0, 1.0),
    }
    for target in "bcd":
        evidence = evidence_of(alike)
        for other in set("abcd") - {"a", target}:
            del evidence.lines["mixed", other, claims.FOUND[0], "heads:gain/late", 3]
        assert claims.judge(evidence)[0].verdict == claims.NOT_HELD
        del evidence.lines["mixed", target, claims.FOUND[0], "heads:gain/late", 3]
        assert claims.judge(evidence)[0].verdict == claims.UNDECIDED


def test_pairs_on_other_rows_stand_beside_the_first_claim_and_do_not_decide_it():
    data = "affinity:proxy/first/robin"
    alike = {**SIDES, (claims.FOUND[0], "heads:random/late"): (30, 8.0, 1.5)}
    better = {(data, "heads:proxy/last"): (30, 8.0, 1.0), (data, "heads:random/last"): (10, 8.0, 1.0)}
    claim = claims.judge(evidence_of({**alike, **better}))[0]
    assert claim.verdict == claims.NOT_HELD and len(claim.figures) == 3
    assert claim.figures[1].startswith(f"beside it, on rows by `{data}`: `heads:proxy/last`: +50.0 points")
    assert claim.figures[2].startswith(f"beside it, on rows by `{claims.P2D[0]}`: `heads:proxy/late`: +0.0 points")


def test_no_worse_is_said_of_the_mean():
    """In the second claim as in the fifth, and an interval that holds zero does not turn it."""
    evidence = evidence_of(SIDES)
    for data, right in ((claims.P2D[0], "1" * 20 + "0" * 20), ("random", "0" * 19 + "1" * 21)):
        line = evidence.lines["mixed", "a", data, claims.P2D[1], 3]
        tests = {seed: {**test, "right": right} for seed, test in line.tests.items()}
        evidence.lines["own", "a", data, claims.P2D[1], 3] = dataclasses.replace(line, setting="own", tests=tests)
    claim = claims.judge(evidence)[1]
    assert claim.verdict == claims.NOT_HELD
    assert claim.figures[2:] == [
        "own pool: the mean is worse, though the interval holds zero",
        "the first half holds, the second does not",
    ]


@pytest.mark.parametrize(("nll", "verdict"), [(1.5, claims.UNDECIDED), (2.5, claims.NOT_HELD)])
def test_where_no_answer_is_right_nll_says_whether_rows_are_worse(nll, verdict):
    """As on GSM8K, where such a model gets none right."""
    drawn = ("random", claims.P2D[1])
    evidence = evidence_of({claims.P2D: (0, 8.0, nll), drawn: (0, 8.0, 2.0)}, targets="a")
    own = {("own", *key[1:]): dataclasses.replace(line, setting="own") for key, line in evidence.lines.items()}
    claim = claims.judge(dataclasses.replace(evidence, lines=own))[1]
    assert claim.verdict == verdict
    assert claim.figures[1:] == ["own pool: neither side has an answer that is right to the token, so NLL decides"]


def test_claims_of_which_nothing_was_run_are_left_out():
    evidence = evidence_of({claims.P2D: (3, 8.0, 1.0), ("random", claims.P2D[1]): (3, 8.0, 1.0)})
    for others in (None, evidence_of(SIDES)):
        text = page._claims(evidence, others)
        assert "| 2 | Data matter" in text and "Heads matter" not in text
        assert text.endswith("\n\nNothing that was run here says anything on the others of the 5 claims.")
    assert "the others of" not in page._claims(evidence_of(SIDES), None)


def test_what_more_samples_do_stands_beside_the_second_claim_and_does_not_decide_it():
    evidence = evidence_of({**SIDES, claims.MORE_SAMPLES: (31, 8.0, 1.0)})
    for side, right in ((claims.P2D, 10), (("random", claims.P2D[1]), 15), (claims.MORE_SAMPLES, 20)):
        line = evidence_of({side: (right, 8.0, 1.0)}, targets="a").lines["mixed", "a", *side, 3]
        evidence.lines["own", "a", *side, 3] = dataclasses.replace(line, setting="own")
    claim = claims.judge(evidence)[1]
    assert claim.verdict == claims.NOT_HELD
    assert [figure.partition(" (")[0] for figure in claim.figures[-2:]] == [
        "with 100 samples of the target, mixed pool: +40.0 points",
        "with 100 samples of the target, own pool: +12.5 points",
    ]


def test_coupling_of_the_heads_that_are_trained_stands_beside_the_third_claim():
    sides = {**SIDES, claims.SAME_HEADS: (30, 8.0, 1.0), ("affinity:random", "heads:proxy"): (20, 8.0, 1.0)}
    figures = claims.judge(evidence_of(sides))[2].figures
    assert figures[2].startswith("where the heads that are trained score, against `affinity:random`: +25.0 points")


def test_what_becomes_of_another_task_is_told_where_it_was_judged():
    evidence = evidence_of(SIDES)
    assert not any("another task" in figure for figure in claims.judge(evidence)[4].figures)
    for target in "ab":
        evidence.base[target]["other_task"] = {"task": "b", "nll": 2.0}
        for side, nll in ((claims.P2D, 1.5), (claims.LORA, 1.75)):
            line = evidence.lines["mixed", target, *side, 3]
            # of one seed, as arms from before it was judged have nothing
            results = {**line.results, 0: {**line.results[0], "other_task": {"task": "b", "nll": nll}}}
            evidence.lines["mixed", target, *side, 3] = dataclasses.replace(line, results=results)
    told = (
        "NLL of another task's answers -0.250 (pairs: -0.250 to -0.250) nats a token against LoRA, 2 pairs; the change from the base "
        "model is -0.500 and -0.250"
    )
    assert claims.judge(evidence)[4].figures[1] == told
    again = dataclasses.replace(evidence_of(SIDES), again=evidence)
    assert claims.judge(again)[4].figures[1] == f"once more on another machine: {told}"


def test_what_the_defaults_were_chosen_among_is_judged_as_they_are():
    data = "affinity:proxy/first/robin"
    sides = {**SIDES, (data, claims.FOUND[1]): (30, 20.0, 1.0), (data, claims.LORA[1]): (20, 19.0, 0.9)}
    evidence = evidence_of(sides)
    found = {variant.side: variant for variant in claims.variants(evidence)}
    assert (found[claims.P2D].whole, found[claims.P2D].forgetting) == (claims.HELD, claims.HELD)
    other = found[data, claims.FOUND[1]]
    assert (other.whole, other.forgetting, other.aer) == (claims.NOT_HELD, claims.NOT_HELD, pytest.approx(0.2))
    assert found["affinity:proxy", "heads:proxy"].exact_match is None
    text = page._variants(evidence)
    assert (
        "holds for 2 of these 5, claim 5 for 1, and both for 1." in text
        and text.count("| 8 | 0.200 | not held | not held |") == 1
    )
    assert (
        f"No arms are in the folder of `{claims.MORE_SAMPLES[0]}` with `heads:random/late`, `affinity:proxy/first/robin` with "
        "`heads:proxy/last`, `affinity:proxy` with `heads:proxy`." in text
    )


def test_intervals_hold_what_differs_between_seeds_and_between_rows():
    few = torch.zeros(3, 100, dtype=torch.float64)
    few[0] = 0.3  # the seeds differ, and the rows of each do not
    found, (alone,) = summary._bootstrap_within([few])
    assert found == alone
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.1, 0.0, 0.3))
    rows = torch.zeros(3, 100, dtype=torch.float64)
    rows[:, :50] = 1.0  # the rows differ, and are the same for all seeds
    found, _ = summary._bootstrap_within([rows])
    assert (found["low"], found["high"]) == pytest.approx((0.4, 0.6), abs=0.015)
    found, (first, second) = summary._bootstrap_within([rows, -rows])
    assert (found["mean"], first["mean"], second["mean"]) == (0.0, 0.5, -0.5)
    # each target draws for itself: else the two would cancel out in each draw
    assert (found["low"], found["high"]) == pytest.approx((-0.07, 0.07), abs=0.015)


def test_rates_at_the_edge_of_what_was_tried_are_counted():
    evidence = evidence_of(SIDES)
    tried = [(claims.P2D, "a", 1e-3), (claims.P2D, "a", 3e-3), (claims.LORA, "a", 5e-4), (claims.LORA, "a", 1e-3)]
    tried += [(claims.LORA, "a", 3e-3), (("full", "full"), "a", 1e-3)]
    arms = [{**evidence.lines[("mixed", target, *side, 3)].results[0], "lr": lr} for side, target, lr in tried]
    text = page._edges(dataclasses.replace(evidence, tried=arms))
    assert "for `heads` in 1 of 1 cells (the lowest in 1, the highest in 0), for `lora-attention` in 0 of 1" in text
    assert "`full`" not in text and "Claim 3" not in text  # a single rate has no edge
    side = ("mixed", "b", "affinity:all/fifth/robin", claims.FOUND[1], 3)
    evidence.lines[side] = dataclasses.replace(evidence.lines[side], lr=3e-3)
    text = page._edges(dataclasses.replace(evidence, tried=arms))
    assert "Claim 3's do for `b` (0.001, and 0.003 for `affinity:all/fifth/robin`)" in text


def test_seconds_of_processes_that_share_a_gpu_are_left_out():
    alone, shared = (evidence_of(SIDES, "accelerator", processes) for processes in (1, 4))
    assert alone.aer(alone.lines[("mixed", "a", *claims.P2D, 3)]) == pytest.approx(0.08)
    assert claims.judge(alone)[3].verdict == claims.HELD
    assert shared.aer(shared.lines[("mixed", "a", *claims.P2D, 3)]) is None
    whole = claims.judge(shared)[3]
    assert whole.verdict == claims.UNDECIDED and not any("AER" in figure for figure in whole.figures)
    worse = evidence_of({**SIDES, ("full", "full"): (35, 100.0, 1.0)}, "accelerator", 4)
    assert claims.judge(worse)[3].verdict == claims.NOT_HELD  # whatever it costs
    assert {seconds for _, _, seconds in defaults.measured(shared)} == {None}
    pytest.importorskip("matplotlib")
    assert plots._stages(shared) is None and plots._aer(shared) is None and plots._stages(alone) is not None


def run_on(evidence, machine, side, *seeds):
    """With what a side's arms were run on replaced, for all targets."""
    for target in evidence.targets:
        line = evidence.lines["mixed", target, *side, 3]
        results = {seed: {**arm, "machine": machine} if seed in seeds else arm for seed, arm in line.results.items()}
        evidence.lines["mixed", target, *side, 3] = dataclasses.replace(line, results=results)
    return evidence


def tried_of(evidence, found):
    """With an arm for each side, target and rate, of a passages' NLL and an exact match."""
    arms = [
        {
            **evidence.lines[("mixed", target, *side, 3)].results[0],
            "lr": lr,
            "passages_nll": forgotten,
            "test": {target: {"exact_match": exact_match, "nll": 1.0}},
        }
        for (side, target, lr), (forgotten, exact_match) in found.items()
    ]
    return dataclasses.replace(evidence, tried=arms)


def test_forgetting_at_one_rate_stands_beside_that_at_the_chosen_ones():
    """The rates are chosen by the target's rows: where one side's is higher, what is forgotten says little of the sides."""
    found = {(side, target, 1e-3): (1.5, 0.5) for side in (claims.P2D, claims.LORA) for target in "ab"}
    found |= {(claims.P2D, "a", 3e-3): (2.0, 0.75), (claims.P2D, "b", 3e-3): (2.5, 0.25)}
    found |= {(claims.LORA, "a", 3e-3): (2.25, 0.25), (claims.LORA, "a", 1e-2): (9.0, 0.0)}
    claim = claims.judge(tried_of(evidence_of(SIDES), found))[4]
    assert claim.verdict == claims.judge(evidence_of(SIDES))[4].verdict
    assert claim.figures[1:] == [
        "both at a learning rate of 0.001, one seed: NLL of unrelated passages +0.000 (pairs: +0.000 to +0.000) nats a token "
        "against LoRA, +0.0 points exact match, 2 pairs",
        "both at a learning rate of 0.003, one seed: NLL of unrelated passages -0.250 nats a token against LoRA, +50.0 points "
        "exact match, 1 pairs",
    ]


def test_means_by_rate_are_of_the_same_cells():
    found = {
        (claims.P2D, "a", 1e-3): (1.5, 0.5),
        (claims.P2D, "a", 3e-3): (2.0, 0.75),
        (claims.P2D, "b", 1e-3): (9.0, 0.0),
    }
    found |= {(claims.LORA, "a", 1e-3): (1.0, 0.5)}
    text = page._means_by_rate(tried_of(evidence_of(SIDES), found))
    assert "| `heads` | 0.001 | 50.0 | 1.000 | +0.500 | 1 |\n| `heads` | 0.003 | 75.0 | 1.000 | +1.000 | 1 |" in text
    assert "9.0" not in text and "lora" not in text  # not of all rates; and of one rate
    assert page._means_by_rate(evidence_of(SIDES)) == ""


def test_seconds_of_two_machines_are_not_compared():
    other = {"cpu": "two"}
    key = ("mixed", "a", *claims.P2D, 3)
    # the reference alone on the other machine, or one of two seeds: of both no AER can be made
    for side, seeds in ((("full", "full"), (0, 1)), (claims.P2D, (1,))):
        evidence = run_on(evidence_of(SIDES), other, side, *seeds)
        assert evidence.aer(evidence.lines[key]) is None and not evidence.timed(evidence.lines[key])
        whole = claims.judge(evidence)[3]
        assert whole.verdict == claims.UNDECIDED and not any("AER" in figure for figure in whole.figures)
        assert page._untimed(evidence).endswith(
            "left out, arms and what they are measured by were run on several machines. "
        )
    # LoRA there: an AER, but no accuracy per second beside LoRA's
    evidence = run_on(evidence_of(SIDES), other, claims.LORA, 0, 1)
    assert evidence.aer(evidence.lines[key]) == pytest.approx(0.08)
    assert claims.judge(evidence)[3].verdict == claims.UNDECIDED
    # all there: as if nothing had been
    evidence = evidence_of(SIDES)
    for side in SIDES:
        run_on(evidence, other, side, 0, 1)
    assert claims.judge(evidence)[3].verdict == claims.HELD and page._untimed(evidence) == ""
    # a default beside what stands in its place
    evidence = run_on(evidence_of(SIDES), other, (claims.FOUND[0], "heads:random/late"), 0, 1)
    seconds = {a.instead: seconds for a, _, seconds in defaults.measured(evidence)}
    assert seconds["`proxy` for the rows"] is None and seconds["random rows"] == 1.0
    # without a reference, the lines of a pool beside one another
    evidence = run_on(evidence_of({side: SIDES[side] for side in (claims.P2D, claims.LORA)}), other, claims.LORA, 0, 1)
    assert not any(evidence.timed(line) for line in evidence.lines.values())
    evidence = evidence_of({claims.P2D: SIDES[claims.P2D]})
    assert all(evidence.timed(line) for line in evidence.lines.values())
    evidence = run_on(evidence_of(SIDES), other, (claims.FOUND[0], "heads:random/late"), 0, 1)
    # of one target: a mean over the others would be no mean over all
    table = page.readme_table(evidence)
    assert "| `affinity:proxy/fifth/robin` | `heads:random/late` | 2 | 50.0 | 1.500 |  |" in table


def test_seconds_of_heads_and_rows_that_were_found_elsewhere_are_not_compared(results, tmp_path):
    key = ("mixed", "copy", *claims.P2D, 3)
    folder = tmp_path / "results"
    shutil.copytree(results[0], folder)
    assert summary.read_evidence(folder).aer(summary.read_evidence(folder).lines[key]) is not None
    cell = a_cell("mixed", "copy", *claims.P2D)
    chooser = choose.Chooser(folder, None, None, None, None, 1)
    assert chooser.machines(cell, 0) == [environment.machine()]
    for path in (folder / "rows").glob("mixed-copy-*"):
        content = json.loads(path.read_text())
        del content["machine"]  # as files had none before
        path.write_text(json.dumps(content))
    assert chooser.machines(cell, 0) == [environment.machine(), choose.UNKNOWN_MACHINE]
    for path in (folder / "arms").glob("mixed-copy-*"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "chosen_on": chooser.machines(cell, 0)}))
    assert summary.read_evidence(folder).aer(summary.read_evidence(folder).lines[key]) is None


def test_what_was_run_once_more_measures_what_ran_there():
    other, key = {"cpu": "two"}, ("mixed", "a", *claims.P2D, 3)

    def there(sides, targets="abcd"):
        """All of the sides as they are on the other machine."""
        evidence = evidence_of(sides, targets=targets)
        for side in sides:
            run_on(evidence, other, side, 0, 1)
        return evidence

    # bm25's rows were chosen and trained on by the other machine
    bm25 = ("bm25/robin", claims.P2D[1])
    first = run_on(evidence_of({**SIDES, bm25: SIDES[claims.P2D]}), other, bm25, 0, 1)
    line = first.lines["mixed", "a", *bm25, 3]
    assert first.aer(line) is None
    dearer = {**SIDES, ("full", "full"): (30, 50.0, 1.0)}  # beside full fine-tuning in half of the time
    again = there(dearer)
    both = dataclasses.replace(first, again=again)
    assert both.aer(line) == pytest.approx(0.16) and both.aer(both.lines[key]) == pytest.approx(0.08)
    # each beside full fine-tuning on its own machine, in the picture of the stages, too
    assert (both.measure(line).seconds("train"), both.measure(both.lines[key]).seconds("train")) == (50.0, 100.0)
    assert not both.timed(line)  # beside the first machine's seconds its own say nothing
    assert "have their AER by full fine-tuning there, and no seconds" in page._untimed(both)
    # what holds on one machine only does not hold
    assert claims.judge(first)[3].verdict == claims.HELD
    whole = claims.judge(both)[3]
    assert whole.verdict == claims.NOT_HELD
    assert "once more on another machine: AER 0.160 (a 0.160, b 0.160, c 0.160, d 0.160)" in whole.figures
    # of half of the targets, or as cheap there, it changes nothing
    for again in (there(dearer, "ab"), there(SIDES)):
        assert claims.judge(dataclasses.replace(first, again=again))[3].verdict == claims.HELD


def test_the_page_says_whether_what_was_run_once_more_is_the_same(results, tmp_path):
    folder, again = tmp_path / page.MAIN, tmp_path / page.RERUN
    for to in (folder, again):
        shutil.copytree(results[0], to)
    path = next((again / "arms").glob("mixed-copy-*"))
    arm = json.loads(path.read_text())
    arm["test"]["copy"]["nll"] += 0.25
    path.write_text(json.dumps(arm))
    evidence = page.read_results(folder)
    text = page._again(evidence, folder)
    n_arms = evidence.arms
    assert f"{n_arms} of the arms were run once more (`{page.RERUN}`)" in text
    n_judged = int(re.search(r"Of (\d+) judgements", text)[1])
    assert f"exact match, {n_judged - 1} are equal" in text and "It took 1.00 times the CPU seconds" in text
    aer = f"{evidence.aer(evidence.lines['mixed', 'count', *claims.P2D, 3]):.3f}"
    assert f"| count | `{claims.P2D[0]}` | `{claims.P2D[1]}` | {aer} | {aer} |" in text
    assert page.read_results(again).again is None and page._again(page.read_results(again), again) == ""


def test_defaults_stand_against_what_was_run_in_their_place():
    found = {
        (a.field, a.instead): (comparison, seconds) for a, comparison, seconds in defaults.measured(evidence_of(SIDES))
    }
    shares = [
        ("train_last_layers", "heads of all layers"),
        ("score_first_layers", "heads of the first third of the layers"),
    ]
    methods = [
        "`proxy`",
        "`proxy`, the paper's, for rows and weights",
        "`proxy` for the rows",
        "`proxy` for the weights",
    ]
    assert set(found) == {*shares, *(("localize_method", method) for method in methods), ("scorer", "random rows")}
    comparison, seconds = found["scorer", "random rows"]
    assert comparison.exact_match["mean"] == pytest.approx(15 / 40) and seconds == 1.0
    slow = evidence_of({**SIDES, ("affinity:proxy/robin", claims.FOUND[1]): (30, 16.0, 1.0)})
    assert [seconds for a, _, seconds in defaults.measured(slow) if a.instead == "heads of all layers"] == [8 / 9, 0.5]


def test_the_picture_of_the_shares():
    """Around P2D: all heads and all rows are its last points, and other sides are not in it."""
    pytest.importorskip("matplotlib")
    data, parameters = claims.P2D
    sides = {
        claims.P2D: (20, 1.0, 1.0),
        (data, f"{parameters}@0.01"): (10, 1.0, 1.0),
        (data, "heads:all"): (30, 1.0, 1.0),
        (f"{data}@0.3", parameters): (25, 1.0, 1.0),
        ("full", parameters): (40, 1.0, 1.0),
        ("full", "heads:all"): (0, 1.0, 1.0),
        ("full", "full"): (0, 1.0, 1.0),
        claims.FOUND: (0, 1.0, 1.0),
    }
    heads, of_rows = plots._ratios(evidence_of(sides, targets="a")).axes
    assert heads.lines[0].get_xydata().tolist() == [[1, 25], [10, 50], [100, 75]]
    assert of_rows.lines[0].get_xydata().tolist() == [[10, 50], [30, 62.5], [100, 100]]
    assert plots._ratios(evidence_of({claims.P2D: (20, 1.0, 1.0)})) is None


@pytest.mark.parametrize("alternative", defaults.ALTERNATIVES, ids=lambda a: f"{a.field}-{a.instead}")
def test_what_stands_in_a_defaults_place_is_in_the_full_profile(alternative):
    cells = profile.Profile.read(PROFILES[0].with_name("full.yaml")).cells()
    declared = {(cell.setting, str(cell.data), str(cell.parameters), cell.epochs) for cell in cells}
    for side in (alternative.ours, alternative.theirs):
        assert (alternative.setting, *side, claims.EPOCHS) in declared
    assert alternative.field in {field.name for field in dataclasses.fields(P2DConfig)}


def test_each_default_that_decides_what_is_trained_has_an_alternative():
    fields = {field.name for field in dataclasses.fields(P2DConfig)} - {f.name for f in dataclasses.fields(SFTConfig)}
    of_accounts = {"reference_seconds", "reference_report", "reference_steps", "report_samples"}
    assert {alternative.field for alternative in defaults.ALTERNATIVES} == fields - of_accounts - {"p2d"}


def test_the_report(results, tmp_path):
    pytest.importorskip("matplotlib")
    folder, _ = results
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.README_START}\nold\n{page.README_END}\nafter\n")
    run_evidence.report(folder, tmp_path / "docs" / "results.md", readme)
    text = (tmp_path / "docs" / "results.md").read_text()
    n_tried = 2 * 2 + 2 + 2 + 2  # rates of heads, LoRA's one, one more cell's two, and the reference for two targets
    assert text.partition("learning rates that were tried")[2].count("| mixed |") == n_tried
    assert "Data matter" in text and "## One task in a mixed pool" in text
    # of other tasks than BIG-bench's there is no full profile
    assert "the rows are those of copy, count. A pool has 20 rows of each task;" in text and "not-run" not in text
    for picture in ("aer.svg", "stages.svg", "heads.svg"):
        assert f"results/{picture}" in text
        assert (tmp_path / "docs" / "results" / picture).read_text().startswith("<?xml")
    made = readme.read_text()
    assert made.startswith("before\n") and made.endswith("after\n") and "old" not in made
    assert f"`{claims.P2D[0]}` | `{claims.P2D[1]}`" in made

    once = {path: path.read_bytes() for path in (tmp_path / "docs").rglob("*.*")}
    run_evidence.report(folder, tmp_path / "docs" / "results.md", readme)
    assert once == {path: path.read_bytes() for path in (tmp_path / "docs").rglob("*.*")}
    readme.write_text("without marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        run_evidence.report(folder, tmp_path / "docs" / "results.md", readme)


@pytest.mark.parametrize(
    ("folder", "name"), [("evidence", "results"), ("evidence_gsm8k", "gsm8k"), ("evidence_other_tasks", "other-tasks")]
)
def test_what_is_published_is_what_the_results_say(folder, name):
    """These pages and the README's table are made by `run_evidence.py report`, and not by hand."""
    results = run_evidence.RESULTS.with_name(folder)
    evidence, others = page.read_results(results), page.read_others(results)
    found = {path.name for path in (ROOT / "docs" / name).glob("*.svg")}
    pictures = [f"{name}/{picture}" for picture in page.PICTURES if picture in found]
    assert (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") == page.page(evidence, results, pictures, others)
    if name != "results":
        return
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.with_results(readme, page.readme_tables(evidence, others)) == readme


def _of_command(command):
    """The profile that an arm's command names, and what stands behind its `--only`."""
    before, _, only = command.partition(" --only ")
    return next(word for word in shlex.split(before) if word.endswith(".yaml")), shlex.split(only)


def test_the_commands_of_arms_name_profiles_and_whole_cells(monkeypatch):
    cell = f"mixed qasc {claims.P2D[0]} {claims.P2D[1]} 3 epochs"
    called = []
    monkeypatch.setattr(run_evidence, "run_all", lambda part, make_runner, jobs: called.append((part, make_runner)))
    monkeypatch.setattr(run_evidence, "load_tasks", lambda *_: {})
    run_evidence.main(["run", str(page.FULL), "--model", "tiny", "--output", "a/b", "--only", cell, claims.P2D[0]])
    ((part, make_runner),) = called
    (command,) = (word for word in make_runner.args if isinstance(word, str) and word.startswith("python "))
    name, only = _of_command(command)
    assert name == "full.yaml" and only == [cell, claims.P2D[0]]
    assert profile.Profile.read(page.PROFILES / name).only(only).cells() == part.cells()


def test_the_published_arms_commands_can_be_followed():
    """But for those of the time when cells' names were cut, of which the page tells: no other may come."""
    commands = [
        command
        for folder in ("evidence", "evidence_gsm8k", "evidence_other_tasks", "evidence_rerun")
        for command in summary.read_evidence(run_evidence.RESULTS.with_name(folder)).commands
    ]
    gone, cut = set(), 0
    for name, only in map(_of_command, commands):
        if not (page.PROFILES / name).exists():
            gone.add(name)
        elif only:
            profile.Profile.read(page.PROFILES / name).only(only)
            cut += any(text.isalnum() for text in only)  # a word of a cell's name, or what was behind its last `/`
    assert gone == set(page.GONE)
    assert cut == 4


def test_a_rerun_does_not_take_the_place_of_what_is_published(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(run_evidence, "report", lambda *arguments: written.append(arguments))
    run_evidence.main(["report", "--output", str(tmp_path)])
    run_evidence.main(["report"])
    assert written == [
        (tmp_path, tmp_path / "page.md", None),
        (run_evidence.RESULTS, run_evidence.PAGE, ROOT / "README.md"),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")
@pytest.mark.parametrize("threads", [None, "1"])
def test_the_script_runs_a_process_for_each_core(threads, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS $@" >> {tmp_path / "calls"}\n')
    python.chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "JOBS")}
    environ |= {"VENV": str(tmp_path / "venv")}
    environ.pop("RESULTS", None)
    environ |= {} if threads is None else {"OMP_NUM_THREADS": threads}
    subprocess.run(["bash", str(ROOT / "scripts" / "evidence.sh")], env=environ, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # in a folder of its own: what is in ours is not run again
    assert any(call.startswith("1 ") and f"--jobs {cores} --output rerun" in call for call in calls)
    assert calls[-1] == "1 benchmarks/run_evidence.py report --output rerun"


@pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")
def test_an_environment_that_was_interrupted_is_made_anew(tmp_path):
    """What is made of an interpreter, and is no environment yet; a folder of something else is not cleared."""
    folder, python = tmp_path / "venv", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "calls"}\n')
    python.chmod(0o755)
    script = ["bash", str(ROOT / "scripts" / "environment.sh"), str(folder), "test"]
    for files in ([], ["pyvenv.cfg"]):
        folder.mkdir(exist_ok=True)
        for file in files:
            (folder / file).touch()
        environ = {**os.environ, "PYTHON": str(python)}
        assert subprocess.run(script, env=environ, capture_output=True).returncode != 0  # nothing was really made
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"-m venv {folder}", f"-m venv --clear {folder}"]


SLEEPERS = """
import os, sys, time
from functools import partial
from pathlib import Path

from evidence.profile import Profile
from evidence.schedule import run_all


class Sleeper:
    def __init__(self, folder):
        self.folder = folder

    def base(self, target):
        (self.folder / f"{os.getpid()}.pid").touch()
        time.sleep(600)

    def localize(self, *arguments):
        self.base(None)


if __name__ == "__main__":
    run_all(Profile.read(sys.argv[1]), partial(Sleeper, Path(sys.argv[2])), jobs=2)
"""


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # where nobody asks for what it ended with
    except psutil.NoSuchProcess:
        return True


def wait_until(true):
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_at_work(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    path = os.pathsep.join(map(str, (BENCHMARKS, ROOT / "examples", ROOT)))
    command = [sys.executable, str(script), str(PROFILES[0].with_name("small.yaml")), str(tmp_path)]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    try:
        wait_until(lambda: run.poll() is not None or len(list(tmp_path.glob("*.pid"))) == 2)
        workers = [psutil.Process(int(path.stem)) for path in tmp_path.glob("*.pid")]
        assert len(workers) == 2 and not any(map(has_ended, workers))
    finally:
        run.kill()
        run.wait()
    wait_until(lambda: all(map(has_ended, workers)))


# -- problems


def sizes(**changes):
    return profile.Problem(**{**a_profile()["problem"], **changes})


def a_cell(setting, target="copy", data="affinity:proxy", parameters="heads:proxy"):
    return profile.Cell(setting, target, profile.Data.read(data), profile.Parameters.read(parameters), 3)


def options_of_selectors(monkeypatch):
    """What the selectors are made with from now on, which choose the first row."""
    asked = []

    class Selector:
        def __init__(self, model, tokenizer, **options):
            asked.append(options)

        def select(self, pool):
            self.rows, self.scores = [0], torch.zeros(len(pool))

    monkeypatch.setattr(choose, "P2DDataSelector", Selector)
    return asked


@pytest.mark.parametrize("setting", profile.SETTINGS)
def test_no_held_out_row_is_in_the_pool_or_the_target(setting):
    made = [problem.split(tiny_tasks(), a_cell(setting), ["copy"], sizes(), seed) for seed in (0, 1, 0)]
    assert made[0] == made[2] != made[1]
    assert made[0].test == made[1].test and made[0].validation == made[1].validation
    prompts = [
        row["prompt"] for row in [*made[0].pool, *made[0].target, *made[0].test["copy"], *made[0].validation["copy"]]
    ]
    assert len(prompts) == len(set(prompts))
    tasks_in_pool = [row["task"] for row in made[0].pool]
    expected = {"mixed": (20, 20), "corrupted": (20, 20), "absent": (0, 20), "own": (30, 0)}[setting]
    assert (tasks_in_pool.count("copy"), tasks_in_pool.count("count")) == expected
    wrong = [row for row in made[0].pool if not row["right"]]
    assert len(wrong) == (12 if setting == "corrupted" else 0)
    right = {
        row["prompt"]: row["completion"] for of_task in tiny_tasks().values() for row in of_task if "prompt" in row
    }
    assert all((right[row["prompt"]] == row["completion"]) == row["right"] for row in made[0].pool)


def test_a_pool_is_the_same_for_all_targets():
    pools = [problem.split(tiny_tasks(), a_cell("mixed", name), [name], sizes(), 0).pool for name in ("copy", "count")]
    assert pools[0] == pools[1]


@pytest.mark.parametrize("count", [2, 30])
def test_rows_may_be_scored_by_fewer_or_more_samples(count, tmp_path, monkeypatch):
    """The pool and the samples to localize by stay the same, and more samples begin with the same ones."""
    cells = [a_cell("mixed", data=data) for data in ("affinity:all/robin", f"affinity:all/robin/from{count}")]
    assert [cell.data.samples for cell in cells] == [None, count]
    usual, made = (problem.split(tiny_tasks(), cell, ["copy"], sizes(), 0) for cell in cells)
    assert dataclasses.replace(made, samples=usual.samples) == usual
    assert usual.samples == usual.target and len(made.samples) == count
    shorter, longer = sorted((usual.samples, made.samples), key=len)
    assert longer[: len(shorter)] == shorter
    prompts = [row["prompt"] for row in [*made.pool, *made.samples, *made.test["copy"], *made.validation["copy"]]]
    assert len(prompts) == len(set(prompts))

    chooser = choose.Chooser(
        tmp_path, tiny_model, tiny_tokenizer(), tiny_arguments(tmp_path), nullcontext, batch_size=8
    )
    asked = options_of_selectors(monkeypatch)
    chooser.rows(made, cells[1], 0)
    assert asked[0]["target"]["prompt"] == [row["prompt"] for row in made.samples]


def test_samples_that_are_in_the_pool_are_told_of():
    with pytest.raises(ValueError, match="are in the pool"):
        problem.split(tiny_tasks(), a_cell("mixed", data="bm25/from1000"), ["copy"], sizes(), 0)


def test_too_few_rows_and_leaks_are_told_of():
    with pytest.raises(ValueError, match="rows left for the pool, asked for are 1000"):
        problem.split(tiny_tasks(), a_cell("mixed"), ["copy"], sizes(pool_rows=1000), 0)
    twice = tiny_tasks()
    twice["copy"] = [twice["copy"][0], *twice["copy"]] + twice["copy"]
    with pytest.raises(ValueError, match=r"held-out prompts are in the|are in the pool"):
        problem.split(twice, a_cell("own"), ["copy"], sizes(own_rows=100), 0)
    with pytest.raises(ValueError, match="is not one of the tasks"):
        problem.split(tiny_tasks(), a_cell("mixed", "nothing"), ["nothing"], sizes(), 0)


# -- profiles


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_our_profiles_are_valid(path, capsys):
    run_evidence.main(["check", str(path)])
    assert "arms" in capsys.readouterr().out
    read = profile.Profile.read(path)
    names = set(bigbench.POOLS[read.tasks][0] if isinstance(read.tasks, str) else read.tasks)
    assert set(read.targets()) <= names
    for cell in read.cells():  # each can be made
        config = adapt.adapter_config(cell.parameters.adapter, None, 0)
        assert (config is None) == (cell.parameters.adapter == "full")


def test_rows_may_be_scored_by_heads_of_the_first_layers(tmp_path):
    model = tiny_model(num_hidden_layers=4)
    chooser = choose.Chooser(
        tmp_path, lambda: model, tiny_tokenizer(), tiny_arguments(tmp_path), nullcontext, batch_size=8
    )
    made = problem.split(tiny_tasks(), a_cell("mixed"), ["copy"], sizes(), 0)
    passed = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: passed.append(index))
    chosen = {}
    for data, deepest in (("affinity:all", 3), ("affinity:all/first", 0), ("affinity:all/fifth/robin", 0)):
        passed.clear()
        chosen[data], seconds = chooser.rows(made, a_cell("mixed", data=data), 0)
        assert seconds.cpu > 0
        assert len(chosen[data]) == 4 and max(passed) == deepest
        assert str(profile.Data.read(data)) == data
    assert len({tuple(rows) for rows in chosen.values()}) > 1
    assert {path.stem for path in (tmp_path / "rows").iterdir()} == {
        "mixed-copy-affinity.all-seed0",
        "mixed-copy-affinity.all_first-seed0",
        "mixed-copy-affinity.all_fifth_robin-seed0",
    }


def test_a_cell_says_how_heads_and_rows_are_chosen(tmp_path, monkeypatch):
    model = tiny_model(num_hidden_layers=10)
    chooser = choose.Chooser(
        tmp_path, lambda: model, tiny_tokenizer(), tiny_arguments(tmp_path), nullcontext, batch_size=8
    )
    made = problem.split(tiny_tasks(), a_cell("mixed"), ["copy"], sizes(), 0)
    asked = options_of_selectors(monkeypatch)
    chooser.rows(made, a_cell("mixed", data="affinity:proxy/fifth/robin@0.3"), 3)
    chooser.rows(made, a_cell("mixed", data="gradient:gain"), 3)
    chooser.rows(made, a_cell("mixed", data="affinity:all/first"), 3)
    chooser.rows(made, a_cell("mixed", data="affinity:all/robin/diverse"), 3)
    scores, _ = chooser.scores(made, a_cell("mixed"), "proxy", 3)
    assert scores.method == "proxy"
    assert [(of["scorer"], of["ratio"], of["seed"]) for of in asked] == [
        ("affinity", 0.3, 3),
        ("gradient", 0.1, 3),
        ("affinity", 0.1, 3),
        ("affinity", 0.1, 3),
    ]
    assert [[type(policy) for policy in of["policies"]] for of in asked] == [
        [RoundRobin],
        [],
        [],
        [RoundRobin, Diverse],
    ]
    assert asked[0]["heads"] == scores.top(0.1, per_layer="even", first_layers=0.2)
    assert max(asked[0]["heads"].layers) < 2
    assert asked[1]["heads"] == chooser.scores(made, a_cell("mixed"), "gain", 3)[0].top(0.1, per_layer="even")
    assert set(asked[2]["heads"]) == {head for head in ModelGeometry.of(model).heads if head.layer < 3}
    assert [row["prompt"] for row in made.target] == asked[0]["target"]["prompt"]

    trained = chooser.trained_heads(made, a_cell("mixed", parameters="heads:proxy/late@0.3"), 3)
    assert trained == scores.top(0.3, per_layer="even", last_layers=0.67) != scores.top(0.3, per_layer="even")
    assert chooser.trained_heads(made, a_cell("mixed", parameters="lora-all"), 3) is None


def test_rows_may_be_picked_against_their_likeness():
    """By the scorers whose features tell what is alike."""
    with_features = {name for name in typing.get_args(selector.ScorerName) if selector._SCORERS[name].features}
    assert set(profile.WITH_FEATURES) == with_features
    data = profile.Data.read("affinity:random/fifth/robin/diverse@0.3")
    assert (data.robin, data.diverse, data.ratio) == (True, True, 0.3)
    assert str(data) == "affinity:random/fifth/robin/diverse@0.3"


def test_what_an_adapters_name_stands_for():
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    lora, every, shira, heads, without = (
        adapt.adapter_config(name, None, 7) for name in ("lora-attention", "lora-all", "shira", "heads", "heads-qo")
    )
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (16, 32, attention)
    assert (every.r, every.lora_alpha, every.target_modules) == (16, 32, "all-linear")
    assert (shira.r, shira.target_modules, shira.random_seed) == (16, attention, 7)
    assert (heads.share_kv, without.share_kv) == (True, False)


def test_a_part_of_a_profile(capsys):
    path = str(PROFILES[0].with_name("small.yaml"))
    run_evidence.main(["check", path, "--only", "own question_typing", "lora-attention 3"])
    *cells, count = capsys.readouterr().out.splitlines()
    assert [cell.split()[0] for cell in cells].count("own") == 2 and len(cells) == 4
    assert count == "4 cells, 16 arms, targets intent_recognition, question_typing"
    with pytest.raises(ValueError, match=r"\['dora'\] is in none of the cells' names, such as 'mixed any full full 3"):
        run_evidence.main(["check", path, "--only", "dora"])


def test_the_small_profile_is_part_of_the_full_one():
    small, full = (profile.Profile.read(PROFILES[0].with_name(f"{name}.yaml")) for name in ("small", "full"))
    assert (small.model, small.problem, small.training) == (full.model, full.problem, full.training)
    assert set(small.cells()) <= set(full.cells())
    assert all(full.learning_rates[name] == rates for name, rates in small.learning_rates.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": [{**a_profile()["arms"][0], "data": ["affinity"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["bm25:proxy"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["affinity:proxy/upper"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["affinity:proxy/robin/first"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["perplexity/robin"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["rds/first"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["bm25/robin/diverse"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["perplexity/from10"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["bm25/from0"]}]}, "write SCORER"),
        ({"arms": [{**a_profile()["arms"][0], "data": ["best"]}]}, "'best' is neither 'full' nor"),
        ({"arms": [{**a_profile()["arms"][0], "parameters": ["heads:best"]}]}, "write heads:METHOD"),
        ({"arms": [{**a_profile()["arms"][0], "parameters": ["heads:gate/nowhere"]}]}, "write heads:METHOD"),
        ({"arms": [{**a_profile()["arms"][0], "parameters": ["heads:gate@2"]}]}, "must be in"),
        ({"arms": [{**a_profile()["arms"][0], "parameters": ["dora"]}]}, "'dora' is not one of"),
        ({"arms": [{**a_profile()["arms"][0], "targets": ["any"]}]}, "depends on a target"),
        ({"arms": [{**a_profile()["arms"][0], "settings": ["easy"]}]}, "easy"),
        ({"arms": [{**a_profile()["arms"][0], "seeds": [7]}]}, "not among the profile's"),
        ({"arms": [{**a_profile()["arms"][0], "seed": [0]}]}, "seed"),
        ({"learning_rates": {"heads": [1e-3]}}, "has none for 'full'"),
        ({"problem": {"rows": 3}}, "rows"),
    ],
)
def test_what_a_profile_cannot_say(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        profile.Profile.read(write_profile(tmp_path, **changes))


# -- the training


def test_the_trainers_loss_is_that_of_sft_trainer(tmp_path):
    data = problem.as_dataset(rows(8))
    arguments = tiny_arguments(tmp_path)
    trained = []
    for kind in (SFTTrainer, adapt.AnswerTrainer):
        model = tiny_model()
        kind(model, dataclasses.replace(arguments), train_dataset=data, processing_class=tiny_tokenizer()).train()
        trained.append(model.state_dict())
    start = tiny_model().state_dict()
    moved = sum(float((trained[0][name] - start[name]).abs().sum()) for name in start)
    apart = sum(float((trained[0][name] - trained[1][name]).abs().sum()) for name in start)
    assert apart < 1e-3 * moved


def test_rows_of_bigbench():
    draw = random.Random(0)
    choice = {"input": "Which?", "target_scores": {"one": 0, "two": 1, "three": 0}}
    row = bigbench.TASKS["sentiment"][1](choice, draw)
    assert row["completion"] == " two" and sorted(row["options"]) == ["one", "three", "two"]
    assert row["prompt"].startswith("Sentiment of this review sentence?\nWhich?\nOptions: ")
    assert bigbench.TASKS["hyperbaton"][1]({**choice, "target_scores": {"one": 1, "two": 1}}, draw) is None
    for target in (["an answer", "another"], "an answer"):
        free = bigbench.TASKS["qasc"][1]({"input": "Fact: a.", "target": target}, draw)
        assert free == {
            "task": "",
            "prompt": "Answer from the fact.\nFact: a.\nAnswer:",
            "completion": " an answer",
            "options": [],
        }


def test_the_tasks_of_the_second_look_are_others(tmp_path, monkeypatch):
    pools = [set(tasks) for tasks, _ in bigbench.POOLS.values()]
    folders = [{folder for folder, _ in tasks.values()} for tasks, _ in bigbench.POOLS.values()]
    assert [len(pool) for pool in pools] == [8, 8]
    assert not pools[0] & pools[1] and not folders[0] & folders[1]
    # each has its own file in the cache
    for number, name in enumerate(bigbench.POOLS, 1):
        (tmp_path / f"bigbench-evidence-{number}.json").write_text(json.dumps({name: []}))
        assert bigbench.fetch(name, tmp_path) == {name: []}
    monkeypatch.setattr(bigbench, "fetch", lambda pool: {pool: []})
    read = profile.Profile.read(page.CONFIRM)
    assert tasks.load_tasks(read, {}) == {"bigbench-2": []}
    # as many targets as the claims speak of, and in each claim's cells all seeds
    assert len(read.targets()) == claims.ALL_TARGETS and set(read.targets()) <= pools[1]
    assert {tuple(seeds) for seeds in read.cells().values()} == {(0, 1, 2, 3, 4)}
    path = write_profile(tmp_path, tasks="bigbench-3")
    with pytest.raises(ValueError, match=r"`tasks` 'bigbench-3' is not one of \['bigbench', 'bigbench-2'\]"):
        profile.Profile.read(path)


def test_a_page_says_what_its_verdicts_are_worth(tmp_path, monkeypatch):
    first, second, neither = (
        evidence_of(SIDES, targets=targets)
        for targets in (("qasc", "sentiment"), ("plural", "past_tense"), ("qasc", "plural"))
    )
    assert page._planned(first) == page.FULL and "changed four times" in page._chosen_by(first)
    assert page._planned(second) == page.CONFIRM and "`confirm.yaml`" in page._chosen_by(second)
    assert page._planned(neither) is None and page._chosen_by(neither) == ""
    # on the main page the verdicts of the other tasks stand beside its own
    other = {**SIDES, ("full", "full"): (35, 100.0, 1.0)}
    monkeypatch.setattr(page, "read_evidence", lambda folder: evidence_of(other))
    (tmp_path / page.OTHERS).mkdir()
    beside, none = (page.read_others(tmp_path / name) for name in (page.MAIN, "evidence_gsm8k"))
    table = page._claims(evidence_of(SIDES), beside)
    assert "| 4 | The whole" in table and "per second. | **held** | **not held** |" in table
    assert "other tasks" not in page._claims(evidence_of(SIDES), none)
    # and so do their numbers in the README
    tables = page.readme_tables(evidence_of(SIDES), beside)
    assert tables.count("| `full` | `full` | 2 | 75.0 |") == tables.count("| `full` | `full` | 2 | 87.5 |") == 1
    assert page.readme_tables(evidence_of(SIDES), none) == page.readme_table(evidence_of(SIDES))
    untimed = page.readme_table(evidence_of(SIDES, "accelerator", 4))
    assert "AER" not in untimed and "| `full` | `full` | 2 | 75.0 | 1.000 | +0.000 |" in untimed


def test_of_lines_with_fewer_seeds_the_readme_has_the_papers_alone():
    few = ("affinity:proxy", "heads:proxy")
    evidence = evidence_of({**SIDES, claims.PAPER: (12, 8.0, 1.0), few: (13, 8.0, 1.0)})
    for key, line in evidence.lines.items():
        if key[2:4] in (claims.PAPER, few) and key[1] == "b":
            evidence.lines[key] = dataclasses.replace(line, tests={0: line.tests[0]}, results={0: line.results[0]})
    table = page.readme_table(evidence)
    assert "| `icl:proxy` | `heads:proxy` | 1 | 30.0 |" in table and "`affinity:proxy` |" not in table
    assert f"| `{claims.P2D[0]}` | `{claims.P2D[1]}` | 2 | 75.0 |" in table


def test_the_seeds_that_are_missing_are_counted(tmp_path):
    path = write_profile(
        tmp_path,
        seeds=[0, 1, 2],
        arms=[
            {
                "settings": ["mixed"],
                "targets": ["a", "b"],
                "data": [claims.P2D[0]],
                "parameters": [claims.P2D[1]],
                "epochs": [3],
            },
            {
                "settings": ["mixed"],
                "targets": ["a"],
                "data": ["bm25/robin"],
                "parameters": [claims.P2D[1]],
                "epochs": [3],
            },
        ],
    )
    text = page._seeds_not_run(evidence_of(SIDES), path)  # which has seeds 0 and 1, and nothing of bm25
    assert text == "Of the 2 cells and targets that have arms, these seeds are missing: seed 2 in 2."
    assert page._not_run(evidence_of(SIDES), path) == f"- mixed, `{claims.P2D[1]}`: `bm25/robin`"


def test_tasks_of_datasets(tmp_path, monkeypatch):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    lines = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in (*range(5), 0)]
    (folder / "train.json").write_text(json.dumps(lines))
    monkeypatch.setattr(bigbench, "fetch", lambda: tiny_tasks())
    read = profile.Profile.read(PROFILES[0].with_name("gsm8k.yaml"))
    made = tasks.load_tasks(read, {"openai/gsm8k": str(folder)})
    assert set(made) == {"gsm8k", "passages"}
    assert {row["prompt"]: row["completion"] for row in made["gsm8k"]} == {
        f"{i} + 1?\nAnswer:": f" {i + 1}" for i in range(5)
    }


def test_passages_are_judged_by_their_own_tokens():
    """As many texts at a time as there are, whatever their lengths: padding does not count."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = ["some words", "many more words than the others have, and then some", "a"]
    alone = [base.judge_passages(model, [text], tokenizer, 64, nullcontext) for text in texts[:2]]
    counts = [len(tokenizer(text).input_ids) - 1 for text in texts[:2]]
    assert counts[0] < counts[1]
    expected = sum(nll * count for nll, count in zip(alone, counts, strict=True)) / sum(counts)
    found = [base.judge_passages(model, texts[:2], tokenizer, 64, nullcontext, batch_size=size) for size in (1, 2)]
    assert found == pytest.approx([expected, expected], rel=1e-5)


def test_options():
    arguments = tiny_arguments(Path("unused"))

    class Knows(torch.nn.Module):
        """Thinks that after any token comes a `7`."""

        def __init__(self, tokenizer):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))
            self.likely, self.size = tokenizer("7")["input_ids"][-1], len(tokenizer)

        def forward(self, input_ids, logits_to_keep, past_key_values=None, use_cache=False, **_):
            logits = torch.zeros(len(input_ids), min(logits_to_keep, input_ids.shape[1]), self.size)
            logits[..., self.likely] = 5.0
            cache = type("Cache", (), {"batch_repeat_interleave": lambda self, n: None})() if use_cache else None
            return type("Output", (), {"logits": logits, "past_key_values": cache})()

    asked = [
        {"prompt": "count a?", "completion": " 7", "options": ["3", "7"]},
        {"prompt": "count b?", "completion": " 3", "options": ["3", "7", "5"]},
        {"prompt": "free", "completion": " text", "options": []},
    ]
    found = base.judge_options(Knows(tiny_tokenizer()), asked, tiny_tokenizer(), arguments, nullcontext)
    assert found == {"options_accuracy": 0.5, "options_guess": pytest.approx((1 / 2 + 1 / 3) / 2)}
    assert base.judge_options(Knows(tiny_tokenizer()), asked[2:], tiny_tokenizer(), arguments, nullcontext) == {}
