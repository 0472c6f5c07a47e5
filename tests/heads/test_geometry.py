import pytest
import torch
import transformers

from p2d_peft.heads import HeadSet, ModelGeometry

from ..tiny_models import LAYOUTS, tiny_model


def test_the_shape_is_that_of_the_config():
    model = tiny_model()
    assert ModelGeometry.of(model).shape == (model.config.num_hidden_layers, model.config.num_attention_heads)


def test_groups_are_taken_once_and_in_order():
    attention = ModelGeometry.of(tiny_model("llama"))[0]  # 4 heads, 2 groups
    assert attention.units_of("q", [3, 0]) == [0, 3]
    assert attention.units_of("k", [3, 2, 0]) == [0, 1]
    assert attention.k.indices([1, 0]).tolist() == list(range(24))


def test_needs_no_weights():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_model().config)
    assert ModelGeometry.of(model) == ModelGeometry.of(tiny_model())


def test_hybrids_keep_the_layer_numbers():
    geometry = ModelGeometry.of(LAYOUTS["jamba"].model())
    assert list(geometry) == [1, 3]
    assert geometry.heads.layers == (1, 3)
    assert geometry.shape == (4, 4) and geometry.rows == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"\(2, 0\), but layer 2 has no heads; layers: 1, 3\."):
        geometry.check(HeadSet([(2, 0)]))


def test_stacks_are_told_apart():
    geometry = ModelGeometry.of(LAYOUTS["t5"].model())
    assert list(geometry) == ["cross.0", "cross.1", "decoder.0", "decoder.1", "encoder.0", "encoder.1"]
    assert geometry.stacks == ("cross", "decoder", "encoder")
    assert geometry["cross.1"].layer == "cross.1" and len(geometry.heads) == 24
    assert geometry.check(HeadSet([("cross.1", 3)]))
    with pytest.raises(
        ValueError, match=r"\(cross\.2, 0\), but layer cross\.2 has no heads; layers: cross\.0, cross\.1"
    ):
        geometry.check(HeadSet([("cross.2", 0)]))
    with pytest.raises(ValueError, match="layer 0 has no heads"):
        geometry.check(HeadSet([(0, 0)]))
    assert geometry.rows == tuple(geometry) and geometry.shape == (6, 4)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="no attention heads"):
        ModelGeometry.of(torch.nn.Linear(3, 3))


def test_check_names_the_head_and_the_range():
    geometry = ModelGeometry.of(tiny_model())
    assert geometry.check(geometry.heads) == geometry.heads
    assert len(geometry.heads) == 12
    with pytest.raises(ValueError, match=r"\(1, 4\), but layer 1 has the heads 0 to 3"):
        geometry.check(HeadSet([(0, 0), (1, 4)]))
    with pytest.raises(ValueError, match=r"\(3, 0\), but layer 3 has no heads; layers: 0 to 2"):
        geometry.check(HeadSet([(3, 0)]))
    with pytest.raises(ValueError, match="empty"):
        geometry.check(HeadSet())
