import copy
import pickle

import numpy as np
import pytest

from p2d_peft.heads import HeadSet


def test_is_ordered_whatever_the_input_order():
    heads = HeadSet([(2, 3), (0, 1), (2, 0)])
    assert list(heads) == [(0, 1), (2, 0), (2, 3)]
    assert heads.layers == (0, 2)
    assert heads.by_layer() == {0: [1], 2: [0, 3]}
    assert repr(heads) == "HeadSet({0: [1], 2: [0, 3]})"


def test_behaves_like_a_frozenset_of_pairs():
    a, b = HeadSet([(0, 0), (1, 1)]), HeadSet([(1, 1), (2, 2)])
    assert a | b == HeadSet([(0, 0), (1, 1), (2, 2)])
    assert a & b == HeadSet([(1, 1)])
    assert a - b == HeadSet([(0, 0)])
    assert a ^ b == HeadSet([(0, 0), (2, 2)])
    assert all(isinstance(result, HeadSet) for result in (a | b, a & b, a - b, a ^ b))
    assert a & b <= a and not a <= b
    assert (1, 1) in a and (2, 2) not in a and "x" not in a
    assert len(HeadSet()) == 0 and not HeadSet()


def test_is_immutable_and_hashable():
    a = HeadSet([(0, 1), (1, 0)])
    assert {a: "x"}[HeadSet([(1, 0), (0, 1)])] == "x"
    assert a == frozenset({(0, 1), (1, 0)}) and hash(a) == hash(HeadSet(reversed(list(a))))
    with pytest.raises(AttributeError):
        a.extra = 1
    a.by_layer()[0].append(5)
    assert a.by_layer() == {0: [1], 1: [0]}


def test_json_pickle_and_copy_round_trips(tmp_path):
    heads = HeadSet.from_layers({3: [2, 0], 10: [1]})
    heads.save(tmp_path / "heads.json")
    assert HeadSet.load(tmp_path / "heads.json") == heads
    assert HeadSet.from_layers({"3": [0, 2], "10": [1]}) == heads
    assert pickle.loads(pickle.dumps(heads)) == heads == copy.deepcopy(heads)


def test_takes_numpy_integers_and_keeps_plain_ones():
    (head,) = HeadSet([(np.int64(1), np.int32(2))])
    assert type(head.layer) is int and type(head.head) is int


def test_layers_of_several_stacks_are_strings_in_natural_order(tmp_path):
    heads = HeadSet([("encoder.10", 1), ("encoder.2", 0), ("decoder.3", 2), ("cross.0", 3), ("decoder.3", 0)])
    assert heads.layers == ("cross.0", "decoder.3", "encoder.2", "encoder.10")
    assert list(heads)[:3] == [("cross.0", 3), ("decoder.3", 0), ("decoder.3", 2)]
    assert ("encoder.2", 0) in heads and ("encoder.2", 1) not in heads
    assert repr(heads) == "HeadSet({'cross.0': [3], 'decoder.3': [0, 2], 'encoder.2': [0], 'encoder.10': [1]})"
    heads.save(tmp_path / "heads.json")
    assert HeadSet.load(tmp_path / "heads.json") == heads == pickle.loads(pickle.dumps(heads))
    assert HeadSet.from_layers(heads.by_layer()) == heads
    assert heads & HeadSet([("cross.0", 3)]) == HeadSet([("cross.0", 3)])
    assert HeadSet([("encoder.0", 1), (5, 0)]).layers == (5, "encoder.0")


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ([(0, 1), (0, 1)], ValueError, r"\(0, 1\) more than once"),
        ([(0, -1)], ValueError, r"counted from 0, got \(0, -1\)"),
        ([(0, 1.0)], TypeError, r"pairs of integers, got \(0, 1\.0\)"),
        ([(0, True)], TypeError, "pairs of integers"),
        ([3], TypeError, "pairs of integers, got 3"),
        ([("encoder", 1)], TypeError, r"got \('encoder', 1\)\. A layer of an encoder-decoder is a string like"),
        ([("encoder.01", 1)], TypeError, "pairs of integers"),
        ([("encoder.-1", 1)], TypeError, "pairs of integers"),
        ([("0", 1)], TypeError, "pairs of integers"),
        ([("encoder.0", -1)], ValueError, "counted from 0"),
        ([("encoder.0", 1), ("encoder.0", 1)], ValueError, r"\('encoder\.0', 1\) more than once"),
        ({0: [1]}, TypeError, "from_layers"),
    ],
)
def test_bad_heads_are_named(heads, error, message):
    with pytest.raises(error, match=message):
        HeadSet(heads)


@pytest.mark.parametrize("data", [None, [], {}, {"format": "other", "heads": {}}, {"format": "p2d_peft.HeadSet"}])
def test_what_is_no_head_set_is_refused(data):
    with pytest.raises(ValueError, match="not a head set"):
        HeadSet.from_dict(data)
