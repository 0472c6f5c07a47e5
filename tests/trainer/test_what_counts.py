"""Which rows and which of their tokens count: `completion_only_loss` and `formatting_func`, as `SFTTrainer` reads them."""

import pytest
import torch
from datasets import Dataset

from p2d_peft import HeadSet, HeadSparseConfig, localize_heads

from ..tiny_data import KINDS, prompt_completion, rows
from ..tiny_models import tiny_model, tiny_tokenizer
from .plain_sft import assert_trains_as, plain_sft
from .test_p2d_trainer import trainer


HEADS = HeadSet([(0, 1), (2, 3)])
ADAPTER = HeadSparseConfig(heads=HEADS)
PACKED = {"packing": True, "packing_strategy": "bfd", "max_length": 40}
COLUMNS = ("input_ids", "labels")


def train_on_given_heads(tmp_path, kind, changes, **kwargs):
    changes = {"reference_steps": 0, "num_train_epochs": 1, "scorer": "perplexity", **changes}
    run = trainer(
        tmp_path, pool=KINDS[kind](16), target=KINDS[kind](4, seed=1), changes=changes, heads=HEADS, **kwargs
    )
    run.train()
    return run


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("completion_only_loss", [None, True, False])
@pytest.mark.parametrize("kind", ["prompt_completion", "conversational_prompt_completion", "text"])
def test_the_selected_rows_are_trained_on_as_sft_trainer_would(kind, completion_only_loss, packing, tmp_path):
    changes = {"completion_only_loss": completion_only_loss, **packing}
    run = train_on_given_heads(tmp_path, kind, changes)
    chosen = run._p2d_state.rows
    assert len(chosen) == 8
    masked = any(-100 in labels for labels in run.train_dataset["labels"])
    assert masked == (kind != "text" and completion_only_loss is not False)
    assert_trains_as(run, plain_sft(run, KINDS[kind](16).select(chosen), peft_config=ADAPTER))


@pytest.mark.parametrize("completion_only_loss", [None, True, False])
def test_switched_off_the_losses_are_those_of_sft_trainer(completion_only_loss, tmp_path):
    run = trainer(tmp_path, changes={"p2d": False, "completion_only_loss": completion_only_loss, **PACKED})
    run.train()
    assert_trains_as(run, plain_sft(run, prompt_completion(32)))


@pytest.mark.parametrize("kind", ["prompt_completion", "conversational_prompt_completion"])
def test_the_tokens_that_count_decide_the_scores(kind, tmp_path):
    scores = {}
    for completion_only_loss in (True, False):
        changes = {"completion_only_loss": completion_only_loss, "max_steps": 1}
        run = train_on_given_heads(tmp_path, kind, changes)
        model, plain = tiny_model().eval(), plain_sft(run, KINDS[kind](16))
        expected = []
        for row in plain.train_dataset:
            ids, labels = (torch.tensor([row[column]]) for column in COLUMNS)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            expected.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100).item())
        scores[completion_only_loss] = run.selector.scores.tolist()
        assert scores[completion_only_loss] == pytest.approx(expected, rel=1e-5)
        best = sorted(range(16), key=lambda row: -expected[row])[:8]
        assert run._p2d_state.rows == sorted(best)
    assert scores[True] != pytest.approx(scores[False], rel=1e-2)


def test_the_tokens_that_count_decide_the_heads(tmp_path):
    scores = {}
    for completion_only_loss in (True, False):
        changes = {"completion_only_loss": completion_only_loss, "max_steps": 1, "reference_steps": 0}
        run = trainer(tmp_path, changes={**changes, "localize_method": "taylor", "target_samples": 6})
        run.train()
        prepared = plain_sft(run, prompt_completion(6, seed=1)).train_dataset.shuffle(seed=run.args.seed)
        # one sample a batch, so that nothing is padded
        batches = [{column: torch.tensor([row[column]]) for column in COLUMNS} for row in prepared]
        expected = localize_heads(tiny_model(), batches, "taylor", seed=run.args.seed)
        scores[completion_only_loss] = run.head_scores.values
        torch.testing.assert_close(scores[completion_only_loss], expected.values, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(scores[True], scores[False], rtol=1e-2)


def questions(n=16, seed=0):
    """Rows of a user, in columns that `SFTTrainer` knows nothing of."""
    return Dataset.from_list(
        [
            {"number": number, "question": row["prompt"], "answer": row["completion"], "task": row["task"]}
            for number, row in enumerate(rows(n, seed))
        ]
    )


def as_text(row):
    return f"{row['task']} {row['question']} ={row['answer']}"


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("completion_only_loss", [None, False])
def test_a_formatting_func_makes_the_text_of_pool_and_target(completion_only_loss, packing, tmp_path):
    changes = {"reference_steps": 0, "num_train_epochs": 1, "completion_only_loss": completion_only_loss, **packing}
    given = {"pool": questions(), "target": questions(4, seed=1), "formatting_func": as_text, "heads": HEADS}
    run = trainer(tmp_path, changes=changes, **given)
    decode = tiny_tokenizer().decode
    assert [decode(ids) for ids in run.target_dataset["input_ids"]] == [
        as_text(row) + "</s>" for row in questions(4, seed=1)
    ]
    run.train()
    chosen = run._p2d_state.rows
    assert len(chosen) == 8
    assert_trains_as(run, plain_sft(run, questions().select(chosen), peft_config=ADAPTER, formatting_func=as_text))


def test_the_selected_rows_keep_the_users_columns_and_order(tmp_path):
    changes = {"reference_steps": 0, "max_steps": 1}
    given = {"pool": questions(), "target": questions(4, seed=1), "formatting_func": as_text}
    run = trainer(tmp_path, changes=changes, **given)
    whole = plain_sft(run, questions(), formatting_func=as_text).train_dataset
    run.train()
    chosen = run._p2d_state.rows
    assert chosen == sorted(chosen) == run.train_dataset["number"][:]
    assert run.train_dataset.column_names == whole.column_names
    assert run.train_dataset.to_list() == whole.select(chosen).to_list()


def test_a_formatting_func_with_p2d_switched_off_is_that_of_sft_trainer(tmp_path):
    run = trainer(tmp_path, pool=questions(), formatting_func=as_text, changes={"p2d": False, "num_train_epochs": 1})
    run.train()
    assert_trains_as(run, plain_sft(run, questions(), formatting_func=as_text))


@pytest.mark.parametrize("p2d", [True, False])
@pytest.mark.parametrize(("pool", "completion_only_loss"), [(questions, True), (prompt_completion, None)])
def test_a_formatting_func_and_completion_only_loss_exclude_each_other_as_there(
    pool, completion_only_loss, p2d, tmp_path
):
    changes = {"p2d": p2d, "completion_only_loss": completion_only_loss}
    with pytest.raises(ValueError, match="formatting function was provided while `completion_only_loss=True`"):
        trainer(tmp_path, pool=pool(8), target=pool(4, seed=1), changes=changes, formatting_func=str)
