import pytest
import torch

from p2d_peft.heads import HeadSet
from p2d_peft.selection.head_outputs import captured_head_outputs

from ..model_checks import assert_unchanged, mixed_state, snapshot
from ..tiny_models import ARCHITECTURES, random_batch, tiny_model


def inputs(**kwargs):
    batch = random_batch(**kwargs)
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_are_the_columns_of_the_output_projections_input(name):
    model, batch = tiny_model(name), inputs(padding=2)
    seen = {}
    handles = [
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, layer=layer: seen.update({layer: args[0]})
        )
        for layer in (0, 2)
    ]
    with torch.no_grad():
        model(**batch)
        for handle in handles:
            handle.remove()
        with captured_head_outputs(model, HeadSet([(2, 3), (0, 1), (2, 0)])) as head_outputs:
            outputs = head_outputs(batch)
    by_head = {layer: x.unflatten(-1, (4, -1)) for layer, x in seen.items()}
    expected = torch.stack([by_head[0][:, :, 1], by_head[2][:, :, 0], by_head[2][:, :, 3]], dim=2)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


def test_the_pass_ends_in_the_deepest_layer():
    model = tiny_model()
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    with torch.no_grad(), captured_head_outputs(model, HeadSet([(0, 0), (1, 2)])) as head_outputs:
        head_outputs(inputs())
    assert ran == [0]


def test_the_model_is_left_alone_also_after_an_exception():
    model = mixed_state(tiny_model())
    before = snapshot(model)
    with captured_head_outputs(model, HeadSet([(1, 2)])) as head_outputs:
        head_outputs(inputs())
    assert_unchanged(model, before)
    with pytest.raises(IndexError), captured_head_outputs(model, HeadSet([(1, 2)])) as head_outputs:
        head_outputs({"input_ids": torch.tensor([[10_000]])})
    assert_unchanged(model, before)


def test_a_real_error_is_not_swallowed():
    model = tiny_model()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with (
        pytest.raises(ZeroDivisionError),
        torch.no_grad(),
        captured_head_outputs(model, HeadSet([(1, 2)])) as head_outputs,
    ):
        head_outputs(inputs())
