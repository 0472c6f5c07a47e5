import pytest
import torch

from p2d_peft.heads import localize_heads

from ..tiny_models import FEW, LAYOUTS, tiny_model
from .plain_gradients import heads_of, slices, table


@pytest.mark.parametrize("name", [*FEW, "gpt2"])
def test_is_the_norm_of_the_slices(name):
    model = LAYOUTS[name].model()
    expected = {
        head: torch.cat([weight.detach()[part].flatten() for weight, part in slices(model, *head)]).double().norm()
        for head in heads_of(model)
    }
    torch.testing.assert_close(localize_heads(model, [], method="magnitude").values, table(model, expected))


def test_reads_no_batch():
    def batches():
        raise AssertionError("a batch is read")
        yield

    assert localize_heads(tiny_model(), batches(), method="magnitude").n_samples is None
