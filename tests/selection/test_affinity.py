"""`affinity` against its definition, row by row, with nothing shared with the scorer."""

import torch
from torch.nn.functional import normalize

from p2d_peft import P2DDataSelector
from p2d_peft.heads import HeadSet
from p2d_peft.selection.affinity import SCORER

from ..tiny_data import prompt_completion
from ..tiny_models import tiny_model, tiny_tokenizer
from .direct import samples_of, scored


HEADS = HeadSet([(0, 1), (1, 0), (1, 3)])


def directly(model, rows):
    """Each row's features, one pass a row: what goes into the output projections, of the heads and the counted tokens alone."""
    tokenizer, inputs = tiny_tokenizer(), {}
    head_dim = model.config.head_dim
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, number=number: inputs.update({number: args[0][0]})
        )
        for number, layer in enumerate(model.model.layers)
    ]
    features = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + "</s>")["input_ids"]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        of_heads = []
        for layer, head in HEADS:
            outputs = inputs[layer][:, head * head_dim : (head + 1) * head_dim]
            # the positions that predict the completion's tokens and the end token
            of_heads.append(normalize(outputs[len(prompt) - 1 : -1].mean(dim=0), dim=0))
        features.append(torch.cat(of_heads))
    for handle in handles:
        handle.remove()
    return torch.stack(features)


def test_affinity_equals_its_definition():
    model, pool, target = tiny_model(), prompt_completion(), prompt_completion(4, seed=1)
    of_pool, of_target = directly(model, pool), directly(model, target)
    centre = of_pool.mean(dim=0)
    expected = torch.cosine_similarity(of_pool - centre, (of_target.mean(dim=0) - centre)[None]).double()
    selector = P2DDataSelector(model, tiny_tokenizer(), heads=HEADS, target=target, scorer="affinity")
    torch.testing.assert_close(selector.score(pool), expected, rtol=1e-4, atol=1e-5)
    # what the definition says is not to be had without one of its parts
    uncentred = torch.cosine_similarity(of_pool, of_target.mean(dim=0)[None]).double()
    assert (uncentred - expected).abs().max() > 0.1


def test_each_of_the_targets_samples_has_its_own_similarity():
    model, pool, target = tiny_model(), prompt_completion(), prompt_completion(4, seed=1)
    of_pool, of_target = directly(model, pool), directly(model, target)
    centre = of_pool.mean(dim=0)
    expected = normalize(of_pool - centre, dim=1) @ normalize(of_target - centre, dim=1).T
    samples = samples_of(pool)
    found = scored(SCORER, model, samples, sample=samples, target=samples_of(target), heads=HEADS)
    torch.testing.assert_close(found.per_target, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.features, of_pool - centre, rtol=1e-4, atol=1e-5)
