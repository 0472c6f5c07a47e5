import copy
import enum
import pickle

import pytest
from peft import PeftType

from p2d_peft.tuners.peft_type import add_peft_type


@pytest.fixture
def new_name():
    """A name that is no member yet; its member is taken out again."""
    name = "A_METHOD_OF_A_TEST"
    assert name not in PeftType.__members__
    yield name
    if name in PeftType.__members__:
        del PeftType._member_map_[name], PeftType._value2member_map_[name]
        PeftType._member_names_.remove(name)
        delattr(PeftType, name)


def test_member_is_genuine(new_name):
    before = list(PeftType)
    member = add_peft_type(new_name)

    assert isinstance(member, PeftType) and isinstance(member, enum.Enum)
    assert list(PeftType) == [*before, member]
    assert PeftType[new_name] is member and PeftType(new_name) is member
    assert getattr(PeftType, new_name) is member  # on Python 3.12 and later this needs an attribute of the class
    assert PeftType.__members__[new_name] is member
    assert member.name == member.value == new_name
    assert repr(member) == f"<PeftType.{new_name}: '{new_name}'>"
    # a string too, as PEFT's mappings are also asked with the string from adapter_config.json
    assert {member: 1}[new_name] == 1
    # nothing that a member of the class body has is missing
    assert set(vars(PeftType.LORA)) <= set(vars(member))
    with pytest.raises(AttributeError):
        setattr(PeftType, new_name, "something else")


def test_adding_twice_gives_the_same_member(new_name):
    member = add_peft_type(new_name)
    count = len(PeftType)
    assert add_peft_type(new_name) is member
    assert len(PeftType) == count
    assert add_peft_type("LORA") is PeftType.LORA


def test_copies_and_pickles_are_the_same_object(new_name):
    member = add_peft_type(new_name)
    assert copy.copy(member) is member and copy.deepcopy([member])[0] is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member


@pytest.mark.parametrize("name", ["head_sparse", "HEAD-SPARSE", "", "2X"])
def test_other_names_are_refused(name):
    count = len(PeftType)
    with pytest.raises(ValueError, match="identifier in capital letters"):
        add_peft_type(name)
    assert len(PeftType) == count
