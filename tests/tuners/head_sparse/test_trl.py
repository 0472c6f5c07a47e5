"""What TRL's trainers do with a trained adapter."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import get_peft_model

from p2d_peft.tuners import HeadSparseConfig
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.tuners.head_sparse.test_model import HEADS, logits


PREFERENCES = Dataset.from_dict({"prompt": ["ab"] * 4, "chosen": [" c"] * 4, "rejected": [" d"] * 4})
LABELS = Dataset.from_dict({"prompt": ["ab"] * 4, "completion": [" c", " d"] * 2, "label": [True, False] * 2})
PROMPTS = PREFERENCES.select_columns("prompt")
# what each takes beside the model: for its config, the data, and more
ONLINE = (
    {"num_generations": 2, "beta": 0.1},
    PROMPTS,
    {"reward_funcs": lambda completions, **_: [0.0] * len(completions)},
)
TRAINERS = {"DPO": ({}, PREFERENCES, {}), "KTO": ({}, LABELS, {}), "GRPO": ONLINE, "RLOO": ONLINE}


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trained_adapter_is_its_own_reference(name, r, tmp_path):
    """TRL copies it into an adapter "ref": the parameters with `.default.` in their names, and no others."""
    model = get_peft_model(tiny_model(), HeadSparseConfig(heads=HEADS, r=r, init_weights=False))
    trained = logits(model)
    changes, rows, more = TRAINERS[name]
    # KTO was an experiment before
    home = trl if hasattr(trl, f"{name}Trainer") else pytest.importorskip(f"trl.experimental.{name.lower()}")
    args = getattr(home, f"{name}Config")(
        str(tmp_path), per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to="none", **changes
    )
    trainer = getattr(home, f"{name}Trainer")(
        model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer(), **more
    )
    reference = trainer.model.eval()
    if "ref" not in reference.peft_config:
        pytest.skip(f"TRL {trl.__version__} takes the base model as {name}'s reference, with any adapter")
    reference.set_adapter("ref")
    assert torch.equal(logits(reference), trained)
    with reference.disable_adapter():
        assert not torch.equal(logits(reference), trained)
