import pytest

from p2d_peft.selection.policies import LengthBetween

from .rankings import ranking


def test_keeps_the_order_of_what_is_neither_too_short_nor_too_long():
    given, rows = ranking(n_tokens=[3, 9, 5, 1, 7, 5]), [5, 4, 3, 2, 1, 0]
    assert list(LengthBetween(3, 7)(rows, given)) == [5, 4, 2, 0]
    assert list(LengthBetween(least=6)(rows, given)) == [4, 1]
    assert list(LengthBetween(most=3)(rows, given)) == [3, 0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "needs `least` or `most`"),
        ({"least": 0}, "`least` must be at least 1, got 0"),
        ({"most": -1}, "`most` must be at least 1, got -1"),
        ({"least": 5, "most": 4}, "`least` must not exceed `most`, got 5 and 4"),
    ],
)
def test_bad_lengths_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LengthBetween(**kwargs)
