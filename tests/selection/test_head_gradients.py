import pytest
import torch
import transformers
from torch.nn import functional

from p2d_peft.heads import HeadSet, ModelGeometry
from p2d_peft.heads.geometry import ROLES
from p2d_peft.selection.head_gradients import ProjectedGradient, head_gradients, whole_gradient

from ..model_checks import snapshot
from ..tiny_models import LAYOUTS, random_batch, tiny_model
from .direct import samples_of


HEADS = HeadSet([(0, 1), (1, 0), (1, 3)])
ONE_LAYER = HeadSet([(1, 0), (1, 3)])


def frozen(model):
    return model.requires_grad_(False)


def batch_of(**kwargs):
    return random_batch(rows=3, tokens=13, padding=4, **kwargs)


def gradients(model, heads, batch, of_slice=whole_gradient):
    with torch.no_grad(), head_gradients(frozen(model), heads, of_slice) as gradients_of:
        return gradients_of(batch)


def by_autograd(model, heads, batch):
    """One backward pass a sample, without its padding, through the weights themselves."""
    model.requires_grad_(True)
    geometry, rows = ModelGeometry.of(model), []
    for row in range(len(batch["input_ids"])):
        kept = batch["attention_mask"][row].bool()
        model.zero_grad()
        model(**{name: batch[name][row][kept][None] for name in ("input_ids", "labels")}).loss.backward()
        parts = []
        for layer, chosen in heads.by_layer().items():
            for role in ROLES:
                module = model.get_submodule(geometry[layer].units(role).module)
                gradient = module.weight.grad
                if isinstance(module, transformers.pytorch_utils.Conv1D):
                    gradient = gradient.T
                slices = {s.start: s for s in (geometry[layer].head_slice(role, head) for head in chosen)}
                dim = 1 if role == "o" else 0
                units = [gradient[:, s] if dim else gradient[s] for _, s in sorted(slices.items())]
                parts.append(torch.cat(units, dim=dim).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


# GQA, biases, norms of q and k, a fused projection, one that is stored transposed, one by groups, latent attention,
# gated queries in a hybrid with linear attention
@pytest.mark.parametrize(
    "name", ["llama", "llama-mha-bias", "qwen3", "gemma3", "phi3", "gpt2", "falcon-gqa", "deepseek-v3", "qwen3.5"]
)
def test_are_those_of_one_backward_pass_a_sample(name):
    heads = ONE_LAYER if name == "qwen3.5" else HEADS
    batch = batch_of()
    expected = by_autograd(LAYOUTS[name].model(), heads, batch)
    got = gradients(LAYOUTS[name].model(), heads, batch)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got @ got.T, expected @ expected.T, rtol=1e-4, atol=1e-6)
    assert (expected.norm(dim=1) > 1e-3).all()


def test_padding_and_the_other_samples_of_a_batch_do_not_matter():
    model, batch = tiny_model(), batch_of()
    together = gradients(model, HEADS, batch)
    longer = {
        name: functional.pad(value, (0, 5), value=-100 if name == "labels" else 0) for name, value in batch.items()
    }
    torch.testing.assert_close(gradients(model, HEADS, longer), together, rtol=1e-4, atol=1e-7)
    for row in range(3):
        alone = gradients(model, HEADS, {name: value[[row]] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-7)


def test_projection_keeps_cosines():
    """12 slices at 16 x 16: cosines are off by 0.1 in the root mean square, and by nothing on average."""
    model = tiny_model("llama-mha-bias", hidden_size=96)
    heads = ModelGeometry.of(model).heads
    batches = [batch for _, batch in samples_of().batches(8, torch.device("cpu"))]

    def cosines(of_slice):
        found = torch.cat([gradients(model, heads, batch, of_slice) for batch in batches])
        return functional.normalize(found, dim=1) @ functional.normalize(found, dim=1).T

    exact = cosines(whole_gradient)
    errors = torch.stack([cosines(ProjectedGradient(16, 16, seed)) - exact for seed in range(4)])
    assert errors.square().mean().sqrt() < 0.1
    assert errors.mean().abs() < 0.02
    assert exact.std() > 0.2


def test_projections_are_seeded_and_leave_small_sides_alone():
    model, batch = tiny_model(), batch_of()
    a, b, other = (gradients(model, HEADS, batch, ProjectedGradient(4, 8, seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, other)
    assert a.shape == (3, 8 * 4 * 8)  # of 2 layers
    whole = gradients(model, HEADS, batch)
    assert torch.equal(gradients(model, HEADS, batch, ProjectedGradient(1000, 1000, 0)), whole)


def test_the_backward_pass_ends_in_the_lowest_layer_and_no_weight_gets_a_gradient():
    model = frozen(tiny_model())
    before, requires = snapshot(model), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: requires.append(output.requires_grad))
    before = snapshot(model)
    gradients(model, HeadSet([(1, 2)]), batch_of())
    assert requires == [False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert snapshot(model)["hooks"] == before["hooks"]


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt")
@pytest.mark.parametrize(
    "scheme",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        {"load_in_8bit": True},
    ],
)
def test_quantized_weights_will_do(scheme, tmp_path):
    pytest.importorskip("bitsandbytes")
    # blocks of 64 weights: the hidden size is a multiple of that
    exact = tiny_model("llama-mha-bias", hidden_size=64, intermediate_size=128)
    exact.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**scheme)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    got, expected = (gradients(m, HEADS, batch_of()) for m in (model, exact))
    assert (functional.cosine_similarity(got, expected, dim=1) > 0.95).all()
