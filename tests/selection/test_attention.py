import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from p2d_peft.heads import HeadSet
from p2d_peft.selection.attention import observable_attention

from ..model_checks import assert_unchanged, mixed_state, snapshot
from ..tiny_models import ARCHITECTURES, random_batch, tiny_model


HEADS = HeadSet([(0, 1), (2, 0), (2, 3)])
# eager attention of Gemma 2 caps its logits, which SDPA cannot
SDPA = [name for name in ARCHITECTURES if name != "gemma2"]


@pytest.mark.parametrize("name", SDPA)
def test_observes_what_eager_attention_computes(name):
    batch = random_batch(tokens=13, padding=3)
    eager = tiny_model(name, attn_implementation="eager")
    model = tiny_model(name)
    seen = {}
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True)
        plain = model(**batch).logits
        with observable_attention(model, HEADS) as observing:
            with observing(5, lambda layer, weights: seen.update({layer: weights})):
                observed = model(**batch).logits
            shown = dict(seen)
            model(**random_batch(seed=1))  # no longer observed
            assert all(seen[layer] is shown[layer] for layer in seen)
    assert seen.keys() == {0, 2}
    torch.testing.assert_close(observed, plain, rtol=0, atol=0)
    for layer, heads in HEADS.by_layer().items():
        # rows of padding attend to nothing that counts, and implementations differ in them
        for row, kept in ((0, slice(8, 13)), (1, slice(8, 10))):
            torch.testing.assert_close(
                seen[layer][row, :, : kept.stop - 8],
                expected.attentions[layer][row, heads][:, kept],
                rtol=1e-4,
                atol=1e-5,
            )


def test_the_attention_implementation_comes_back_also_after_an_exception():
    for implementation in ("sdpa", "eager"):
        model = mixed_state(tiny_model(attn_implementation=implementation))
        before = snapshot(model)
        assert before["attention"] == implementation
        with observable_attention(model, HEADS) as observing, observing(1, lambda *_: None):
            assert model.config._attn_implementation != implementation
            model(**random_batch())
        assert_unchanged(model, before)
        with (
            pytest.raises(ZeroDivisionError),
            observable_attention(model, HEADS) as observing,
            observing(1, lambda *_: 1 / 0),
        ):
            model(**random_batch())
        assert_unchanged(model, before)


def test_each_part_gets_its_own_attention_implementation_back():
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={**sizes, "vocab_size": 96, "num_key_value_heads": 2, "head_dim": 16},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=95,
    )
    own = {"text_config": "sdpa", "vision_config": "eager"}
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=own)

    def implementations():
        return [part._attn_implementation for part in (config, config.text_config, config.vision_config)]

    config = model.config
    before = implementations()
    assert before[1:] == ["sdpa", "eager"]
    with observable_attention(model, HEADS):
        assert implementations()[1] not in before
    assert implementations() == before
    with pytest.raises(ZeroDivisionError), observable_attention(model, HEADS):
        1 / 0  # noqa: B018
    assert implementations() == before


@pytest.mark.parametrize("model", [torch.nn.Linear(1, 1), tiny_model("gemma2")], ids=["no transformer", "gemma2"])
def test_a_model_whose_attention_cannot_be_exchanged_is_refused(model):
    with (
        pytest.raises(ValueError, match=r"cannot be exchanged for SDPA; use a scorer that needs no attention weights"),
        observable_attention(model, HEADS),
    ):
        pass
