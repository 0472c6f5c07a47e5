import argparse
import copy
import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from peft import PeftConfig, PeftType

from p2d_peft.heads import HeadSet
from p2d_peft.heads.geometry import ModelGeometry
from p2d_peft.tuners import HeadSparseConfig
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("heads", "plain"),
    [
        (None, None),
        (HeadSet([(2, 3), (0, 1), (2, 0)]), {0: [1], 2: [0, 3]}),
        ({2: (3, 0), 0: {1}}, {0: [1], 2: [0, 3]}),
        ({"2": [0]}, {2: [0]}),  # as JSON has it
        ({1: [], 2: [0]}, {2: [0]}),
        ({np.int64(1): np.array([2, 0])}, {1: [0, 2]}),
        ([3, 1], [1, 3]),
        (range(2), [0, 1]),
        (np.array([1]), [1]),
    ],
)
def test_heads_become_plain_json_types(heads, plain):
    config = HeadSparseConfig(heads=heads)
    assert config.heads == plain
    assert list(config.heads or ()) == list(plain or ())  # the order too
    json.dumps(config.heads)  # a numpy integer would not pass
    config.set_heads(config.heads)
    assert config.heads == plain


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (
            "0",
            TypeError,
            "must be a HeadSet, a mapping from layers to lists of heads, a list of heads or None, got str",
        ),
        (3, TypeError, "got int"),
        ([0, 1.0], TypeError, r"must hold the integers .*, got 1\.0"),
        ([True], TypeError, "got True"),
        ([(0, 1), (2, 3)], TypeError, r"got \(0, 1\). For \(layer, head\) pairs pass a `HeadSet`"),
        ({0: 1}, TypeError, "must map each layer to a list of heads, got 1 for layer 0"),
        ({0: "12"}, TypeError, "must map each layer to a list of heads, got '12' for layer 0"),
        ({"first": [0]}, TypeError, r"got \('first', 0\)"),
        ({0: [0.5]}, TypeError, r"got \(0, 0\.5\)"),
        ([0, -1], ValueError, "counted from 0, got -1"),
        ({0: [-2]}, ValueError, r"counted from 0, got \(0, -2\)"),
        ({-1: [0]}, ValueError, r"counted from 0, got \(-1, 0\)"),
        ([1, 2, 1], ValueError, "holds 1 more than once"),
        ({3: [1, 1]}, ValueError, r"holds \(3, 1\) more than once"),
        ([], ValueError, "`heads` is empty"),
        ({}, ValueError, "`heads` is empty"),
        ({0: []}, ValueError, "`heads` is empty"),
        (HeadSet(), ValueError, "`heads` is empty"),
    ],
)
def test_bad_heads(heads, error, message):
    with pytest.raises(error, match=message):
        HeadSparseConfig(heads=heads)


@pytest.mark.parametrize(
    "config",
    [
        HeadSparseConfig(),
        HeadSparseConfig(heads={11: [2], 3: [7, 0]}, task_type="CAUSAL_LM", init_weights=False),
        HeadSparseConfig(
            heads=[1], target_modules=["q_proj", "o_proj"], exclude_modules="x.*", modules_to_save=["lm_head"]
        ),
        HeadSparseConfig(heads={"encoder.1": [0], "cross.0": [3, 1]}),
        HeadSparseConfig(
            projections=("o", "q"),
            share_kv=False,
            r=4,
            layers_to_transform=[0, 3],
            layers_pattern=["layers", "decoder.block"],
            trainable_token_indices={"embed_tokens": [1, 7]},
            bias="head_sparse_only",
        ),
        HeadSparseConfig(layers_to_transform=0, layers_pattern="layers", trainable_token_indices=[5], bias="all"),
    ],
)
def test_goes_to_json_and_back(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is HeadSparseConfig and loaded == config
    assert loaded.peft_type is PeftType.HEAD_SPARSE
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "HEAD_SPARSE"
    assert copy.deepcopy(config) == config == dataclasses.replace(config)


def test_all_linear_means_all_projections():
    assert HeadSparseConfig(target_modules="all-linear").target_modules is None
    assert HeadSparseConfig(target_modules=".*q_proj").target_modules == ".*q_proj"


def test_head_set_of_a_model():
    geometry = ModelGeometry.of(tiny_model())
    every = [(layer, head) for layer in range(3) for head in range(4)]
    assert HeadSparseConfig().head_set(geometry) == HeadSet(every)
    assert HeadSparseConfig(heads=[0, 2]).head_set(geometry) == HeadSet(pair for pair in every if pair[1] in (0, 2))
    assert HeadSparseConfig(heads={1: [3]}).head_set(geometry) == HeadSet([(1, 3)])
    with pytest.raises(ValueError, match=r"holds \(0, 4\), but layer 0 has the heads 0 to 3"):
        HeadSparseConfig(heads=[4]).head_set(geometry)
    with pytest.raises(ValueError, match=r"holds \(3, 0\), but layer 3 has no heads; layers: 0 to 2"):
        HeadSparseConfig(heads={3: [0]}).head_set(geometry)


def test_every_field_is_documented():
    parser = argparse.ArgumentParser()
    for field in dataclasses.fields(HeadSparseConfig):
        assert field.metadata["help"]
        parser.add_argument(f"--{field.name}", help=field.metadata["help"])
    parser.format_help()  # a lone percent sign would raise
    for name in HeadSparseConfig.__annotations__:
        # Python 3.13 takes the indentation away by itself
        assert f"\n    {name} (" in inspect.getdoc(HeadSparseConfig)


def test_projections():
    assert HeadSparseConfig().projections == ["q", "k", "v", "o"] == HeadSparseConfig().roles()
    assert HeadSparseConfig(projections={"o", "q"}).projections == ["q", "o"]
    assert HeadSparseConfig(share_kv=False).roles() == ["q", "o"]
    assert HeadSparseConfig(projections=["v", "q"], share_kv=False).roles() == ["q"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projections": ["q", "x"]}, "holds 'x'; valid are q, k, v, o"),
        ({"projections": "qk"}, "must be a list of some of q, k, v, o, got 'qk'"),
        ({"projections": 3}, "must be a list of some of q, k, v, o, got 3"),
        ({"projections": []}, "`projections` is empty"),
        ({"projections": ["q", "o", "q"]}, "holds one more than once"),
        ({"projections": ["k", "v"], "share_kv": False}, r"`share_kv=False` leaves nothing .* \(k, v\)"),
        ({"r": 0}, "integer of at least 1, or None for the full slices, got 0"),
        ({"r": 1.5}, "got 1.5"),
        ({"r": True}, "got True"),
        ({"layers_to_transform": "0"}, "must be the number of a layer or a list of them, got '0'"),
        ({"layers_to_transform": [0, "1"]}, r"a list of them, got \[0, '1'\]"),
        ({"layers_to_transform": 1.0}, r"a list of them, got 1\.0"),
        ({"init_weights": "gaussian"}, "must be True, for deltas of zero, or False, .* got 'gaussian'"),
        ({"init_weights": None}, "got None"),
        ({"layers_pattern": "layers"}, r"`layers_pattern` \('layers'\) .* give both or neither"),
        ({"bias": "lora_only"}, "must be one of 'none', 'all', 'head_sparse_only', got 'lora_only'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        HeadSparseConfig(**fields)


def test_numbers_become_plain_json_types():
    config = HeadSparseConfig(r=np.int64(2), layers_to_transform=np.array([0, 2]))
    assert (config.r, config.layers_to_transform) == (2, [0, 2])
    assert HeadSparseConfig(layers_to_transform=np.int64(1)).layers_to_transform == 1
    assert HeadSparseConfig(layers_to_transform=range(2)).layers_to_transform == [0, 1]
    json.dumps(config.to_dict())  # a numpy integer would not pass


def test_layers_to_transform():
    geometry = ModelGeometry.of(tiny_model())

    def layers(**fields):
        config = HeadSparseConfig(**fields)
        return [layer for layer, attention in geometry.items() if config.transforms(attention)]

    assert layers() == layers(layers_to_transform=[]) == [0, 1, 2]
    assert layers(layers_to_transform=1) == [1]
    assert layers(layers_to_transform=[0, 2, 9]) == [0, 2]
    assert layers(layers_to_transform=[0], layers_pattern="layers") == [0]
    assert layers(layers_to_transform=[0], layers_pattern=["blocks", "model.layers"]) == [0]
    assert layers(layers_to_transform=[0], layers_pattern="blocks") == []


def test_layers_of_one_stack():
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4)
    with torch.device("meta"):
        geometry = ModelGeometry.of(transformers.T5Model(config))
    both = HeadSparseConfig(layers_to_transform=[1])
    assert [layer for layer in geometry if both.transforms(geometry[layer])] == ["cross.1", "decoder.1", "encoder.1"]
    encoder = HeadSparseConfig(layers_to_transform=[1], layers_pattern="encoder.block")
    assert [layer for layer in geometry if encoder.transforms(geometry[layer])] == ["encoder.1"]
