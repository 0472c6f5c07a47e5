import dataclasses
import re

from p2d_peft.report import P2DReport
from p2d_peft.report.text import report_text

from .test_run_report import report


def test_every_field_has_a_line_and_none_is_too_long():
    made = report(heads={str(layer): [0, 3, 7] for layer in range(30)}, pool_tokens=1234567, aer=None)
    text = report_text(made, width=80)
    assert max(map(len, text.splitlines())) <= 80
    for field in dataclasses.fields(P2DReport):
        assert re.search(f"^{field.name.replace('_', ' ')} {{2}}", text, re.MULTILINE), field.name
    assert re.search(r"^stage seconds +localize: 1, train: 2$", text, re.MULTILINE)
    assert re.search(r"^pool tokens +1,234,567$", text, re.MULTILINE)
    assert re.search(r"^aer +-$", text, re.MULTILINE)
    assert "0: 0 3 7, 1: 0 3 7" in text and "29: 0 3 7" in text
    assert not re.search(r":$", text, re.MULTILINE)  # no line ends between a name and its value
