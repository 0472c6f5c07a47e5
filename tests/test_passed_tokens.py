import pytest
import torch

from p2d_peft.passed_tokens import passed_tokens

from .tiny_models import random_batch, tiny_model


def test_counts_what_passes_and_nothing_else():
    model, ids = tiny_model(), torch.ones(2, 5, dtype=torch.long)
    with passed_tokens(model) as count:
        assert count() == 0
        model(**random_batch(padding=2))  # 22 positions
        assert count() == 20
        model(ids)
        model(input_ids=ids)
        model(inputs_embeds=model.get_input_embeddings()(ids))
        assert count() == 20 + 30
    model(ids)
    assert count() == 50
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


def test_what_comes_from_a_cache_does_not_pass():
    model = tiny_model()
    cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    with passed_tokens(model) as count:
        model(
            input_ids=torch.ones(1, 3, dtype=torch.long),
            attention_mask=torch.tensor([[1] * 5 + [1, 1, 0]]),
            past_key_values=cache,
            use_cache=True,
        )
        assert count() == 2
        prompt = torch.ones(1, 4, dtype=torch.long)
        model.generate(input_ids=prompt, min_new_tokens=3, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert count() == 2 + 4 + 2


def test_a_pass_that_ends_early_counts():
    class EnoughError(Exception):
        pass

    def stop(*args):
        raise EnoughError

    model = tiny_model()
    model.model.layers[0].register_forward_pre_hook(stop)
    with passed_tokens(model) as count:
        with pytest.raises(EnoughError):
            model(torch.ones(1, 5, dtype=torch.long))
        assert count() == 5
