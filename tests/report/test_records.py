import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from p2d_peft.report.records import Record


@dataclass(frozen=True)
class Part:
    size: int


@dataclass(frozen=True)
class Example(Record):
    format: ClassVar[str] = "tests.Example"
    title: ClassVar[str] = "an example"
    schema: ClassVar[int] = 3
    since: ClassVar[dict] = {2: {"name": None}, 3: {"share": 0.5}}

    parts: list[Part]
    counts: dict[str, int]
    name: str | None
    share: float
    anything: bool | int | str | None = None


EXAMPLE = Example([Part(1)], {"a": 2}, None, 0.25, True)


def write(path, **changes):
    EXAMPLE.save(path)
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in data.items() if value != "left out"}))
    return path


def test_round_trip(tmp_path):
    assert Example.load(write(tmp_path / "r.json")) == EXAMPLE
    for value in (False, 3, "text", None):
        assert Example.load(write(tmp_path / "r.json", anything=value)).anything == value


def test_a_whole_number_does_for_a_float_and_fields_to_come_are_ignored(tmp_path):
    made = Example.load(write(tmp_path / "r.json", share=1, more=2))
    assert made.share == 1.0 and isinstance(made.share, float)


def test_earlier_schemas_lack_what_later_ones_added(tmp_path):
    made = Example.load(write(tmp_path / "r.json", schema=1, name="left out", share="left out"))
    assert (made.name, made.share) == (None, 0.5)
    made = Example.load(write(tmp_path / "r.json", schema=2, name="kept", share="left out"))
    assert (made.name, made.share) == ("kept", 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": [{"size": 1}, {"size": "2"}]}, r"'parts\[1\]\.size' must be int, got '2'"),
        ({"parts": [{}]}, r"'parts\[0\]\.size' is missing"),
        ({"parts": {"size": 1}}, r"'parts' must be list\[.*Part\], got \{'size': 1\}"),
        ({"counts": {"<b>": 1.5}}, r"'counts\['<b>'\]' must be int, got 1\.5"),
        ({"counts": {"a": True}}, r"must be int, got True"),
        ({"name": 3}, r"'name' must be str \| None, got 3"),
        ({"share": "left out"}, "'share' is missing"),
        ({"share": "much"}, "'share' must be float, got 'much'"),
        ({"share": float("nan")}, "'share' must be float, got nan"),
        ({"share": 10**400}, "'share' must be float, got 1000"),
        ({"share": True}, "'share' must be float, got True"),
        ({"anything": [1]}, "'anything' must be"),
    ],
)
def test_a_wrong_value_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"r\.json' is damaged: .*{message}") as raised:
        Example.load(write(tmp_path / "r.json", **changes))
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("schema", [0, 4, "3", None, True, [3]])
def test_a_schema_that_is_not_known_is_refused(schema, tmp_path):
    with pytest.raises(ValueError, match=r"is an example of schema .*, but this version of p2d_peft reads 1 to 3"):
        Example.load(write(tmp_path / "r.json", schema=schema))
