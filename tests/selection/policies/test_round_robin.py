import pytest
import torch

from p2d_peft.selection.policies import RoundRobin

from .rankings import ranking


def by_definition(rows, per_target, turns):
    left, picked = sorted(rows), []
    for turn in range(min(turns, len(rows))):
        values = per_target[:, turn % per_target.shape[1]]
        picked.append(max(left, key=lambda row: (values[row], -row)))
        left.remove(picked[-1])
    return picked + [row for row in rows if row not in picked]


@pytest.mark.parametrize("wanted", [1, 2, 7, 19, 20, 30])
def test_equals_the_definition_with_many_ties(wanted):
    generator = torch.Generator().manual_seed(wanted)
    per_target = torch.randint(0, 5, (30, 3), generator=generator).float()
    rows = torch.randperm(30, generator=generator)[:20].tolist()  # others were dropped before
    found = list(RoundRobin()(iter(rows), ranking(30, wanted, per_target=per_target)))
    assert found == by_definition(rows, per_target, wanted)


def test_a_rare_kind_of_target_gets_its_rows():
    """Nine samples of the target want rows 0 to 9, one wants row 19; the mean would never take it."""
    per_target = torch.zeros(20, 10)
    per_target[:10, :9] = 1
    per_target[19, 9] = 1
    assert 19 in list(RoundRobin()(range(20), ranking(20, 10, per_target=per_target)))[:10]


def test_no_rows_are_no_error():
    assert list(RoundRobin()([], ranking(4, 2, per_target=torch.zeros(4, 2)))) == []


def test_with_a_budget_of_tokens_all_that_may_fit_is_picked_by_turns():
    generator = torch.Generator().manual_seed(0)
    per_target = torch.rand(30, 3, generator=generator)
    lengths = [2, 50] * 15
    rows = [row for row in torch.randperm(30, generator=generator).tolist() if lengths[row] == 2]
    given = ranking(30, 3, n_tokens=lengths, per_target=per_target, max_tokens=25)
    assert list(RoundRobin()(rows, given)) == by_definition(rows, per_target, 12)
