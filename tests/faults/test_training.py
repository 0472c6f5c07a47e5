"""Bad inputs to `P2DTrainer`, and datasets that do not go together."""

import pytest
from datasets import Dataset, concatenate_datasets

from p2d_peft import HeadSet, P2DTrainer

from ..tiny_data import conversational, prompt_completion
from ..tiny_models import tiny_model
from ..trainer.test_p2d_trainer import config, trainer
from .inputs import HEADS, OF_ANOTHER_MODEL, no_template, on_meta, pool, small_vocabulary, with_nan, without_attention
from .refusal import Case, assert_refused, cases


QUICK = {"max_steps": 1, "reference_steps": 0}


def train(tmp_path, **kwargs):
    trainer(tmp_path, changes=QUICK, **kwargs).train()


def without_template(tmp_path, **kwargs):
    P2DTrainer(tiny_model(), config(tmp_path), processing_class=no_template(), **kwargs)


@cases(
    Case(
        "an empty pool", lambda out: train(out, pool=pool().select([])), ValueError, ("`train_dataset` has no rows",)
    ),
    Case(
        "an empty target",
        lambda out: train(out, target=pool().select([])),
        ValueError,
        ("`target_dataset` has no rows",),
    ),
    Case(
        "a target that is a list", lambda out: train(out, target=[{}]), TypeError, ("`target_dataset` must be", "list")
    ),
    Case(
        "a target without text",
        lambda out: train(out, target=Dataset.from_dict({"a": [1]})),
        ValueError,
        ("`target_dataset` has the columns ['a']", "`formatting_func`"),
    ),
    Case(
        "a pool with gaps",
        lambda out: train(out, pool=Dataset.from_dict({"text": ["a", None]})),
        ValueError,
        ("`train_dataset` has no value in the column 'text' in 1 of 2 rows: rows 1",),
    ),
    Case(
        "heads that are a list",
        lambda out: train(out, heads=[(0, 1)]),
        TypeError,
        ("`heads` must be a `HeadSet`", "list"),
    ),
    Case("no heads", lambda out: train(out, heads=HeadSet()), ValueError, ("`heads` is empty",)),
    Case("heads of another model", lambda out: train(out, heads=OF_ANOTHER_MODEL), ValueError, ("(77, 0)", "0 to 2")),
    Case(
        "a selector's name",
        lambda out: train(out, selector="icl"),
        TypeError,
        ("`selector`", "P2DDataSelector", "str"),
    ),
    Case(
        "no attention",
        lambda out: train(out, model=without_attention()),
        ValueError,
        ("MambaForCausalLM", "no attention"),
    ),
    Case(
        "NaN",
        lambda out: train(out, model=with_nan()),
        ValueError,
        ("`model` holds NaN", "q_proj.weight", "Load it again"),
    ),
    Case("a model on meta", lambda out: train(out, model=on_meta()), ValueError, ("meta device", "`from_pretrained`")),
    Case(
        "tokens that the model lacks, where nothing is scored by it",
        lambda out: train(out, model=small_vocabulary(), heads=HEADS, selector=None),
        ValueError,
        ("`train_dataset` holds the token id", "0 to 19", "resize_token_embeddings"),
    ),
    Case(
        "conversations without a template",
        lambda out: without_template(out, train_dataset=conversational(4)),
        ValueError,
        ("`train_dataset` holds conversations", "no chat template", "Set `chat_template`"),
    ),
    Case(
        "a target of conversations without a template",
        lambda out: without_template(out, train_dataset=pool(), target_dataset=conversational(4)),
        ValueError,
        ("`target_dataset` holds conversations", "no chat template"),
    ),
    Case(
        "an evaluation of conversations without a template",
        lambda out: without_template(out, train_dataset=pool(), eval_dataset={"a": conversational(4)}),
        ValueError,
        ("`eval_dataset['a']` holds conversations",),
    ),
)
def test_is_refused_by_name(case, tmp_path):
    assert_refused(case._replace(call=lambda: case.call(tmp_path / "out")))
    assert not list((tmp_path / "out").rglob("*.*"))


def test_what_is_evaluated_on_should_be_new(tmp_path, caplog):
    target, new = prompt_completion(6, seed=1), prompt_completion(5, seed=2)
    evaluated = {
        "seen": concatenate_datasets([pool().select([3, 3, 7]), new]),
        "target": concatenate_datasets([target.select([0]), new]),
        "new": new,
    }
    train(tmp_path, pool=pool(), target=target, eval_dataset=evaluated)
    warnings = [record.getMessage() for record in caplog.records if "rows of `eval_dataset" in record.getMessage()]
    assert len(warnings) == 2
    assert warnings[0].startswith("3 of the 8 rows of `eval_dataset['seen']` are in `train_dataset`, too")
    assert "Leave them out of one of the two." in warnings[0]
    assert warnings[1].startswith("1 of the 6 rows of `eval_dataset['target']` are in `target_dataset`, too")
    assert "Give other samples of the task as the target." in warnings[1]


def test_datasets_that_do_go_together_are_passed_over_in_silence(tmp_path, caplog):
    for target, evaluated in ((pool().select(range(6)), prompt_completion(5, seed=2)), (None, None)):
        train(tmp_path, pool=pool(), target=target, eval_dataset=evaluated)
    streamed = prompt_completion(24).to_iterable_dataset()  # cannot be looked at
    train(tmp_path, pool=pool(), eval_dataset=streamed)
    assert "eval_dataset" not in caplog.text


@pytest.mark.parametrize("share", [1e-9, 1])
def test_the_smallest_and_the_largest_share_train(share, tmp_path):
    run = trainer(tmp_path, changes={**QUICK, "head_ratio": share, "data_ratio": share})
    run.train()
    assert (len(run.heads), len(run.train_dataset)) == ((1, 1) if share < 1 else (12, 32))
