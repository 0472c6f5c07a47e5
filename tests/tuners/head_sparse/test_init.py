import importlib
import json
import subprocess
import sys
import warnings

import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import p2d_peft.tuners.head_sparse as head_sparse


MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


@pytest.fixture
def restored():
    """Put modules, what is in them and registrations back: other tests hold on to the classes that are there now."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "p2d_peft"}
    dictionaries = [vars(module) for module in modules.values()] + list(MAPPINGS)
    contents = [dict(dictionary) for dictionary in dictionaries]
    yield
    sys.modules.update(modules)
    for dictionary, content in zip(dictionaries, contents, strict=True):
        dictionary.clear()
        dictionary.update(content)


def test_is_registered():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.HEAD_SPARSE] is head_sparse.HeadSparseConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["HEAD_SPARSE"] is head_sparse.HeadSparseModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["HEAD_SPARSE"] == "head_sparse_"
    assert "HEAD_SPARSE" not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


@pytest.mark.parametrize("how", ["purge", "reload"])
def test_importing_anew_registers_the_new_classes(how, restored):
    member, counts = PeftType.HEAD_SPARSE, [len(mapping) for mapping in MAPPINGS]
    names = [f"p2d_peft.tuners.{name}" for name in ("peft_type", "head_sparse.config", "head_sparse.layer")]
    names += ["p2d_peft.tuners.head_sparse.model", "p2d_peft.tuners.head_sparse", "p2d_peft.tuners"]
    old = sys.modules["p2d_peft.tuners.head_sparse"].HeadSparseConfig
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "purge":
            for name in [name for name in sys.modules if name.split(".")[0] == "p2d_peft"]:
                del sys.modules[name]
            new = importlib.import_module("p2d_peft.tuners.head_sparse")
        else:
            for name in names:
                importlib.reload(sys.modules[name])
            new = sys.modules["p2d_peft.tuners.head_sparse"]
    assert new.HeadSparseConfig is not old
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is new.HeadSparseConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is new.HeadSparseModel
    assert new.HeadSparseConfig().peft_type is member is PeftType.HEAD_SPARSE
    assert [len(mapping) for mapping in MAPPINGS] == counts


def test_a_method_of_another_package_is_not_displaced(restored):
    class HeadSparseConfig:
        """Not ours."""

    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.HEAD_SPARSE] = HeadSparseConfig
    with pytest.raises(KeyError, match="already PEFT method called 'head_sparse'"):
        importlib.reload(head_sparse)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.HEAD_SPARSE] is HeadSparseConfig


def test_import_is_light():
    """Beyond what PEFT imports itself, none of the heavy or optional packages comes in."""
    code = (
        "import json, sys, peft; before = set(sys.modules); import p2d_peft.tuners; "
        "print(json.dumps([name.split('.')[0] for name in set(sys.modules) - before]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    new = set(json.loads(output.splitlines()[-1]))
    assert "p2d_peft" in new and not new & {"trl", "datasets", "matplotlib", "bitsandbytes"}
