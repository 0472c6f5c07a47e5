import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from p2d_peft.json_fields import checked_fields


@dataclass
class Sample:
    name: str
    share: float
    count: int | None
    kind: Literal["a", "b"] = "a"
    table: dict[str, list[int]] = field(default_factory=dict)
    pair: tuple[int, ...] = ()
    anything: Any = None
    switch: bool = False


GOOD = {"name": "x", "share": 1, "count": None}


def test_what_fits_comes_out_and_what_is_no_field_does_not():
    data = {**GOOD, "kind": "b", "table": {"0": [1]}, "pair": [1, 2], "anything": {}, "switch": True}
    assert checked_fields(Sample, {**data, "later": 1}) == data
    assert Sample(**checked_fields(Sample, GOOD)) == Sample("x", 1, None)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("name", None, "str"),
        ("share", True, "float"),
        ("share", "1", "float"),
        ("share", math.inf, "float"),
        ("count", 1.0, r"int \| None"),
        ("kind", "c", r"Literal\['a', 'b'\]"),
        ("kind", ["a"], "Literal"),
        ("table", {"0": 1.5}, r"list\[int\]"),
        ("table", [], "dict"),
        ("pair", 1, "tuple"),
        ("switch", 1, "bool"),
    ],
)
def test_what_does_not_fit_is_named(name, value, wanted):
    with pytest.raises(ValueError, match=rf"^'{name}(\['0'\])?' must be {wanted}.*, got "):
        checked_fields(Sample, {**GOOD, name: value})


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"^'share' is missing\.$"):
        checked_fields(Sample, {"name": "x", "count": 1})
