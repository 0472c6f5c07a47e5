import pytest
import torch

from p2d_peft.heads.samples import right_padded, rows_of, sample_losses

from ..tiny_models import LAYOUTS, random_batch, tiny_model


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
