import pytest
import torch

from p2d_peft.heads import ModelGeometry
from p2d_peft.heads.gates import gated

from ..model_checks import assert_unchanged, snapshot
from ..tiny_models import LAYOUTS


CASES = [(name, layer) for name, layout in LAYOUTS.items() for layer in layout.projections if layout.inputs == "text"]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_gate_scales_the_columns_of_its_head_alone(name, layer):
    layout = LAYOUTS[name]
    model = layout.model()
    before = snapshot(model)
    seen = []

    def keep(module, args):
        seen.append(args[0].unflatten(-1, (layout.n_heads, -1)))

    # hooks run in the order of their registration: one looks before the gates, one after
    projection = model.get_submodule(layout.projections[layer])
    first = projection.register_forward_pre_hook(keep)
    gates = torch.ones(2, layout.n_heads)
    gates[0, 1], gates[1, 2] = 0.5, 0
    with torch.no_grad(), gated(model, ModelGeometry.of(model), {layer: gates}):
        second = projection.register_forward_pre_hook(keep)
        model(**layout.batch())
    first.remove()
    second.remove()
    assert torch.equal(seen[1], seen[0] * gates[:, None, :, None])
    assert_unchanged(model, before)
