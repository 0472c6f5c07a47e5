"""Arguments that cannot be, over the public API."""

import math

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from peft.utils.error import NoMatchingPeftModuleError

from p2d_peft import HeadScores, HeadSet, HeadSparseConfig, P2DConfig
from p2d_peft.efficiency import alignment_efficiency_ratio
from p2d_peft.heads import ModelGeometry, register_attention_layout
from p2d_peft.selection.policies import Diverse, LengthBetween, Quotas, WithoutNearDuplicates
from p2d_peft.tuners.head_sparse import convert_to_lora

from ..tiny_data import conversational, prompt_completion
from ..tiny_models import tiny_model
from .inputs import (
    HEADS,
    OF_ANOTHER_MODEL,
    batch,
    localize,
    model,
    no_template,
    on_meta,
    pool,
    scores,
    select,
    selector,
    sft_config,
    small_vocabulary,
    with_nan,
    without_attention,
)
from .refusal import Case, assert_refused, cases


META = ("'model.embed_tokens.weight'", "meta device", "`from_pretrained`")
NAN = ("NaN or an infinity in 'model.layers.1.self_attn.q_proj.weight'", "Load it again")
NO_ATTENTION = ("MambaForCausalLM", "no attention heads", "register_attention_layout")
VOCABULARY = ("token id", "embeddings for the ids 0 to 19", "resize_token_embeddings")
NO_TEMPLATE = ("holds conversations", "no chat template", "Set `chat_template`")

HEADS_OF = (
    Case("heads are None", lambda: HeadSet(None), TypeError, ("`heads`", "(layer, head) pairs", "None")),
    Case("heads are a mapping", lambda: HeadSet({0: [1]}), TypeError, ("`heads`", "HeadSet.from_layers")),
    Case(
        "a head twice", lambda: HeadSet([(0, 1), (0, 1)]), ValueError, ("(0, 1) more than once", "give each head once")
    ),
    Case("a head below 0", lambda: HeadSet([(0, -1)]), ValueError, ("counted from 0", "(0, -1)")),
    Case("layers are a list", lambda: HeadSet.from_layers([1]), TypeError, ("`layers` must be a mapping", "[1]")),
    Case("a layer's heads are a number", lambda: HeadSet.from_layers({0: 3}), TypeError, ("`layers`", "3 for 0")),
    Case(
        "a subfolder outside",
        lambda: HeadSet.from_pretrained(".", subfolder="../x"),
        ValueError,
        ("`subfolder`='../x'",),
    ),
    Case(
        "scores are a row", lambda: HeadScores(torch.ones(3), "x"), ValueError, ("`values`", "(layers, heads)", "(3,)")
    ),
    Case(
        "scores are infinite",
        lambda: HeadScores(torch.tensor([[math.inf]]), "x"),
        ValueError,
        ("`values`", "infinities"),
    ),
    Case(
        "no head has a score",
        lambda: HeadScores(torch.full((2, 2), math.nan), "x").top(),
        ValueError,
        ("no head has",),
    ),
    Case("a ratio of 0", lambda: scores().top(0), ValueError, ("`ratio` must be in (0, 1]", "got 0")),
    Case("a ratio that is text", lambda: scores().top("0.1"), TypeError, ("`ratio` must be a number", "'0.1'")),
    Case("a ratio that is NaN", lambda: scores().top(math.nan), ValueError, ("`ratio` must be in (0, 1]", "nan")),
    Case(
        "a number of heads that is a half", lambda: scores().top(k=2.5), TypeError, ("`k` must be an integer", "2.5")
    ),
    Case("more heads than there are", lambda: scores().top(k=13), ValueError, ("`k` must be from 1 to 12", "13")),
    Case(
        "a spread that is misspelled",
        lambda: scores().top(per_layer="evn"),
        ValueError,
        ("`per_layer`", "'even'", "'evn'"),
    ),
    Case(
        "no heads a group", lambda: scores().top(per_group=0), ValueError, ("`per_group` must be at least 1, got 0",)
    ),
    Case("compared with text", lambda: scores().compare("x"), TypeError, ("`other` must be a `HeadScores`", "str")),
    Case("the geometry of a name", lambda: ModelGeometry.of("gpt2"), TypeError, ("`model` must be a model", "str")),
    Case("a layout's name", lambda: register_attention_layout("X", "q"), TypeError, ("`layouts` must be", "str")),
    Case(
        "a negative time", lambda: alignment_efficiency_ratio({"train": -1}, 1), ValueError, ("`stage_seconds`", "-1")
    ),
)

LOCALIZING = (
    Case("localizing a name", lambda: localize("gpt2"), TypeError, ("`model`", "str", "from_pretrained")),
    Case("an unknown method", lambda: localize(method="x"), ValueError, ("`method` must be one of 'proxy'", "'x'")),
    Case("a seed that is text", lambda: localize(seed="x"), TypeError, ("`seed` must be an integer", "'x'")),
    Case("batches are text", lambda: localize(batches="abc"), TypeError, ("`batches` must be a data loader", "str")),
    Case(
        "no batches", lambda: localize(batches=[]), ValueError, ("`batches` holds no sample with a token that counts",)
    ),
    Case("batches of rows", lambda: localize(batches=pool()), ValueError, ("`batches`", "'input_ids'", "'labels'")),
    Case(
        "a batch of lists",
        lambda: localize(batches=batch(input_ids=[[1]])),
        TypeError,
        ("tensors of shape (B, T)", "[[1]]"),
    ),
    Case(
        "fewer labels than tokens",
        lambda: localize(batches=batch(labels=torch.ones(2, 3, dtype=torch.long))),
        ValueError,
        ("(2, 11)", "(2, 3)", "each token has one label"),
    ),
    Case(
        "no label counts",
        lambda: localize(batches=batch(labels=torch.full((2, 11), -100))),
        ValueError,
        ("`batches`", "a label other than -100"),
    ),
    Case("tokens that the model lacks", lambda: localize(small_vocabulary()), ValueError, ("`batches`", *VOCABULARY)),
    Case("localizing NaN", lambda: localize(with_nan()), ValueError, NAN),
    Case("localizing NaN by ablation", lambda: localize(with_nan(), method="ablation"), ValueError, NAN),
    Case("localizing on meta", lambda: localize(on_meta()), ValueError, META),
    Case("localizing on meta by gate", lambda: localize(on_meta(), method="gate"), ValueError, META),
    Case("localizing without attention", lambda: localize(without_attention()), ValueError, NO_ATTENTION),
)

SELECTING = (
    Case("an unknown scorer", lambda: selector(scorer="x"), ValueError, ("`scorer` must be one of 'affinity'", "'x'")),
    Case("a scorer that is a list", lambda: selector(scorer=[]), ValueError, ("`scorer` must be one of", "[]")),
    Case("a selector of a name", lambda: selector("gpt2"), TypeError, ("`model`", "str", "from_pretrained")),
    Case("a tokenizer's name", lambda: selector(processing_class="gpt2"), TypeError, ("`processing_class`", "str")),
    Case("selecting by no heads", lambda: selector(heads=HeadSet()), ValueError, ("`heads` is empty", "at least one")),
    Case("heads that are pairs", lambda: selector(heads=[(0, 1)]), TypeError, ("`heads` must be a `HeadSet`", "list")),
    Case("heads missing", lambda: selector(heads=None), ValueError, ("needs `heads`", "localize_heads(...).top(0.1)")),
    Case(
        "heads of another model", lambda: selector(heads=OF_ANOTHER_MODEL), ValueError, ("(77, 0)", "layers: 0 to 2")
    ),
    Case("target missing", lambda: selector(target=None), ValueError, ("needs `target`", "a few samples of the task")),
    Case(
        "a target that is a list",
        lambda: selector(target=[{}]),
        TypeError,
        ("`target` must be a `datasets.Dataset`", "list"),
    ),
    Case("an empty target", lambda: select(target=pool().select([])), ValueError, ("`target` has no rows",)),
    Case("a share of rows of 0", lambda: selector(ratio=0), ValueError, ("`ratio` must be in (0, 1], got 0",)),
    Case("a share of rows above 1", lambda: selector(ratio=1.5), ValueError, ("`ratio` must be in (0, 1], got 1.5",)),
    Case(
        "a share of rows that is text", lambda: selector(ratio="0.1"), TypeError, ("`ratio` must be a number", "'0.1'")
    ),
    Case(
        "rows that are a half",
        lambda: selector(num_samples=2.5),
        TypeError,
        ("`num_samples` must be an integer", "2.5"),
    ),
    Case("more rows than the pool", lambda: select(num_samples=99), ValueError, ("`num_samples`=99", "24 rows")),
    Case(
        "two sizes",
        lambda: selector(ratio=0.1, num_samples=3),
        ValueError,
        ("only one of `ratio`", "'num_samples': 3"),
    ),
    Case("a budget of text", lambda: selector(max_tokens="9"), TypeError, ("`max_tokens` must be an integer", "'9'")),
    Case("a batch of 0", lambda: selector(batch_size=0), ValueError, ("`batch_size` must be at least 1, got 0",)),
    Case("a policy alone", lambda: selector(policies=Diverse()), TypeError, ("`policies` must be a list", "Diverse(")),
    Case("arguments that are a dict", lambda: selector(args={}), TypeError, ("`args` must be an `SFTConfig`", "dict")),
    Case(
        "a pool that is a list",
        lambda: select([{"text": "a"}]),
        TypeError,
        ("`pool` must be a `datasets.Dataset`", "list"),
    ),
    Case("a pool of splits", lambda: select(DatasetDict(train=pool())), TypeError, ("`pool`", "DatasetDict")),
    Case("an empty pool", lambda: select(pool().select([])), ValueError, ("`pool` has no rows",)),
    Case(
        "a pool without text",
        lambda: select(Dataset.from_dict({"a": [1]})),
        ValueError,
        ("['a']", "`formatting_func`"),
    ),
    Case(
        "a pool with gaps",
        lambda: select(Dataset.from_dict({"text": ["a", None] * 2})),
        ValueError,
        ("`pool`", "'text' in 2 of 4 rows: rows 1, 3", "`pool.filter(...)`"),
    ),
    Case(
        "a pool of numbers",
        lambda: select(Dataset.from_dict({"text": [1]})),
        ValueError,
        ("`pool` must hold text", "int64"),
    ),
    Case(
        "messages that are text",
        lambda: select(Dataset.from_dict({"messages": ["a"]})),
        ValueError,
        ("`pool` must hold a list of messages", "'role' and 'content'", "string"),
    ),
    Case(
        "tokens that are text",
        lambda: select(Dataset.from_dict({"input_ids": [["a"]]})),
        ValueError,
        ("`pool` must hold integers", "'input_ids'", "string"),
    ),
    Case(
        "more labels than tokens",
        lambda: select(Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, 6, 7]]}), scorer="perplexity"),
        ValueError,
        ("3 labels for the 2 tokens of row 0", "-100"),
    ),
    Case(
        "negative tokens",
        lambda: select(Dataset.from_dict({"input_ids": [[5, -6]], "labels": [[5, 6]]}), scorer="perplexity"),
        ValueError,
        ("`pool` holds the token id -6", "0 to 95"),
    ),
    Case(
        "selecting for another vocabulary",
        lambda: select(given=small_vocabulary()),
        ValueError,
        ("`target`", *VOCABULARY),
    ),
    Case(
        "conversations without a template",
        lambda: select(conversational(4), processing_class=no_template()),
        ValueError,
        ("`pool`", *NO_TEMPLATE),
    ),
    Case(
        "a target of conversations without a template",
        lambda: select(target=conversational(4), processing_class=no_template()),
        ValueError,
        ("`target`", *NO_TEMPLATE),
    ),
    Case("selecting by NaN", lambda: select(given=with_nan()), ValueError, NAN),
    Case("selecting on meta", lambda: select(given=on_meta(), scorer="perplexity"), ValueError, META),
    Case("selecting without attention", lambda: selector(without_attention()), ValueError, NO_ATTENTION),
    Case(
        "nothing is left of a row",
        lambda: select(args=sft_config(max_length=1)),
        ValueError,
        ("No row of `target`", "`max_length`=1"),
    ),
    Case(
        "a column that is not there",
        lambda: select(policies=[Quotas("source", {"a": 0.5})]),
        ValueError,
        ("no column 'source'", "['task', 'prompt', 'completion']"),
    ),
    Case("shares that are a list", lambda: Quotas("task", ["a"]), TypeError, ("`shares` must be a mapping", "list")),
    Case("a share that is text", lambda: Quotas("task", {"a": "x"}), TypeError, ("`shares`", "'x'")),
    Case("lengths that are text", lambda: LengthBetween("a"), TypeError, ("`least` must be an integer", "'a'")),
    Case("a weight that is text", lambda: Diverse("a"), TypeError, ("`weight` must be a number in [0, 1]", "'a'")),
    Case("a threshold of 0", lambda: WithoutNearDuplicates(0), ValueError, ("`threshold` must be in (0, 1], got 0",)),
)


def attach(**config):
    return get_peft_model(tiny_model(), HeadSparseConfig(**config))


ADAPTING = (
    Case(
        "an adapter on no heads",
        lambda: HeadSparseConfig(heads={}),
        ValueError,
        ("`heads` is empty", "None for all heads"),
    ),
    Case("an adapter on text", lambda: HeadSparseConfig(heads="all"), TypeError, ("`heads` must be a HeadSet", "str")),
    Case(
        "an adapter of rank 0",
        lambda: HeadSparseConfig(r=0),
        ValueError,
        ("`r` must be an integer of at least 1", "got 0"),
    ),
    Case(
        "a rank above the slice's", lambda: attach(r=999), ValueError, ("`r` must be 1 to 48", "got 999", "`r=None`")
    ),
    Case(
        "an adapter of another model",
        lambda: attach(heads=OF_ANOTHER_MODEL),
        ValueError,
        ("(77, 0)", "layers: 0 to 2"),
    ),
    Case(
        "modules that are not there",
        lambda: attach(target_modules=["nope"]),
        NoMatchingPeftModuleError,
        ("`target_modules` ({'nope'})", "leave nothing to train"),
    ),
    Case(
        "an adapter without attention",
        lambda: get_peft_model(without_attention(), HeadSparseConfig()),
        ValueError,
        NO_ATTENTION,
    ),
    Case(
        "an adapter's name that leads elsewhere",
        lambda: get_peft_model(tiny_model(), HeadSparseConfig(heads=HEADS), adapter_name="../../up"),
        ValueError,
        ("`adapter_name`='../../up'", "leave out '/'"),
    ),
    Case(
        "LoRA of rank 0", lambda: convert_to_lora(attach(heads=HEADS), max_rank=0), ValueError, ("`max_rank`", "got 0")
    ),
    Case(
        "LoRA of no adapter",
        lambda: convert_to_lora(attach(heads=HEADS), "other"),
        ValueError,
        ("no adapter 'other'", "['default']"),
    ),
)


def p2d(**changes):
    return lambda: P2DConfig("out", bf16=False, report_to="none", **changes)


CONFIGURING = (
    Case("head_ratio of 0", p2d(head_ratio=0), ValueError, ("`head_ratio` must be in (0, 1], got 0",)),
    Case("data_ratio of 2", p2d(data_ratio=2), ValueError, ("`data_ratio` must be in (0, 1], got 2",)),
    Case("data_ratio that is text", p2d(data_ratio="0.1"), TypeError, ("`data_ratio` must be a number", "'0.1'")),
    Case("no heads a layer", p2d(heads_per_layer=0), ValueError, ("`heads_per_layer` must be at least 1, got 0",)),
    Case(
        "a target of half a sample", p2d(target_samples=0.5), TypeError, ("`target_samples` must be an integer", "0.5")
    ),
    Case("an unknown scorer to train by", p2d(scorer="x"), ValueError, ("`scorer` must be one of", "'x'")),
    Case(
        "an unknown method to train by",
        p2d(localize_method="x"),
        ValueError,
        ("`localize_method` must be one of", "'x'"),
    ),
    Case("a reference of 0 s", p2d(reference_seconds=0), ValueError, ("`reference_seconds` must be positive, got 0",)),
    Case(
        "a reference that is not there",
        p2d(reference_report="no"),
        ValueError,
        ("`reference_report`='no'", "not exist"),
    ),
    Case("a switch that is text", p2d(p2d="no"), TypeError, ("`p2d` must be True or False", "str")),
)


@cases(*HEADS_OF, *LOCALIZING, *SELECTING, *ADAPTING, *CONFIGURING)
def test_is_refused_by_name(case):
    assert_refused(case)


def test_the_smallest_share_is_one(caplog):
    assert len(scores().top(1e-9)) == len(select(ratio=1e-9, scorer="random")) == 1
    assert len(scores().top(1)) == 12 and len(select(ratio=1, scorer="random")) == 24
    assert select(prompt_completion(1))["p2d_score"][:] == [0.0]  # a pool of one row is its own mean
    assert not caplog.records


def test_a_budget_below_the_shortest_row_names_it():
    # found after scoring, as lengths are known then
    with pytest.raises(ValueError, match=r"within `max_tokens`=1 .* shortest row has 1\d tokens\. Raise `max_tokens`"):
        select(max_tokens=1, scorer="length")


def test_a_model_is_untouched_by_what_is_refused():
    before = {name: weight.clone() for name, weight in model().state_dict().items()}
    for call in (lambda: localize(batches=[]), lambda: selector(heads=None), lambda: select(num_samples=99)):
        with pytest.raises(ValueError):
            call()
    assert not hasattr(model(), "peft_config") and not model().training
    assert all(torch.equal(weight, before[name]) for name, weight in model().state_dict().items())
