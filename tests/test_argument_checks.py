import numpy as np
import pytest

from p2d_peft.argument_checks import check_choice, check_count, check_share, check_type


def test_types_are_named():
    check_type("heads", None, (int,), "a number")
    check_type("heads", 1, (int,), "a number")
    with pytest.raises(TypeError, match="`heads` must be a number, got str"):
        check_type("heads", "1", (int,), "a number")


@pytest.mark.parametrize("value", [1e-9, 1, np.float32(0.5)])
def test_shares(value):
    check_share("ratio", value)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, ValueError), (True, TypeError), ("1", TypeError)])
def test_what_is_no_share_is_named(value, error):
    with pytest.raises(error, match=rf"`ratio` must be .*\(0, 1\], got {value!r}"):
        check_share("ratio", value)


def test_counts():
    check_count("k", np.int64(1))
    check_count("k", 0, least=0)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        check_count("k", 0)
    for value in (1.0, "1", True, None):
        with pytest.raises(TypeError, match=f"`k` must be an integer of at least 1, got {value!r}"):
            check_count("k", value)


def test_choices():
    check_choice("method", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"`method` must be one of 'a', 'b', or a function, got \[\]"):
        check_choice("method", [], ("a", "b"), more=", or a function")
