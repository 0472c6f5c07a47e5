import subprocess
import sys

import pytest

import p2d_peft


def test_public_names():
    assert set(p2d_peft.__all__) >= {
        "HeadScores",
        "HeadSet",
        "HeadSparseConfig",
        "P2DConfig",
        "P2DDataSelector",
        "P2DTrainer",
        "localize_heads",
    }
    for name in p2d_peft.__all__:
        assert getattr(p2d_peft, name) is not None and name in dir(p2d_peft)
    with pytest.raises(AttributeError, match="'p2d_peft' has no attribute 'P2DMagic'"):
        p2d_peft.P2DMagic  # noqa: B018


def test_the_import_is_light_and_registers_the_method():
    code = """
import sys, peft
before = set(sys.modules)
import p2d_peft
# trl and datasets take seconds, and the extras may be missing; what peft itself imports is another's
heavy = {"trl", "datasets", "pandas", "pyarrow", "matplotlib", "bitsandbytes", "bm25s", "datasketch"}
heavy &= {name.partition(".")[0] for name in set(sys.modules) - before}
assert not heavy, heavy
assert peft.PeftType.HEAD_SPARSE in peft.PEFT_TYPE_TO_CONFIG_MAPPING
assert p2d_peft.HeadSet([(0, 1)]).layers == (0,)
assert "trl" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
