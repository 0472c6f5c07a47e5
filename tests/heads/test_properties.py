"""What holds for all head sets, tables of scores and layouts, and not only for those that someone thought of."""

import json
import math
import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from p2d_peft import HeadScores, HeadSet
from p2d_peft.heads import AttentionLayout, ModelGeometry, register_attention_layout

from ..steady import steady


layers = st.integers(0, 12) | st.builds(
    "{}.{}".format, st.sampled_from(["cross", "decoder", "encoder"]), st.integers(0, 12)
)
pairs = st.frozensets(st.tuples(layers, st.integers(0, 8)), max_size=12)


@steady
@given(pairs, pairs)
def test_head_sets_are_sets(a, b):
    x, y = HeadSet(a), HeadSet(b)
    for combined, expected in ((x | y, a | b), (x & y, a & b), (x - y, a - b), (x ^ y, a ^ b)):
        assert isinstance(combined, HeadSet) and combined == HeadSet(expected) and set(combined) == expected
    assert ((x <= y), (x < y), (x == y), x.isdisjoint(y)) == ((a <= b), (a < b), (a == b), a.isdisjoint(b))
    assert len(x) == len(a) and all(pair in x for pair in a) and not any(pair in x for pair in b - a)
    assert (x == y) <= (hash(x) == hash(y))


@steady
@given(pairs, st.randoms(use_true_random=False))
def test_head_sets_have_one_order_and_come_back(a, random):
    x = HeadSet(a)
    shuffled = list(a)
    random.shuffle(shuffled)
    order = [(stack, int(number), head) for layer, head in x for stack, _, number in [str(layer).rpartition(".")]]
    assert order == sorted(order) and list(HeadSet(shuffled)) == list(x)
    assert HeadSet.from_layers(x.by_layer()) == x == pickle.loads(pickle.dumps(x))
    data = json.loads(json.dumps(x.to_dict()))
    assert HeadSet.from_dict(data) == x and HeadSet.from_dict(data).to_dict() == x.to_dict()
    assert x.layers == tuple(x.by_layer())


# few values, so that there are ties
cells = st.none() | st.integers(-2, 2).map(float) | st.floats(-1e300, 1e300)


@st.composite
def tables(draw):
    n_layers, n_heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(cells, min_size=n_heads, max_size=n_heads), min_size=n_layers, max_size=n_layers))
    rows[0][0] = 0.0  # one head at least
    # a layer with fewer heads lacks its last ones
    rows = [[value for value in row if value is not None] + [None] * row.count(None) for row in rows]
    values = [[math.nan if value is None else value for value in row] for row in rows]
    return HeadScores(torch.tensor(values, dtype=torch.float64), "x")


@steady
@given(tables(), st.data())
def test_the_best_heads_are_chosen(scores, data):
    k = data.draw(st.integers(1, scores.n_heads))
    heads = scores.top(k=k)
    value = {(row, head): float(scores.values[row, head]) for row, head in (~scores.values.isnan()).nonzero().tolist()}
    assert list(heads) == sorted(sorted(value, key=lambda cell: (-value[cell], cell))[:k])
    assert k == 1 or scores.top(k=k - 1) < heads
    even = scores.top(k=k, per_layer="even")
    most = max(map(len, even.by_layer().values()))
    n_heads = (~scores.values.isnan()).sum(dim=1)
    assert len(even) == k and int(n_heads.clamp(max=most - 1).sum()) < k
    share = data.draw(st.floats(0.01, 1))
    last = scores.top(k=k, last_layers=share)
    n_last = max(1, round(share * len(scores.values)))
    # only of these, unless they have too few, and then of no more layers than it takes
    assert len(last) == k
    lowest = scores.layers.index(last.layers[0])
    assert lowest >= len(scores.values) - n_last or int(n_heads[lowest + 1 :].sum()) < k


@steady
@given(tables())
def test_scores_come_back_from_json(scores):
    back = HeadScores.from_dict(json.loads(json.dumps(scores.to_dict())))
    assert torch.equal(back.values.nan_to_num(7e301), scores.values.nan_to_num(7e301))
    assert (back.layers, back.n_kv_heads, back.method) == (scores.layers, scores.n_kv_heads, scores.method)


class AnyAttention(nn.Module):
    """Attention of given sizes without values; `fused` are the roles that share one projection."""

    def __init__(self, n_groups, per_group, q, k, v, fused, layer_idx):
        super().__init__()
        self.layer_idx, self.sizes = layer_idx, {"q": q, "k": k, "v": v}
        n_heads = n_groups * per_group
        rows = {"q": n_heads * q, "k": n_groups * k, "v": n_groups * v}
        for role in set(rows) - set(fused):
            self.add_module(role, nn.Linear(3, rows[role], device="meta"))
        if fused:
            self.fused = nn.Linear(3, sum(rows[role] for role in fused), device="meta")
        self.o = nn.Linear(n_heads * v, 3, device="meta")


@steady
@given(
    n_groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    q=st.integers(1, 5),
    k=st.integers(1, 5),
    v=st.integers(1, 5),
    fused=st.sampled_from(["", "kv", "qkv"]),
    order=st.sampled_from(["blocks", "groups"]),
    n_layers=st.integers(1, 3),
)
def test_the_heads_part_their_projections(n_groups, per_group, q, k, v, fused, order, n_layers):
    names = {role: "fused" if role in fused else role for role in "qkv"}
    register_attention_layout(AnyAttention, AttentionLayout(**names, o="o", head_dim=v, q_dim=q, k_dim=k, order=order))
    model = nn.ModuleList(AnyAttention(n_groups, per_group, q, k, v, fused, layer) for layer in range(n_layers))
    geometry = ModelGeometry.of(model)
    n_heads = n_groups * per_group
    assert list(geometry) == list(range(n_layers)) and geometry.shape == (n_layers, n_heads)
    assert len(geometry.heads) == n_layers * n_heads and geometry.check(geometry.heads) == geometry.heads
    for attention in geometry.values():
        assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (n_heads, n_groups, v)
        assert [attention.group(head) for head in range(n_heads)] == sorted(list(range(n_groups)) * per_group)
        # each row of each projection, and each column of the output's, belongs to one unit of one role
        owned = {}
        for role, size in (("q", q), ("k", k), ("v", v), ("o", v)):
            units = attention.units(role)
            assert units.size == size and units.dim == (1 if role == "o" else 0)
            owned.setdefault(units.module, []).extend(units.indices(range(len(units.starts))).tolist())
            for head in range(n_heads):
                (unit,) = attention.units_of(role, [head])
                assert unit == (attention.group(head) if role in "kv" else head)
                rows = range(10**6)[attention.head_slice(role, head)]
                assert list(rows) == units.indices([unit]).tolist()
        for name, rows in owned.items():
            linear = model.get_submodule(name)
            width = linear.in_features if name.endswith(".o") else linear.out_features
            assert sorted(rows) == list(range(width))


@steady
@given(st.lists(st.integers(0, 11), min_size=1, max_size=12))
def test_heads_of_a_group_share_its_unit(heads):
    register_attention_layout(AnyAttention, AttentionLayout("q", "k", "v", "o", head_dim=2))
    attention = ModelGeometry.of(nn.ModuleList([AnyAttention(3, 4, 2, 2, 2, "", 0)]))[0]
    assert attention.units_of("k", heads) == sorted({head // 4 for head in heads})
    indices = attention.units("k").indices(attention.units_of("k", heads)).tolist()
    assert indices == sorted(set(indices))
