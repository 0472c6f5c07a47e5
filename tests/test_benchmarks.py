"""The benchmarks run, on a tiny model; and of their numbers, those that are no times hold there too."""

import itertools
import json
import random

import pytest
import torch

from p2d_peft import HeadScores, HeadSet
from p2d_peft.selection import engine as selection_engine

from .benchmark_files import load_benchmark
from .tiny_data import rows
from .tiny_models import VOCAB_SIZE, random_batch, tiny_model, tiny_tokenizer


environment = load_benchmark("environment")
head_sparse_step = load_benchmark("head_sparse_step")
model_shape = load_benchmark("model_shape")
large_run = load_benchmark("large_run")
fused_layout = load_benchmark("fused_layout")
localize = load_benchmark("localize")
localize_report = load_benchmark("localize_report")
scorers = load_benchmark("scorers")
selection_cost = load_benchmark("selection_cost")
localize_cost = load_benchmark("localize_cost")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark") / "tiny"
    tiny_model(num_hidden_layers=6).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def numbers(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "numbers.json"
    options = ["--rounds", "2", "--warmup", "1", "--tokens", "32", "--output", str(output)]
    result = head_sparse_step.main(["--model", str(model_folder), *options])
    written = output.read_text()
    assert json.loads(written) == json.loads(json.dumps(result))
    assert str(model_folder.parent) not in written  # it may be published
    return result


def test_some_of_the_arms_alone(model_folder, capsys):
    options = ["--model", str(model_folder), "--rounds", "2", "--warmup", "1", "--tokens", "32"]
    result = head_sparse_step.main([*options, "--arms", "floor_anywhere", "head_sparse_anywhere"])
    assert set(result["arms"]) == {"floor_anywhere", "head_sparse_anywhere"}
    assert set(result["step_time_ratios"]) == {"head_sparse_anywhere / floor_anywhere"}
    with pytest.raises(SystemExit):
        head_sparse_step.main([*options, "--arms", "ceiling"])
    assert "there is no ceiling, only full, floor_anywhere" in capsys.readouterr().err


@pytest.fixture
def tiny_shape(monkeypatch):
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(model_shape.SHAPES, "tiny", {**sizes, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 6})


@pytest.mark.usefixtures("tiny_shape")
def test_a_step_of_random_weights():
    options = [
        "--shape",
        "tiny",
        "--dtype",
        "bfloat16",
        "--rounds",
        "2",
        "--warmup",
        "0",
        "--rows",
        "2",
        "--tokens",
        "16",
    ]
    result = head_sparse_step.main([*options, "--arms", "full", "head_sparse_top_third"])
    assert result["settings"]["model"] == "random weights, tiny"
    assert (result["settings"]["dtype"], result["settings"]["batch"]) == ("bfloat16", [2, 16])
    assert set(result["arms"]) == {"full", "head_sparse_top_third"}


@pytest.mark.usefixtures("tiny_shape")
def test_a_whole_run_on_a_large_model(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "data" / "train.jsonl"
    data.parent.mkdir()
    with data.open("w") as file:
        for row in rows(140):
            file.write(json.dumps({"question": row["prompt"], "answer": row["completion"]}) + "\n")
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--shape", "tiny", "--dataset", str(data.parent)]
    output = tmp_path / "large.json"
    result = large_run.main(
        [*options, "--rows", "40", "--warmup-rows", "20", "--epochs", "2", "--output", str(output)]
    )
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert str(tmp_path) not in json.dumps(result["command"])
    ours, full = result["p2d"], result["full"]
    assert set(ours["stage_seconds"]) == set(result["cold_stage_seconds"]) == {"localize", "select", "train"}
    assert set(full["stage_seconds"]) == {"train"}
    assert (ours["pool_rows"], ours["selected_rows"], ours["epochs"], full["epochs"]) == (40, 4, 2, 2)
    assert result["aer"] == sum(ours["stage_seconds"].values()) / full["stage_seconds"]["train"]

    estimated = large_run.main([*options, "--rows", "20", "--warmup-rows", "0", "--epochs", "1", "--estimate"])
    assert estimated["full"] is None and estimated["estimated_over_measured_reference"] is None
    assert estimated["aer"] == estimated["p2d"]["aer"] > 0


def test_the_default_rows_of_a_large_run_have_a_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(large_run, "load_dataset", lambda *arguments, **_: asked.append(arguments) or 1 / 0)
    for options in ([], ["--dataset", "folder"], ["--dataset-name", "socratic"]):
        with pytest.raises(ZeroDivisionError):
            large_run.main(["--tokenizer", "unused", *options])
    assert asked == [(large_run.GSM8K, "main"), ("folder", None), (large_run.GSM8K, "socratic")]


def test_all_arms_are_there(numbers):
    arms = numbers["arms"]
    where = ("anywhere", "top_third")
    assert set(arms) == {"full", "lora_r16", "shira_r16"} | {
        f"{kind}_{place}" for kind in ("floor", "head_sparse", "head_sparse_qo", "lora_matched") for place in where
    }
    for place in where:
        assert arms[f"floor_{place}"]["trained_parameters"] == 0
        assert arms[f"floor_{place}"]["lowest_layer"] == arms[f"head_sparse_{place}"]["lowest_layer"]
        assert (
            0
            < arms[f"lora_matched_{place}"]["trained_parameters"]
            <= arms[f"head_sparse_{place}"]["trained_parameters"]
        )
        assert (
            arms[f"head_sparse_qo_{place}"]["trained_parameters"] < arms[f"head_sparse_{place}"]["trained_parameters"]
        )
    assert arms["head_sparse_top_third"]["lowest_layer"] >= 4
    assert arms["full"]["trained_parameters"] == sum(p.numel() for p in tiny_model(num_hidden_layers=6).parameters())
    for values in numbers["step_time_ratios"].values():
        assert 0 < values["first_quartile"] <= values["median"] <= values["third_quartile"]


def test_memory(numbers):
    arms = numbers["arms"]
    for place in ("anywhere", "top_third"):
        row = arms[f"head_sparse_{place}"]
        assert row["saved_bytes_below"] == 0
        assert row["weight_copies"] == 0
        assert row["checkpoint_bytes_beyond_weights"] <= 8 * 1024
        # AdamW keeps two numbers for each weight, and for each tensor a step count
        assert 2 * row["trained_bytes"] < row["optimizer_bytes"] < 2 * row["trained_bytes"] + 1024
        # the backward of both reaches as far
        assert row["saved_bytes"] < arms["lora_r16"]["saved_bytes"] < arms["full"]["saved_bytes"]
    # what the measure is meant to notice: SHiRA adds its delta to a copy of each weight
    assert arms["shira_r16"]["weight_copies"] >= 6
    assert arms["full"]["peak_bytes"] > 3 * 4 * arms["full"]["trained_parameters"]


def test_floor_is_what_its_name_says(model_folder):
    """Its gradient at the lowest layer's input is the model's, and no weight gets one."""
    base, heads = tiny_model(num_hidden_layers=6).requires_grad_(False), torch.randint(96, (1, 16))
    arm = head_sparse_step.floor("floor", base, lowest=3)
    leaves = []
    layer = arm.model.model.layers[3]
    layer.register_forward_pre_hook(lambda module, args: leaves.append(args[0]))
    arm.step({"input_ids": heads, "labels": heads})
    assert leaves[0].is_leaf and leaves[0].grad.count_nonzero() > 0
    assert all(parameter.grad is None for parameter in arm.model.parameters())
    assert all(mine is theirs for mine, theirs in zip(arm.model.parameters(), base.parameters(), strict=True))


def test_alive_tensors_counts_what_lives():
    known = torch.ones(1000)
    with head_sparse_step.AliveTensors([known], alive=100) as tensors:
        a = known * 2  # 4000 bytes
        view = a[:10]
        a.add_(1)
        known.mul_(2)
        del a
        assert tensors.alive == 100 + 4000  # the view keeps it
        del view
        b = known + 1
        del b
        c = torch.zeros(10)
    assert (tensors.alive, tensors.peak) == (100 + 40, 100 + 4000)
    assert c.nbytes == 40 and tensors.shapes[(1000,)] == 2


def test_too_few_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        head_sparse_step.main(["--model", "x", "--rounds", "1"])
    assert "--rounds must be at least 2" in capsys.readouterr().err


def test_the_same_heads_give_the_same_trained_result_in_a_fused_layout():
    llama = tiny_model(num_hidden_layers=3, rope_parameters={"rope_type": "default", "rope_theta": 1e5}).double()
    batches = [torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    heads = HeadSet([(0, 1), (0, 2), (2, 3)])
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    numbers = fused_layout.compare(llama, heads, batches, lr=1e-2)
    assert numbers["logits_largest_difference"] < 1e-12 < numbers["logits_largest"]
    assert numbers["losses"] == pytest.approx(numbers["losses_fused"], rel=1e-12)
    assert numbers["losses"][-1] != numbers["losses"][0]
    assert numbers["trained_slices"] == 12
    assert numbers["trained_relative_difference"] < 1e-6  # AdamW's first step divides a gradient by itself
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


# -- localize.py


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The options of a run over two tasks, two seeds and three methods, and the folder that it filled."""
    folder = tmp_path_factory.mktemp("localize")
    tiny_model(num_hidden_layers=4).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows(80, seed=0))))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows(24, seed=1))))
    options = ["--output", str(folder / "out"), "--model", str(folder / "model")]
    options += ["--train", str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl")]
    options += ["--tasks", "copy", "count", "--seeds", "0", "1", "--methods", "taylor", "random", "--ratios", "0.2"]
    options += ["--samples", "8", "--rows", "12", "--test-rows", "10", "--epochs", "1", "--batch-size", "4"]
    options += ["--lr", "0.01", "--dtype", "float32"]
    localize.main(options)
    return options, folder / "out"


def arm_files(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "arms").iterdir()}


def test_localize_runs_no_arm_twice(judged, monkeypatch, capsys):
    options, folder = judged
    before = arm_files(folder)
    assert len(before) == 2 * 2 * 2 * 2  # tasks, seeds, methods, choices
    assert len(list((folder / "scores").iterdir())) == 2 * 2 * 2  # the choices share them
    next(iter(before)).unlink()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        # the arm that is missing finds its scores
        patch.setattr(localize, "localize_heads", lambda *_, **__: pytest.fail("localized twice"))
        localize.main(options)
    assert len(capsys.readouterr().out.splitlines()) == 1
    after = arm_files(folder)
    assert set(after) == set(before)
    assert sum(after[path] != before[path] for path in before) == 1
    # other settings are other arms
    with pytest.raises(SystemExit, match=r"other settings.*'rows': \(12, 13\)"):
        localize.main([*options, "--rows", "13"])


def test_localize_arms_are_reproducible_and_differ_in_their_heads_only(judged, tmp_path, monkeypatch):
    options, folder = judged
    monkeypatch.setattr(localize, "now", itertools.count().__next__)  # all that is timed takes a second
    again = ["--output", str(tmp_path / "out"), "--tasks", "count", "--seeds", "1", "--methods", "taylor"]
    localize.main([*options, *again, "--choices", "spread"])
    (path,) = (tmp_path / "out" / "arms").iterdir()
    mine, theirs = json.loads(path.read_text()), json.loads((folder / "arms" / path.name).read_text())
    assert all(mine[key] == theirs[key] for key in ("heads", "nll", "exact_match", "last_epoch_loss"))
    full_step = json.loads((tmp_path / "out" / "full_step" / "count.json").read_text())
    assert full_step["seconds_per_token"] * full_step["tokens"] == mine["train_seconds"] == 1
    tokens = mine["localize_seconds"] / mine["localize_full_steps"] * full_step["tokens"]
    assert (
        tokens == pytest.approx(round(tokens)) and tokens > full_step["tokens"]
    )  # of eight samples, and of four of them
    # an arm in between leaves nothing behind; and what trains differs from the model as it is
    base = json.loads((folder / "base" / "count.json").read_text())
    assert mine["nll"] < base["nll"]


def test_localize_report_says_what_the_arms_say(judged, tmp_path, capsys):
    options, folder = judged
    localize.main([*options, "--stability", "--stability-samples", "4", "8"])
    summary = localize.main(["--output", str(folder), "--report", "--summary", str(tmp_path / "summary.json")])
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == summary
    assert str(folder.parent) not in text  # it may be published
    assert (tmp_path / "summary.md").read_text() in capsys.readouterr().out
    arms = [json.loads(path.read_text()) for path in arm_files(folder)]
    assert len(summary["methods"]) == 4
    for row in summary["methods"]:
        group = [arm for arm in arms if (arm["method"], arm["choice"]) == (row["method"], row["choice"])]
        assert row["arms"] == len(group) == 4
        for name in ("nll", "exact_match", "train_seconds", "localize_full_steps"):
            assert row[name] == pytest.approx(sum(arm[name] for arm in group) / 4)
            of_task = [arm[name] for arm in group if arm["task"] == "copy"]
            assert row["tasks"]["copy"][name] == pytest.approx(sum(of_task) / 2)
        if (row["method"], row["choice"]) == ("random", "spread"):
            assert "nll_minus_control" not in row
            continue
        control = {
            (arm["task"], arm["seed"]): arm["nll"]
            for arm in arms
            if (arm["method"], arm["choice"]) == ("random", "spread")
        }
        differences = [arm["nll"] - control[arm["task"], arm["seed"]] for arm in group]
        found = row["nll_minus_control"]
        assert found["pairs"] == 4 and found["mean"] == pytest.approx(sum(differences) / 4)
        assert min(differences) <= found["low"] <= found["mean"] <= found["high"] <= max(differences)
    for arm in arms:
        scores = HeadScores.load(folder / "scores" / f"{arm['task']}-{arm['method']}-n8-seed{arm['seed']}.json")
        assert arm["heads"] == localize.CHOICES[arm["choice"]](scores, 0.2).to_dict()["heads"]
        assert sum(map(len, arm["heads"].values())) == 3  # 20 % of 16
        if arm["choice"] == "spread":
            assert all(len(heads) == 1 for heads in arm["heads"].values())
    assert any("--stability-samples" in command for command in summary["commands"])
    stability = summary["stability"]
    assert {row["samples"] for row in stability["between_seeds"]} == {4, 8}
    assert all(row["samples"] == 4 and row["pairs"] == 2 for row in stability["with_most_samples"])
    path = folder / "scores" / "copy-taylor-n{}-seed0.json"
    few, many = (HeadScores.load(str(path).format(n)).values for n in (4, 8))
    assert few.shape == (4, 4) and -1 <= localize_report.spearman(few, many) <= 1
    without = localize.main(["--output", str(folder), "--report", "--no-times"])
    capsys.readouterr()
    for row, of_all in zip(without["methods"], summary["methods"], strict=True):
        assert row["nll"] == of_all["nll"] and not any("seconds" in name or "steps" in name for name in row)
    tables = {times: localize_report.markdown(found) for times, found in ((True, summary), (False, without))}
    assert "localize s" in tables[True] and "localize s" not in tables[False]
    assert all(
        len({line.count("|") for line in table.split("\n\n")[-1].splitlines()}) == 1 for table in tables.values()
    )


def test_localize_looks_at_rows_to_train_on_as_the_seed_draws_them(judged, tmp_path, monkeypatch):
    options, folder = judged
    asked = []

    def scores(model, batches, method, seed):
        texts = tiny_tokenizer().batch_decode([row for batch in batches for row in batch["input_ids"]])
        asked.append((method, seed, texts))
        return HeadScores(torch.zeros(4, 4), method, seconds=0.0)

    monkeypatch.setattr(localize, "localize_heads", scores)
    again = ["--output", str(tmp_path), "--stability", "--stability-samples", "8", "--methods", "taylor"]
    localize.main([*options, *again])
    assert [method for method, _, _ in asked] == ["taylor"] * 4 and len({seed for _, seed, _ in asked}) == 4
    train, test = (
        [json.loads(line) for line in (folder.parent / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    for (_, _, texts), task in zip(asked, ("copy", "count") * 2, strict=True):
        assert len(texts) == 8
        assert all(any(row["prompt"] in text for row in train if row["task"] == task) for text in texts)
        assert not any(row["prompt"] in text for row in test for text in texts)
    assert asked[0][2] != asked[2][2]  # of another seed


def test_localize_compares_arms_of_one_learning_rate(tmp_path):
    for folder in ("arms", "scores", "base"):
        (tmp_path / folder).mkdir()
    (tmp_path / "settings.json").write_text("{}")
    arm = {"task": "a", "choice": "spread", "ratio": 0.1, "exact_match": 0.5, "trainable_parameters": 1}
    arm |= {"command": "", "machine": {}, "versions": {}}
    nll = {("random", 1e-3): 1.0, ("random", 2e-3): 2.0, ("taylor", 1e-3): 1.5, ("taylor", 2e-3): 1.0}
    for number, ((method, lr), value) in enumerate(nll.items()):
        for seed in range(6):
            text = json.dumps({**arm, "method": method, "lr": lr, "nll": value + seed, "seed": seed})
            (tmp_path / "arms" / f"{number}-{seed}.json").write_text(text)
    values = torch.arange(12.0).reshape(3, 4)
    for method, of_method in (("trained", values), ("gain", values.exp()), ("random", -values)):
        HeadScores(of_method, method).save(tmp_path / "scores" / f"a-{method}-n4-seed0.json")
    found = localize_report.summarize(tmp_path, times=False)
    differences = {
        row["lr"]: row["nll_minus_control"]["mean"] for row in found["methods"] if row["method"] == "taylor"
    }
    assert differences == {1e-3: 0.5, 2e-3: -1.0}
    trained = {row["method"]: row["spearman"] for row in found["stability"]["with_trained"]}
    assert trained == {"gain": pytest.approx(1), "random": pytest.approx(-1)}


def test_localize_sees_what_sft_trainers_loss_and_greedy_decoding_see(judged):
    _, folder = judged
    tokenizer, model = tiny_tokenizer(), tiny_model()
    args = type("Args", (), {"tasks": ["count"], "test_rows": 10})
    args.train, args.test = folder.parent / "train.jsonl", folder.parent / "test.jsonl"
    task = localize.read_tasks(args, tokenizer)["count"]
    assert not {tuple(ids) for ids in task.train.input_ids} & {tuple(ids) for ids in task.test.input_ids}
    assert task.drawn(0, 5) == task.drawn(0, 9)[:5] != task.drawn(1, 5)
    (_, batch), *_ = task.test.batches(10, model.device)
    logits, labels = localize.predictions(model, batch)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    assert torch.allclose(loss, model(**batch).loss)
    # the gradients too, also those that come through what the rows share
    assert (batch["input_ids"][:, :7] == batch["input_ids"][:1, :7]).all()
    weights = [parameter for name, parameter in model.named_parameters() if "_proj" in name]
    for mine, theirs in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(model(**batch).loss, weights), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-6)

    # teach the model nothing but to answer as it does: greedy decoding is then right by exact match, and only then
    judge = localize.Judge.__new__(localize.Judge)
    judge.args, judge.device, judge.bf16, judge.eos = type("A", (), {"batch_size": 4}), model.device, False, 2
    for row, (ids, gold) in enumerate(zip(task.test.input_ids, task.test.labels, strict=True)):
        prompt = [token for token, label in zip(ids, gold, strict=True) if label == -100]
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()
        if row % 2:
            answer[row % len(answer)] = 50 if answer[row % len(answer)] != 50 else 51
        task.test.input_ids[row][:] = [*prompt, *answer]
        task.test.labels[row][:] = [-100] * len(prompt) + answer
    assert judge.evaluate(model, task)["exact_match"] == 0.5


def test_localize_choices_take_as_many_heads_from_where_they_say():
    scores = HeadScores(torch.arange(36.0).reshape(9, 4), "proxy")
    for ratio, n in ((0.01, 1), (0.1, 4), (0.3, 11)):
        sets = {name: choose(scores, ratio) for name, choose in localize.CHOICES.items()}
        assert {len(heads) for heads in sets.values()} == {n}
        assert min(sets["last"].layers) >= 6
        assert max(map(len, sets["spread"].by_layer().values())) == -(-n // 9)


def test_localize_orders_arms_such_that_a_part_is_balanced():
    args = type("Args", (), {"seeds": [0, 1], "ratios": [0.01, 0.1], "tasks": ["a", "b"], "choices": ["global"]})
    args.methods, args.lr = ["proxy", "random"], [1e-3]
    order = list(localize.arms(args))
    assert [arm.seed for arm in order] == [0] * 8 + [1] * 8
    assert [arm.ratio for arm in order[:8]] == [0.1] * 4 + [0.01] * 4
    assert [(arm.task, arm.method) for arm in order[:3]] == [("a", "proxy"), ("a", "random"), ("b", "proxy")]
    assert len({arm.file for arm in order}) == 16


def test_spearman():
    a = torch.tensor([[1.0, 2.0], [4.0, torch.nan]])
    assert localize_report.spearman(a, a.exp()) == pytest.approx(1)
    assert localize_report.spearman(a, -a) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 and 1 2 3 4, by hand
    ties = localize_report.spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4]))
    assert ties == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert localize_report.spearman(a, torch.ones(2, 2)) is None


def test_paired_differences():
    nothing = {"low": None, "high": None, "bounds": None}
    assert localize_report.paired([0.5]) == {"pairs": 1, "mean": 0.5, **nothing}
    assert localize_report.difference_text(localize_report.paired([0.5]), 1) == "+0.5"
    few = localize_report.paired([0.0, 0.5, -0.2, 0.1, 0.1])
    assert (few["low"], few["high"], few["bounds"]) == (-0.2, 0.5, "smallest and largest pair")
    assert localize_report.difference_text(few, 1) == "+0.1 (pairs: -0.2 to +0.5)"
    interval = localize_report.paired([0.0, 1.0] * 50)
    assert interval["low"] == pytest.approx(0.4, abs=0.02) and interval["high"] == pytest.approx(0.6, abs=0.02)
    assert localize_report.difference_text(interval, 1) == "+0.5 (+0.4 to +0.6)"


@pytest.mark.parametrize(("sizes", "coverage"), localize_report.COVERAGE.items())
def test_how_often_an_interval_holds_the_truth(sizes, coverage, monkeypatch):
    """Of normal differences around zero, whose seeds differ from one another, and whose targets do as much."""
    monkeypatch.setattr(localize_report, "RESAMPLES", 1000)
    n_targets, n_seeds = sizes
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(1000):
        pairs = torch.randn(n_targets, n_seeds, generator=generator)
        if n_targets > 1:
            pairs += torch.randn(n_targets, 1, generator=generator)
        found = localize_report.paired(pairs.flatten().tolist())
        held += found["low"] <= 0 <= found["high"]
    assert held / 10 == pytest.approx(coverage, abs=3)


def test_a_rented_processor_is_known_by_its_numbers(tmp_path, monkeypatch):
    """Two kinds go by one name, of which one is half as fast again: seconds are compared within a kind."""
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(environment, "Path", lambda _: cpuinfo)
    monkeypatch.setattr(environment.platform, "processor", lambda: "a processor")
    assert environment.machine()["cpu"] == "a processor"
    of_each = "processor\t: {}\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\nflags\t\t: fpu: vme\n\n"
    cpuinfo.write_text("".join(of_each.format(number, 17) for number in range(2)))
    assert environment.machine()["cpu"] == "AMD EPYC (family 25, model 17)"
    cpuinfo.write_text("Features\t: fp asimd\n")  # as on Arm, whose processors have no name there
    assert environment.machine()["cpu"] == "a processor"
    cpuinfo.write_text("model name\t: A CPU\n")
    assert environment.machine()["cpu"] == "A CPU"


def test_command_names_no_folder():
    arguments = ["--model", "/a/b/model", "--train=/a/c.jsonl", "--output", "d/out", "--lr", "0.002"]
    assert environment.command("x.py", arguments) == (
        "python benchmarks/x.py --model model --train=c.jsonl --output out --lr 0.002"
    )
    arguments = ["--dataset", "openai/gsm8k=../a/gsm8k", "--only", "affinity:proxy/fifth", "own gsm8k random/robin"]
    assert environment.command("x.py", arguments) == (
        "python benchmarks/x.py --dataset openai/gsm8k=gsm8k --only affinity:proxy/fifth 'own gsm8k random/robin'"
    )


# -- selection_cost.py


def test_selection_cost_compares_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(selection_engine, "SAMPLE_ROWS", 10)  # so that some rows are of the sample and others are not
    given, time_rounds = {}, selection_cost.time_rounds

    def watched(arms, *args):
        for name in ("forward", "unsorted"):
            with monkeypatch.context() as patch:
                patch.setattr(selection_cost, "forward", lambda _, batches, name=name: given.update({name: batches}))
                arms[name]()
        found = selection_cost.seen_batches(whole[0], arms["affinity"])
        assert len(found) == len(given["forward"])
        for a, b in zip(found, given["forward"], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
        return time_rounds(arms, *args)

    whole, load = [], selection_cost.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        selection_cost.AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **kwargs: whole.append(load(*args, **kwargs)) or whole[0],
    )
    monkeypatch.setattr(selection_cost, "time_rounds", watched)
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pool.json").write_text("\n".join(map(json.dumps, rows(40, seed=0))))
    options = ["--model", f"{tmp_path}/model", "--pool", f"{tmp_path}/pool.json", "--rounds", "2", "--rows", "24"]
    options += ["--prompt", "prompt", "--completion", "completion", "--depth", "0.5", "--batch-size", "4"]
    numbers = selection_cost.main([*options, "--output", f"{tmp_path}/out.json"])
    assert json.loads((tmp_path / "out.json").read_text()) == numbers
    assert numbers["layers"] == "2 of 4" and numbers["rows"] == 24
    assert numbers["tokens"] <= numbers["padded_tokens_bucketed"] < numbers["padded_tokens_unsorted"]
    assert all(len(values) == 2 for values in numbers["seconds"].values())
    # the batches are the pool's and the target's rows, each once
    assert sum(sum(batch["attention_mask"].sum(1).tolist()) for batch in given["forward"]) == sum(
        sum(batch["attention_mask"].sum(1).tolist()) for batch in given["unsorted"]
    )
    assert sum(len(batch["input_ids"]) for batch in given["forward"]) == 24 + 8
    # the model that is cut off computes what the whole one does up to there
    model = tiny_model(num_hidden_layers=4)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2]
        cut = selection_cost.cut_off(model, 1)
        cut.norm = torch.nn.Identity()
        assert torch.equal(cut(input_ids=ids).last_hidden_state, hidden)
    assert len(model.model.layers) == 4


# -- localize_cost.py


def test_localize_cost_counts_in_samples_of_full_fine_tuning(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows(40, seed=0))))
    ran = []

    def time_rounds(arms, rounds, seed):
        for name, arm in arms.items():
            ran.append((name, arm()))
        return {name: [2.0, 4.0] if name == "full" else [1.0, 3.0] for name in arms}

    monkeypatch.setattr(localize_cost, "time_rounds", time_rounds)
    options = [
        "--model",
        f"{tmp_path}/model",
        "--train",
        f"{tmp_path}/train.jsonl",
        "--samples",
        "12",
        "--rounds",
        "2",
    ]
    found = localize_cost.main([*options, "--methods", "gate", "proxy", "--output", f"{tmp_path}/out.json"])
    assert [name for name, _ in ran] == ["full", "gate", "proxy"]
    assert ran[1][1].n_samples == ran[2][1].n_samples == found["samples"] == 12
    assert found["samples of full fine-tuning"] == {"gate": 0.625 * 12, "proxy": 0.625 * 12}
    assert json.loads((tmp_path / "out.json").read_text()) == found


def test_full_steps_train_all_weights_of_a_copy():
    model, batch = tiny_model(), random_batch()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = localize_cost.full_steps(model, [batch, batch])
    trained = steps.func.__closure__
    copies = [cell.cell_contents for cell in trained if isinstance(cell.cell_contents, torch.nn.Module)]
    steps()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in copies[0].named_parameters())


# -- scorers.py


def test_scorers_are_asked_for_rows_of_a_task_among_wrong_ones(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    by_task = {task: [row for row in rows(60, seed=0) if row["task"] == task] for task in ("copy", "count")}
    monkeypatch.setattr(scorers, "rows_by_task", lambda seed: by_task)
    options = ["--model", f"{tmp_path}/model", "--output", f"{tmp_path}/out.json", "--target-rows", "4"]
    asked = ["--scorers", "perplexity", "bm25", "affinity"]
    numbers = scorers.main([*options, *asked, "--targets", "copy"])
    assert json.loads((tmp_path / "out.json").read_text()) == numbers
    lines = {line["scorer"]: line for line in numbers["summary"]}
    assert set(lines) == {"perplexity", "bm25", "affinity proxy", "affinity random", "affinity all"}
    assert lines["bm25"]["of_target"] > 0.5  # its tokens are letters: "copy" and "count" share some
    assert lines["perplexity"]["forward_passes"] == 1.0

    ran = []
    run = scorers.Benchmark.run
    monkeypatch.setattr(scorers.Benchmark, "run", lambda self, *arm: ran.append(arm) or run(self, *arm))
    scorers.main([*options, "--scorers", "perplexity", "length"])
    assert ran == [("length", None, "copy"), ("perplexity", None, "count"), ("length", None, "count")]
    with pytest.raises(SystemExit):
        scorers.main([*options, "--rows", "5"])


def test_wrong_answers_are_other_answers():
    given = [row for row in rows(40, seed=0) if row["task"] == "copy"]
    made = scorers.with_wrong_answers(given, 0.3, random.Random(0))
    changed = [new["completion"] != row["completion"] for new, row in zip(made, given, strict=True)]
    assert changed == [not row["right"] for row in made] and sum(changed) == 6
