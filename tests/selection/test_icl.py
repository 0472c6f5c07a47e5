"""What `icl` promises beyond its definition, which test_selector.py holds against whole prompts and eager attention."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from p2d_peft import P2DDataSelector
from p2d_peft.heads import HeadSet
from p2d_peft.selection import icl, icl_scorer
from p2d_peft.selection.icl import _groups, _room, answers
from p2d_peft.selection.samples import Samples

from ..model_checks import assert_unchanged, snapshot
from ..tiny_data import prompt_completion
from ..tiny_models import LAYOUTS, tiny_model, tiny_tokenizer
from .direct import samples_of


HEADS = HeadSet([(0, 1), (1, 0), (1, 3)])


def looking_for_equal_tokens():
    """A model with a head that attends to tokens like the one it is at, however far away: head 1 of layer 0."""
    rope = {"rope_type": "default", "rope_theta": 1e12}  # all but the first dims of a head hardly turn
    sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = tiny_model(**sizes, rope_parameters=rope)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        still = torch.zeros(64, dtype=torch.bool)
        still[16:32] = still[48:] = True
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[64:128] = 0
            projection.weight[64:128][still] = torch.eye(256)[:32] * 3
    return model


@pytest.mark.parametrize("row", [0, 3, 7])
def test_a_demonstration_with_the_answer_ranks_first(row):
    words = ["aaaa", "bbbb", "cccc", "dddd", "eeee", "ffff", "gggg", "hhhh"]
    pool = Dataset.from_list([{"prompt": f"{word}:", "completion": f" {word}"} for word in words])
    target = pool.select([row])
    selector = P2DDataSelector(
        looking_for_equal_tokens(), tiny_tokenizer(), heads=HeadSet([(0, 1)]), target=target, scorer="icl"
    )
    scores = selector.score(pool)
    assert scores.argmax() == row
    assert scores[row] > 1.5 * scores[torch.arange(8) != row].max()


def test_a_metric_takes_the_place_of_the_likelihood():
    pool, target = prompt_completion(8), prompt_completion(3, seed=1)
    model = tiny_model()
    before = snapshot(model)
    seen = []

    def metric(answer, right):
        seen.append((answer, right))
        return 2.0

    def scores(scorer):
        selector = P2DDataSelector(model, tiny_tokenizer(), heads=HEADS, target=target, scorer=scorer)
        return selector.score(pool)

    double = scores(icl_scorer(metric))
    assert_unchanged(model, before)
    assert [right for _, right in sorted(seen)] and {right for _, right in seen} == {
        row["completion"].strip() for row in target
    }
    # all answers are equally good, so what is left is the attention, which is linear in the quality
    torch.testing.assert_close(scores(icl_scorer(lambda answer, right: 1.0)) * 2, double)
    assert (scores(icl_scorer(lambda answer, right: 0.0)) == 0).all()
    assert not torch.allclose(scores("icl") * 2, double)


def test_answers_are_what_the_model_generates_behind_the_demonstrations():
    demonstrations, questions = samples_of(prompt_completion(2)), samples_of(prompt_completion(2, seed=1))
    model, tokenizer = tiny_model(), tiny_tokenizer()

    class Context:
        device = torch.device("cpu")

    context = Context()
    context.model, context.tokenizer = model, tokenizer
    found = answers(context, demonstrations, questions)
    for (answer, right), row in zip(found, prompt_completion(2, seed=1), strict=True):
        assert right == row["completion"].strip()
        ids = [token for sample in demonstrations.input_ids for token in sample] + tokenizer(row["prompt"])[
            "input_ids"
        ]
        start = len(ids)
        n_right = len(tokenizer(row["completion"])["input_ids"]) + 1  # and the end token
        with torch.no_grad():
            for _ in range(2 * n_right):  # greedily, token by token
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == model.generation_config.eos_token_id:
                    break
        assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("scorer", ["icl", icl_scorer(lambda answer, right: 1.0)], ids=["likelihood", "metric"])
def test_a_prompt_has_no_more_tokens_than_the_model_has_positions(scorer, monkeypatch):
    model = LAYOUTS["gpt2"].model()  # absolute positions: there is no vector for a 65th
    pool, target = prompt_completion(20), prompt_completion(3, seed=1)
    longest = max(map(len, samples_of(target).input_ids))
    assert 8 * min(map(len, samples_of(pool).input_ids)) + longest > 64
    seen = []
    forward = type(model).forward

    def watch(self, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        seen.append(kwargs["input_ids"].shape[1] + (0 if cache is None else cache.get_seq_length()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watch)
    scores = P2DDataSelector(model, tiny_tokenizer(), heads=HEADS, target=target, scorer=scorer).score(pool)
    assert (scores > 0).all() and 32 < max(seen) <= 64

    long = Dataset.from_list([*pool, {"prompt": "a" * 70, "completion": " b"}])
    selector = P2DDataSelector(model, tiny_tokenizer(), heads=HEADS, target=target, scorer=scorer)
    with pytest.raises(ValueError, match=r"leaves \d+: too few for 1 rows of the pool, first 20 with .* `max_length`"):
        selector.score(long)


@pytest.mark.parametrize(
    ("device", "generates", "room"), [("cpu", False, 40), ("cuda", False, 40), ("cpu", True, 34), ("cuda", True, 34)]
)
def test_there_is_room_for_padding_and_for_what_is_generated(device, generates, room):
    class Context:
        model = LAYOUTS["gpt2"].model()  # 64 positions

    Context.device = torch.device(device)
    # a question of 6 tokens and an answer of 12 or of 2
    labels = [[-100] * 6 + [1] * 12, [-100] * 6 + [1] * 2]
    target = Samples([0, 1], [[1] * len(row) for row in labels], labels, 2, 0, 0)
    assert _room(Context, target, generates=generates) == room + (6 if (device, generates) == ("cpu", False) else 0)


def test_a_mixture_of_experts_that_a_trainer_told_to_balance_its_experts():
    model = tiny_model("mixtral")
    scores = []
    for told in (False, True):
        model.config.output_router_logits = told  # SFTTrainer's doing
        selector = P2DDataSelector(
            model, tiny_tokenizer(), heads=HEADS, target=prompt_completion(3, seed=1), scorer="icl"
        )
        scores.append(selector.score(prompt_completion(16)))
        assert model.config.output_router_logits is told
    assert torch.equal(*scores)


def test_groups_are_as_large_as_there_is_room_for():
    samples = samples_of(prompt_completion(20))
    lengths = [len(ids) for ids in samples.input_ids]
    order = list(range(20))[::-1]
    assert [len(group) for group in _groups(order, samples, float("inf"))] == [8, 8, 4]
    groups = _groups(order, samples, 3 * max(lengths))
    assert [index for group in groups for index in group] == order
    for group, after in itertools.pairwise(groups):
        assert sum(lengths[i] for i in group) <= 3 * max(lengths)
        assert len(group) == 8 or sum(lengths[i] for i in [*group, after[0]]) > 3 * max(lengths)


@pytest.mark.parametrize("name", ["qwen3-next", "jamba"])
def test_hybrids_are_refused_by_name_and_left_alone(name):
    model, (layer, *_) = LAYOUTS[name].model(), LAYOUTS[name].projections
    before = snapshot(model)
    selector = P2DDataSelector(
        model, tiny_tokenizer(), heads=HeadSet([(layer, 1)]), target=prompt_completion(4), scorer="icl"
    )
    with pytest.raises(ValueError, match=r"`scorer`='icl' needs attention in all layers, but layer 0 of `model` "):
        selector.score(prompt_completion())
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere2", "adapter", "trained head"])
def test_no_logits_are_made_of_the_demonstrations(name, monkeypatch):
    model = tiny_model() if name in ("adapter", "trained head") else tiny_model(name)
    if name in ("adapter", "trained head"):
        saved = ["lm_head"] if name == "trained head" else None
        config = LoraConfig(init_lora_weights=False, target_modules=["q_proj"], modules_to_save=saved)
        model = get_peft_model(model, config)
    before, sizes = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}, []

    def scores():
        pool, target = prompt_completion(16), prompt_completion(3, seed=1)
        return P2DDataSelector(model, tiny_tokenizer(), heads=HEADS, target=target, scorer="icl").score(pool)

    head = model.get_output_embeddings()
    with head.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[:2]))):
        found = scores()
    (one, questions) = sizes[:2]
    assert sizes == [one, questions] * 2 and one == (1, 1) and questions[0] == 3
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == before
    monkeypatch.setattr(icl, "head_on_counted", lambda *_: nullcontext())
    assert torch.equal(scores(), found)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_where_they_are_on(config):
    plain = tiny_model()
    model = get_peft_model(plain, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    scorer = P2DDataSelector(model, tiny_tokenizer(), HEADS, prompt_completion(3, seed=1), "icl")
    with pytest.raises(ValueError, match=r"but `model` has virtual tokens .* before each input; use 'affinity'"):
        scorer.score(prompt_completion(6))
    expected = P2DDataSelector(plain, tiny_tokenizer(), HEADS, prompt_completion(3, seed=1), "icl")
    with model.disable_adapter():
        assert torch.equal(scorer.score(prompt_completion(6)), expected.score(prompt_completion(6)))
