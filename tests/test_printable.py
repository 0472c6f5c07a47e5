from p2d_peft.printable import printable, shown


def test_what_a_terminal_would_obey_is_shown():
    assert printable("a\nb\t c") == "a b c"
    assert printable("\x1b[2Jx\x07") == r"\x1b[2Jx\x07"
    assert printable("a\N{RIGHT-TO-LEFT OVERRIDE}b") == r"a\u202eb"
    assert printable("Grüße, 你好") == "Grüße, 你好"


def test_values_are_cut_off():
    assert shown("x\x1b") == r"'x\x1b'"
    assert len(shown("x" * 1000)) == 80 and shown("x" * 1000).endswith("x…")
