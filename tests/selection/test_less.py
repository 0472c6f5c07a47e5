import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional

from p2d_peft.heads.samples import sample_losses
from p2d_peft.selection import less

from ..model_checks import assert_unchanged, mixed_state, snapshot
from ..tiny_data import prompt_completion
from ..tiny_models import LAYOUTS, tiny_model
from .direct import samples_of, scored


POOL, TARGET = samples_of(prompt_completion(6)), samples_of(prompt_completion(3, seed=1))
SEED = 5


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, value in (("RANK", 2), ("N_EPOCHS", 3), ("LEARNING_RATE", 1e-2)):
        monkeypatch.setattr(less, name, value)


def run(model, batch_size=6):
    return scored(less.SCORER, model, POOL, batch_size, sample=POOL, target=TARGET, seed=SEED)


def test_is_the_cosine_of_a_step_of_adam_with_the_targets_gradient(monkeypatch):
    """Against PEFT's own wrapper and steps that AdamW itself takes; one batch an epoch, so that its order is no matter."""
    plain = tiny_model()
    torch.manual_seed(SEED)
    config = LoraConfig(r=2, lora_alpha=less.ALPHA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(plain, config).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    n_weights = sum(parameter.numel() for parameter in parameters)
    monkeypatch.setattr(less, "N_FEATURES", n_weights)
    monkeypatch.setattr(less, "GradientSketch", lambda *_: lambda vector: vector)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    (order, batch), *_ = POOL.batches(6, torch.device("cpu"))

    def flat(tensors):
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    def gradient(samples, index):
        (_, single), *_ = samples.subset([index]).batches(1, torch.device("cpu"))
        return torch.autograd.grad(sample_losses(model, single).sum(), parameters)

    def step(gradients):
        """Where AdamW would go at a learning rate of 1; put back afterwards."""
        before = [parameter.detach().clone() for parameter in parameters]
        known = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters}
        optimizer.param_groups[0]["lr"] = 1.0
        for parameter, value in zip(parameters, gradients, strict=True):
            parameter.grad = value
        optimizer.step()
        moved = flat(before) - flat(parameters)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                optimizer.state[parameter].update(known[parameter])
        return moved

    expected = torch.zeros(6, 3)
    rates = [1e-2, 1e-2 * 2 / 3, 1e-2 / 3]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        sample_losses(model, batch).mean().backward()
        optimizer.step()
        pool = torch.stack([step(gradient(POOL, index)) for index in range(6)])
        target = torch.stack([flat(gradient(TARGET, index)) for index in range(3)])
        expected += functional.cosine_similarity(pool[:, None], target[None], dim=2) * rate / sum(rates)

    got = run(tiny_model())
    torch.testing.assert_close(got.per_target, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(got.scores, expected.mean(1), rtol=1e-2, atol=1e-3)
    assert expected.std() > 0.05 and sorted(order) == list(range(6))


def test_a_sketch_keeps_cosines():
    """8,192 sums: cosines are off by 0.011 in the root mean square."""
    vectors = torch.randn(40, 30_000) + torch.randn(30_000)
    sketch = less.GradientSketch(30_000, 8192, 0, torch.device("cpu"))

    def cosines(rows):
        return functional.normalize(rows, dim=1) @ functional.normalize(rows, dim=1).T

    errors = cosines(torch.stack([sketch(vector) for vector in vectors])) - cosines(vectors)
    assert errors.square().mean().sqrt() < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_very_same_modules_are_there_afterwards(name):
    model = LAYOUTS[name].model()
    before, modules = snapshot(model), dict(model.named_modules())
    assert run(model).scores.isfinite().all()
    assert_unchanged(model, before)
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[name] is module for name, module in modules.items())
    assert not hasattr(model, "peft_config")


def test_also_after_an_exception(monkeypatch):
    model = mixed_state(tiny_model())
    before, modules = snapshot(model), dict(model.named_modules())

    def boom(*_, **__):
        raise RuntimeError("boom")

    for name, owner in (("step", torch.optim.AdamW), ("_create_and_replace", less.LoraModel)):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="boom"):
            patch.setattr(owner, name, boom)
            run(model)
        assert_unchanged(model, before)
        assert all(module is modules[name] for name, module in model.named_modules())
        assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("autocast", [False, True])
def test_the_training_takes_effect(autocast, monkeypatch):
    """Autocast would go on with its low-precision copies of the weights, were its cache not off."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained = run(tiny_model()).scores
        monkeypatch.setattr(less, "LEARNING_RATE", 1e-9)
        untrained = run(tiny_model()).scores
    assert trained.dtype == torch.float32
    assert (trained - untrained).abs().max() > 0.02


def test_a_model_with_adapters_is_refused():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"`model` has adapters already\. Merge them"):
        run(model)


def test_a_module_whose_name_ends_in_that_of_a_projection_gets_no_adapter():
    """PEFT would find "tower.layers.0.self_attn.q_proj" by "layers.0.self_attn.q_proj"."""
    model = tiny_model().model
    model.tower = torch.nn.Module()
    model.tower.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.tower.layers[0].self_attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
    modules = dict(model.named_modules())
    with less.lora_adapter(model, SEED):
        names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        assert len(names) == 12 and not any(name.startswith("tower") for name in names)
    assert all(module is modules[name] for name, module in model.named_modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_of_a_half_precision_model_is_trained_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(less, "LEARNING_RATE", 2e-5)  # the paper's, whose steps are too small for bfloat16
    model = tiny_model().to(dtype)
    with less.lora_adapter(model, SEED) as parameters:
        assert len(parameters) == 24 and {parameter.dtype for parameter in parameters} == {torch.float32}
    half, exact = run(model).scores, run(tiny_model()).scores
    assert half.isfinite().all() and {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.corrcoef(torch.stack([half, exact]))[0, 1] > 0.95


def test_an_offloaded_model_is_refused():
    with pytest.raises(ValueError, match="`scorer`='less' trains, which an offloaded `model` cannot; use 'gradient'"):
        run(cpu_offload(tiny_model(), torch.device("cpu")))
