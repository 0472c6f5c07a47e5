import pytest
import torch

from p2d_peft.heads import localize_heads
from p2d_peft.heads.trained import LEARNING_RATE, STEPS

from ..model_checks import assert_unchanged, snapshot
from ..tiny_models import LAYOUTS, random_batch, tiny_model
from .plain_gradients import mean_loss, slices


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_follows_adamw_on_the_slices_step_by_step(name):
    """Against AdamW on whole weights with the other heads' gradients masked out; samples 2 and 4 are held out."""
    batch = random_batch(rows=5)
    train, held_out = ({key: value[rows] for key, value in batch.items()} for rows in ([0, 2, 4], [1, 3]))
    batches = [{key: value[rows] for key, value in batch.items()} for rows in ([0, 1, 2], [3, 4])]
    scores = localize_heads(LAYOUTS[name].model(), batches, method="trained").values
    for head in [(0, 0), (1, 2)]:
        model = LAYOUTS[name].model()
        before, parts = mean_loss(model, held_out), slices(model, *head)
        masks = {id(weight): torch.zeros_like(weight) for weight, _ in parts}
        for weight, part in parts:
            masks[id(weight)][part] = 1
        weights = list({id(weight): weight for weight, _ in parts}.values())
        optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for row in range(3):
                (model(**{key: value[row : row + 1] for key, value in train.items()}).loss / 3).backward()
            for weight in weights:
                weight.grad *= masks[id(weight)]
            optimizer.step()
        assert float(scores[head]) == pytest.approx(before - mean_loss(model, held_out), rel=2e-2, abs=2e-6)


def test_a_head_that_training_cannot_reach_scores_nothing():
    model = tiny_model("llama-mha-bias")
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        for parameter in (attention.v_proj.weight, attention.v_proj.bias, attention.o_proj.weight.T):
            parameter[24:36] = 0  # head 2 of 4, D = 12
    scores = localize_heads(model, [random_batch(rows=4)], method="trained").values
    assert scores[1, 2] == 0 and (scores != 0).sum() == 11


def test_training_on_what_is_held_out_helps_every_head():
    """Each sample twice, so that the held-out half is the half that is trained on."""
    batch = {key: value.repeat_interleave(2, dim=0) for key, value in random_batch().items()}
    assert (localize_heads(tiny_model(), [batch], method="trained").values > 0).all()


def test_bf16_models_move_and_come_back():
    model = tiny_model(dtype=torch.bfloat16)
    before = snapshot(model)
    scores = localize_heads(model, [random_batch()], method="trained").values
    assert_unchanged(model, before)
    assert (scores != 0).any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_moves_under_autocast(name):
    """autocast keeps copies of weights for a whole context, which would hide what training does to them."""
    batch = {key: value.repeat_interleave(2, dim=0) for key, value in random_batch(rows=8).items()}
    exact = localize_heads(LAYOUTS[name].model(), [batch], method="trained").values
    with torch.autocast("cpu", torch.bfloat16):
        rounded = localize_heads(LAYOUTS[name].model(), [batch], method="trained").values
    assert torch.corrcoef(torch.stack([rounded.flatten(), exact.flatten()]))[0, 1] > 0.8


def test_needs_two_samples():
    with pytest.raises(ValueError, match=r"'trained' holds every other sample out, .* give at least two"):
        localize_heads(tiny_model(), [random_batch(rows=1)], method="trained")
