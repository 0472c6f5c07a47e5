import pytest
import torch

from p2d_peft.heads import HeadSet
from p2d_peft.heads.samples import sample_losses
from p2d_peft.selection import P2DDataSelector, influence

from ..model_checks import assert_unchanged, mixed_state, snapshot
from ..tiny_data import prompt_completion
from ..tiny_models import LAYOUTS, random_batch, tiny_model, tiny_tokenizer
from .direct import samples_of, scored


HEADS = HeadSet([(0, 1), (1, 0), (1, 3)])


def test_without_heads_nothing_changes():
    scores = scored(influence.SCORER, tiny_model(), samples_of(), heads=HeadSet()).scores
    assert (scores == 0).all()


# separate and fused projections, and one that is stored transposed
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2"])
def test_is_the_loss_of_a_model_whose_output_projections_lack_the_columns(name):
    model, without, samples = LAYOUTS[name].model(), LAYOUTS[name].model(), samples_of()
    with torch.no_grad():
        for layer, head in HEADS:
            projection = without.get_submodule(LAYOUTS[name].projections[1].replace(".1.", f".{layer}."))
            weight = projection.weight if name == "gpt2" else projection.weight.T  # (in, out)
            width = weight.shape[0] // 4
            weight[head * width : (head + 1) * width] = 0
        expected = []
        for ids, labels in zip(samples.input_ids, samples.labels, strict=True):
            row = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
            on, off = model(**row).loss, without(**row).loss
            expected.append((off - on) / on)
    scores = scored(influence.SCORER, model, samples, heads=HEADS).scores
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-3, atol=1e-6)
    assert scores.std() > 1e-4


def test_heads_are_off_in_compiled_layers_too():
    pool, scores = prompt_completion(6), []
    for is_compiled in (False, True):
        model = tiny_model()
        for layer in model.model.layers if is_compiled else ():
            layer.compile(backend="eager")
        with torch.no_grad():
            model(**random_batch())
        scores.append(P2DDataSelector(model, tiny_tokenizer(), heads=HEADS, scorer="influence").score(pool))
    assert torch.equal(*scores) and scores[0].abs().min() > 0


def test_heads_are_on_again_also_after_an_exception():
    model = mixed_state(tiny_model())
    before = snapshot(model)
    with pytest.raises(IndexError), influence.heads_off(model, HEADS):
        sample_losses(model, {"input_ids": torch.tensor([[10_000]]), "labels": torch.tensor([[1]])})
    assert_unchanged(model, before)


def test_all_heads_off_leaves_no_attention():
    """What a token is told by others comes through the heads alone."""
    model, batch = tiny_model(), random_batch()
    changed = batch["input_ids"].clone()
    changed[:, 0] += 1
    every = HeadSet((layer, head) for layer in range(3) for head in range(4))
    with torch.no_grad(), influence.heads_off(model, every):
        logits = [model(input_ids=ids).logits[:, 1:] for ids in (batch["input_ids"], changed)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
