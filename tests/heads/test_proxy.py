import pytest
import torch

from p2d_peft.heads import localize_heads, proxy
from p2d_peft.heads.proxy import LEARNING_RATE, weight_shift

from ..tiny_models import random_batch, tiny_model


def slices(hidden=24, head_dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(head_dim, hidden, generator=generator) for _ in range(3)]


def test_weight_shift_equals_the_definition_on_the_full_product():
    """Against the definition: the hidden x hidden product first, then the area between the two step functions."""
    before, after = slices(), slices(seed=1)

    def distribution(w_q, w_k, w_v):
        product = (w_q.double().T @ w_k.double()) @ w_v.double().T
        return torch.softmax(product.flatten(), 0)

    p, q = distribution(*before), distribution(*after)
    support = torch.linspace(0, 1, p.numel(), dtype=torch.float64)
    expected = ((p.cumsum(0) - q.cumsum(0)).abs()[:-1] * support.diff()).sum()
    assert weight_shift(before, after) == pytest.approx(float(expected), rel=1e-9)


def test_weight_shift_is_a_distance():
    a, b, c = slices(), slices(seed=1), slices(seed=2)
    assert weight_shift(a, a) == 0
    assert weight_shift(a, b) == pytest.approx(weight_shift(b, a)) and weight_shift(a, b) > 0
    assert weight_shift(a, c) <= weight_shift(a, b) + weight_shift(b, c) + 1e-12


def test_a_head_that_the_task_cannot_move_scores_nothing():
    """With its output thrown away and its o columns at zero gradient, a head's q, k and v get no gradient."""
    model = tiny_model("llama-mha-bias")
    model.model.layers[1].self_attn.v_proj.weight.data[24:36] = 0  # head 2 of 4, D = 12
    model.model.layers[1].self_attn.v_proj.bias.data[24:36] = 0
    model.model.layers[1].self_attn.o_proj.weight.data[:, 24:36] = 0
    scores = localize_heads(model, [random_batch()], method="proxy").values
    assert scores[1, 2] == 0 and (scores > 0).sum() == 11


def test_follows_adamw_step_by_step():
    """The scores of a run of two batches are those of the same run written the plain way on the model itself."""
    batches = [random_batch(seed=1), random_batch(seed=2, padding=2)]
    plain = tiny_model()
    projections = [
        getattr(layer.self_attn, f"{role}_proj").weight
        for layer in plain.model.layers
        for role in ("q", "k", "v", "o")
    ]
    before = [weight.detach().clone() for weight in projections]
    optimizer = torch.optim.AdamW(projections, lr=LEARNING_RATE, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        plain(**batch).loss.backward()
        optimizer.step()
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for layer in range(3):
        for head in range(4):
            own, shared = slice(head * 12, head * 12 + 12), slice(head // 2 * 12, head // 2 * 12 + 12)
            parts = [(4 * layer, own), (4 * layer + 1, shared), (4 * layer + 2, shared)]
            expected[layer, head] = weight_shift(
                [before[index][rows] for index, rows in parts],
                [projections[index].detach()[rows] for index, rows in parts],
            )
    scores = localize_heads(tiny_model(), batches, method="proxy").values
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_every_step_sees_the_weights_of_the_one_before_under_autocast():
    """autocast keeps copies of weights for a whole context: the losses of one batch over and over have to fall."""
    model, losses, labels = tiny_model(), [], random_batch()["labels"][:, 1:].flatten()

    def note(module, args, output):
        # of the positions that predict something, one after the other
        losses.append(torch.nn.functional.cross_entropy(output.logits[0].float(), labels).item())

    handle = model.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        localize_heads(model, [random_batch()] * 6, method="proxy")
    handle.remove()
    assert len(set(losses)) == 6 and losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 25])
def test_rows_that_pass_one_after_the_other_give_the_step_of_the_whole_batch(at_once, dtype, monkeypatch):
    """Rows count by their tokens, also where one has none that counts."""
    batch = random_batch(rows=5, padding=4)
    batch["labels"][1, :7], batch["labels"][2] = -100, -100
    expected = localize_heads(tiny_model(dtype=dtype), [batch], method="proxy").values
    monkeypatch.setattr(proxy, "TOKENS_AT_ONCE", at_once)
    passes, model = [], tiny_model(dtype=dtype)
    model.register_forward_hook(lambda module, args, output: passes.append(output.logits.shape[1]))
    found = localize_heads(model, [batch], method="proxy").values
    assert len(passes) == (4 if at_once == 1 else 3) and sum(passes) == 10 + 4 + 10 + 6
    torch.testing.assert_close(found, expected, rtol=1e-4 if dtype == torch.float32 else 0.3, atol=0)
