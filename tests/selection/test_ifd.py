import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from p2d_peft.selection import P2DDataSelector, ifd

from ..tiny_data import conversational, text
from ..tiny_models import tiny_model, tiny_tokenizer
from .direct import samples_of, scored


def test_is_the_loss_of_the_answer_with_and_without_its_prompt():
    model, samples = tiny_model(), samples_of()
    scores = scored(ifd.SCORER, model, samples).scores
    ratios = []
    for ids, labels in zip(samples.input_ids, samples.labels, strict=True):
        start = next(place for place, label in enumerate(labels) if label != -100)
        losses = []
        for prompt in (ids[:start], ids[:1]):
            with torch.no_grad():
                log_probs = model(torch.tensor([prompt + ids[start:]])).logits.log_softmax(-1)[0]
            answer = torch.tensor(ids[start:])
            losses.append(-log_probs[len(prompt) - 1 : -1].gather(1, answer[:, None]).mean())
        ratios.append(losses[0] / losses[1])
    torch.testing.assert_close(scores.abs(), torch.stack(ratios), rtol=1e-4, atol=0)


def test_prompts_that_do_harm_come_last(monkeypatch):
    losses = iter([torch.tensor([2.0, 1.0, 3.0, 4.5, 3.0]), torch.tensor([4.0, 4.0, 3.0, 3.0, 0.0])])
    monkeypatch.setattr(ifd, "losses_of", lambda *_: next(losses))
    scores = scored(ifd.SCORER, tiny_model(), samples_of().subset([0, 1, 2, 3, 4])).scores
    assert scores[:4].tolist() == [0.5, 0.25, -1.0, -1.5]
    assert scores.isfinite().all() and scores.argmin() == 4


@pytest.mark.parametrize("pool", [text(12), conversational(12)])
def test_rows_without_a_prompt_are_named(pool):
    selector = P2DDataSelector(tiny_model(), tiny_tokenizer(), scorer="ifd")
    with pytest.raises(ValueError, match=r"rows 0, 1, .*, 9 and 2 more\. Give prompts.*or use 'perplexity'"):
        selector.score(pool)


def test_the_assistants_turns_are_answers():
    args = SFTConfig(bf16=False, report_to="none", assistant_only_loss=True)
    scores = P2DDataSelector(tiny_model(), tiny_tokenizer(), scorer="ifd", args=args).score(conversational())
    assert scores.isfinite().all()


def test_a_smaller_model_makes_it_superfiltering():
    """The selector takes the model that scores; it need not be the one that will be trained."""
    small = tiny_model(num_hidden_layers=1)
    pool = Dataset.from_list([{"prompt": "abc", "completion": "de"}, {"prompt": "a", "completion": "defg"}])
    scores = P2DDataSelector(small, tiny_tokenizer(), scorer="ifd").score(pool)
    assert torch.equal(scores.float(), scored(ifd.SCORER, small, samples_of(pool)).scores)


def test_an_answer_alone_keeps_what_counts():
    samples = samples_of(Dataset.from_list([{"prompt": "abc", "completion": "de"}]))
    alone = ifd.answers_alone(samples)
    first, answer = samples.input_ids[0][0], samples.input_ids[0][3:]
    assert alone.input_ids == [[first, *answer]] and alone.labels == [[-100, *answer]]
