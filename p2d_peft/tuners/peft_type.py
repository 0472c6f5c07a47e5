"""Adding a method of our own to PEFT's enum of methods, which has no public way to be extended."""

from __future__ import annotations

from peft.utils.peft_types import PeftType


def add_peft_type(name: str) -> PeftType:
    """
    Add a member to PEFT's [`~peft.PeftType`], so that `register_peft_method` accepts a method from outside PEFT.

    The member is a genuine one: `isinstance(member, PeftType)`, `PeftType[name]`, `PeftType(name)`, `PeftType.name`
    and `list(PeftType)` all have it, and copies and pickles of it are the same object. A pickle is loaded by value, so
    the process that loads it has to have added the member too.

    Args:
        name (`str`): Name and value of the member, in capitals as PEFT's own are, such as `"HEAD_SPARSE"`.

    Returns:
        `PeftType`: the member; the one that is already there if `name` is known.

    Raises:
        `ValueError`: if `name` is not an identifier in capitals.
    """
    if not (name.isidentifier() and name.isupper()):
        raise ValueError(f"`name` must be an identifier in capital letters, such as 'HEAD_SPARSE', got {name!r}.")
    if name in PeftType.__members__:
        return PeftType[name]

    # The same steps as the enum module takes for each member of a class body (CPython 3.10 to 3.13, `EnumType.__new__`
    # and `_proto_member.__set_name__`).
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    # From Python 3.12 on `PeftType.X` is a plain class attribute, before it was looked up in `_member_map_`. The
    # attribute is right for both, but it has to come first: an enum refuses to set the name of a member.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member
