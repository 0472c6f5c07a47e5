import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from p2d_peft.heads.samples import right_padded, rows_of, sample_losses, token_losses

from ..tiny_models import ARCHITECTURES, LAYOUTS, random_batch, tiny_model


ENCODERS = ("bert", "roberta", "deberta", "deberta-v2", "modernbert")
CAUSAL_LAYOUTS = [name for name, layout in LAYOUTS.items() if layout.inputs == "text" and name not in ENCODERS]


def text_to_text(row):
    labels = random_batch(rows=1, tokens=6, seed=row)["labels"]
    labels[:, 4:] = -100
    return {**random_batch(rows=1, tokens=9, seed=row), "labels": labels}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_the_losses_of_a_padded_batch_are_those_that_its_samples_have_alone(name):
    layout = LAYOUTS[name]
    model = layout.model()
    make = text_to_text if layout.inputs == "text to text" else lambda row: random_batch(1, 11 - row, seed=row)
    samples = [make(row) for row in range(3)]
    samples[0]["labels"][:, :2] = -100
    rows = [row for sample in samples for row in rows_of(sample, model)]
    with torch.no_grad():
        together = sample_losses(model, right_padded(rows))
        alone = torch.stack([model(**sample).loss for sample in samples])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *CAUSAL_LAYOUTS])
def test_the_lm_head_runs_on_what_counts_alone(name):
    """Whatever a model does with its logits afterwards: scale, bias, soft cap."""
    model, batch = LAYOUTS[name].model() if name in LAYOUTS else tiny_model(name), random_batch()
    batch["labels"][0, :3] = -100
    labels = batch["labels"][:, 1:]
    counts, seen = labels != -100, []
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
        head = model.get_output_embeddings()
        handle = head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:-1])))
        losses = token_losses(model, batch)
        handle.remove()
    assert seen == [(1, counts.sum())] and len(head._forward_pre_hooks) == 0
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_a_model_whose_head_is_no_module_has_the_same_losses(monkeypatch):
    model, batch = tiny_model(), random_batch(padding=3)
    expected = token_losses(model, batch)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(token_losses(model, batch), expected)


def test_losses_are_as_precise_as_the_logits():
    row = rows_of(random_batch(rows=1), tiny_model())[0]
    dtypes = {dtype: sample_losses(tiny_model(dtype=dtype), row).dtype for dtype in (torch.bfloat16, torch.float64)}
    assert dtypes == {torch.bfloat16: torch.float32, torch.float64: torch.float64}


def test_rows_lose_their_padding_wherever_it_is():
    batch = random_batch(rows=3, tokens=8, padding=3)
    batch["attention_mask"][0, :2] = 0
    batch["labels"][1] = -100
    rows = rows_of(batch, tiny_model())
    assert [row["input_ids"].tolist()[0] for row in rows] == [
        batch["input_ids"][0, 2:].tolist(),
        batch["input_ids"][2, :5].tolist(),
    ]
    assert all((row["attention_mask"] == 1).all() for row in rows)


def test_labels_of_an_encoder_decoder_keep_their_own_length():
    labels = torch.tensor([[5, -100, 6, -100, -100], [-100] * 5, [7, 8, 9, 10, 11]])
    batch = {**random_batch(rows=3, tokens=8, padding=2), "labels": labels}
    first, last = rows_of(batch, LAYOUTS["t5"].model())
    assert first["labels"].tolist() == [[5, -100, 6]] and first["input_ids"].shape == (1, 8)
    assert last["labels"].tolist() == [[7, 8, 9, 10, 11]] and last["input_ids"].shape == (1, 6)


def test_packed_rows_are_taken_apart():
    """As data collators without padding give them: one row, no mask, positions that start anew."""
    model, lengths = tiny_model(), (5, 1, 7)
    samples = [random_batch(rows=1, tokens=length, seed=length) for length in lengths]
    packed = {key: torch.cat([sample[key] for sample in samples], dim=1) for key in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    rows = rows_of(packed, model)
    assert [row["input_ids"].tolist() for row in rows] == [samples[i]["input_ids"].tolist() for i in (0, 2)]
    with torch.no_grad():
        expected = [float(model(**samples[i]).loss) for i in (0, 2)]
        assert [float(sample_losses(model, row)) for row in rows] == pytest.approx(expected)
    # with a mask, positions say where a padded row's tokens are
    padded = random_batch(padding=3)
    padded["position_ids"] = (padded["attention_mask"].cumsum(dim=1) - 1) * padded["attention_mask"]
    assert [row["input_ids"].shape[1] for row in rows_of(padded, model)] == [11, 8]


def test_virtual_tokens_do_not_move_the_labels():
    batch = random_batch(rows=1)
    batch["labels"][:, 0] = -100  # without virtual tokens nothing predicts it
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        torch.testing.assert_close(sample_losses(model, batch)[0], model(**batch).loss)
