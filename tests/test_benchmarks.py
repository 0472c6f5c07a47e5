"""The benchmarks run, on a tiny model; and of their numbers, those that are no times hold there too."""

import json

import pytest
import torch

from p2d_peft import HeadSet

from .benchmark_files import load_benchmark
from .tiny_models import tiny_model


head_sparse_step = load_benchmark("head_sparse_step")
fused_layout = load_benchmark("fused_layout")


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


def test_all_arms_are_there(numbers):
    arms = numbers["arms"]
    where = ("anywhere", "top_third")
    assert set(arms) == {"full", "lora_r16", "shira_r16"} | {
        f"{kind}_{place}" for kind in ("floor", "head_sparse", "lora_matched") for place in where
    }
    for place in where:
        assert arms[f"floor_{place}"]["trained_parameters"] == 0
        assert arms[f"floor_{place}"]["lowest_layer"] == arms[f"head_sparse_{place}"]["lowest_layer"]
        assert (
            0
            < arms[f"lora_matched_{place}"]["trained_parameters"]
            <= arms[f"head_sparse_{place}"]["trained_parameters"]
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
