"""Several processes: DDP, FSDP and ZeRO-3 train what one process trains. All on the CPU, with gloo."""

import importlib.util

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from p2d_peft.heads import ModelGeometry
from p2d_peft.tuners import HeadSparseConfig
from tests.tuners.head_sparse import distributed_workers as workers
from tests.tuners.head_sparse.distributed_workers import CASES, HEADS, Both, adapted, base_model, train, trained
from tests.tuners.head_sparse.test_model import logits


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    both = Both(str(tmp_path_factory.mktemp("group") / "store"))
    yield both
    both.close()


def assert_same(weights, expected, atol=1e-6):
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), atol=atol, rtol=1e-5, msg=name)


def one_process(case, dtype=torch.float32):
    """What training in one process gives, and a check that it moves each weight."""
    model = adapted(case, dtype)
    before = trained(model)
    train(model)
    after = trained(model)
    assert all(not torch.equal(before[name], tensor) for name, tensor in after.items())
    return after


def loaded(case, folder, dtype=torch.float32):
    model = PeftModel.from_pretrained(base_model(CASES[case][0], dtype), folder, is_trainable=True)
    return trained(model)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "llama, r=3", "gpt2"])
def test_ddp(case, both):
    expected = one_process(case)
    first, second = both(workers.ddp, case)
    assert_same(first["trained"], expected)
    assert all(torch.equal(first["trained"][name], tensor) for name, tensor in second["trained"].items())
    # the gradients of the deltas are all that is sent
    assert first["sent"] == workers.STEPS * sum(tensor.numel() for tensor in expected.values())
    assert first["buffers"] == [f"base_model.model.{n}" for n, _ in base_model(CASES[case][0]).named_buffers()]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fsdp2(case, both, tmp_path):
    expected = one_process(case)
    results = both(workers.fsdp2, case, str(tmp_path))
    assert_same(loaded(case, tmp_path), expected)
    # each weight is on one rank
    assert [sum(sizes) for sizes in zip(*(result["local"] for result in results), strict=True)] == [
        tensor.numel() for tensor in expected.values()
    ]


@pytest.mark.slow
def test_fsdp2_takes_fp32_deltas_on_a_bf16_base(both, tmp_path):
    first, _ = both(workers.fsdp2, "llama", str(tmp_path), torch.bfloat16)
    assert first["dtypes"] == {torch.float32}
    # the activations are bf16, and rounded in another order
    assert_same(loaded("llama", tmp_path, torch.bfloat16), one_process("llama", torch.bfloat16), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shapes_of_deltas_on_a_sharded_base(name, both):
    expected = {name: tuple(tensor.shape) for name, tensor in trained(adapted(name)).items()}
    assert both(workers.attach_to_shards, name) == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize("ram_efficient", [False, True])
@pytest.mark.parametrize("peft_policy", [False, True])
def test_fsdp2_as_accelerate_prepares_it(ram_efficient, peft_policy, both, tmp_path):
    both(workers.fsdp2_by_accelerate, "llama", str(tmp_path), ram_efficient, peft_policy)
    assert_same(loaded("llama", tmp_path, torch.bfloat16), one_process("llama", torch.bfloat16), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("case", ["llama", "llama, r=3"])
def test_fsdp1_with_the_policy_of_peft(case, use_orig_params, both):
    first, second = both(workers.fsdp1, case, torch.float32, use_orig_params)
    assert_same(first, one_process(case))
    assert_same(second, first, atol=0)


@pytest.mark.slow
def test_fsdp1_takes_fp32_deltas_on_a_bf16_base(both):
    first, _ = both(workers.fsdp1, "llama", torch.bfloat16, False)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    assert_same(first, one_process("llama", torch.bfloat16), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_loads_its_own_state_dict(use_orig_params, both):
    first, second = both(workers.fsdp1_loads_what_it_saved, "llama", use_orig_params)
    expected = {name: 2 * tensor for name, tensor in adapted("llama").state_dict().items()}
    assert_same(first, expected, atol=0)
    assert_same(second, expected, atol=0)


@pytest.mark.slow
def test_tensor_parallelism_is_refused(both, tmp_path):
    """There a slice's indices would be those of other heads, or of none."""
    base_model("llama").save_pretrained(tmp_path)
    message = "`model` is split over 2 processes by tensor parallelism, and with it 'model.layers.0.self_attn.q_proj'"
    assert all(error.startswith(message) for error in both(workers.tensor_parallel, str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "llama, r=3", "gpt2"])
def test_zero3(case, both, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    base_model(CASES[case][0]).save_pretrained(tmp_path)
    first, second = both(workers.zero3, case, str(tmp_path))
    assert_same(first, one_process(case))
    assert_same(second, first, atol=0)


def emptied(model):
    """What ZeRO-3's `zero.Init` leaves of each weight: no element, and its shape beside it."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
            empty.ds_shape, empty.ds_numel = parameter.shape, parameter.numel()
            setattr(module, name, empty)
    return model


@pytest.mark.parametrize("case", CASES)
def test_shapes_of_deltas_on_emptied_weights(case):
    """They follow from the modules' features; with transformers' Conv1D (GPT-2) from what ZeRO-3 says of the weight."""
    name, fields = CASES[case]
    expected = {name: tensor.shape for name, tensor in trained(adapted(case)).items()}
    base = emptied(base_model(name))
    assert not any(parameter.numel() for parameter in base.parameters())
    assert ModelGeometry.of(base).heads == ModelGeometry.of(base_model(name)).heads
    model = get_peft_model(base, HeadSparseConfig(heads=HEADS, **fields))
    assert {name: tensor.shape for name, tensor in trained(model).items()} == expected
    assert ModelGeometry.of(model).heads == ModelGeometry.of(base_model(name)).heads


# Accelerate's hooks, also where all devices are the CPU: the weights are on the meta device between forward passes.
OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=torch.device("cpu")),
    "device_map": lambda model, folder: accelerate.dispatch_model(
        model,
        {
            "model.embed_tokens": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "disk",
            "model.norm": "cpu",
            "lm_head": "cpu",
        },
        main_device="cpu",
        offload_dir=folder,
    ),
}


@pytest.mark.parametrize("case", ["llama", "llama, r=3"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_base(offload, case, tmp_path):
    expected = adapted(case)
    base = OFFLOADS[offload](base_model("llama"), str(tmp_path / "base"))
    assert base.model.layers[1].self_attn.q_proj.weight.is_meta
    torch.manual_seed(1)
    model = get_peft_model(base, HeadSparseConfig(heads=HEADS, init_weights=False, **CASES[case][1])).eval()
    # not on the meta device, where the weights of their base layers are
    assert_same(trained(model), trained(expected), atol=0)
    train(expected)
    train(model)
    assert_same(trained(model), trained(expected))

    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter")), want)
    offloaded = OFFLOADS[offload](base_model("llama"), str(tmp_path / "other"))
    assert torch.equal(logits(PeftModel.from_pretrained(offloaded, tmp_path / "adapter")), want)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, atol=1e-5, rtol=1e-4)
