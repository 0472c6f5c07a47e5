"""
Run TRL's own tests of `SFTTrainer` with `P2DTrainer` in its place.

The tests do not come with TRL's package: give the `tests` folder of a checkout of the installed version.

```bash
git clone --depth 1 --branch v1.16.0 https://github.com/huggingface/trl
python scripts/trl_test_matrix.py --tests trl/tests
python scripts/trl_test_matrix.py --tests trl/tests --json trl_test_matrix.json
python scripts/trl_test_matrix.py --tests trl/tests --trainers P2DTrainer -k "packing"
```

Whatever `conftest.py` lies in that folder is run: take it from a checkout of the real repository, and look at it first.

They run twice: with `SFTTrainer`, which shows that the tests can pass here, and with `P2DTrainer`. Only the class is
exchanged; arguments stay `SFTConfig`, so that P2D has its defaults. Models and datasets of the Hub are replaced by stand-ins,
see `trl_stand_in_models.py` and `trl_stand_in_datasets.py`. docs/drop-in.md explains what is adapted and what is left out.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# also where a GPU is: the tests are about what the trainer does, and they fit a CPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import peft
import pytest
import torch
import transformers
import trl
from transformers.utils import is_torchvision_available
from trl_stand_in_datasets import make_datasets
from trl_stand_in_models import TOKEN_NUMBERS, VISION_MODEL, make_models

from p2d_peft import HeadSparseConfig, P2DTrainer


FILE = "test_sft_trainer.py"
TRAINERS: dict[str, type[trl.SFTTrainer]] = {"SFTTrainer": trl.SFTTrainer, "P2DTrainer": P2DTrainer}

_NO_STAND_IN = "No stand-in for this vision-language model and its processor is made; those with Qwen2.5-VL run."
# Tests that cannot run here with either trainer -> why. A name without a case stands for all cases.
UNAVAILABLE: dict[str, str] = {
    f"test_train_vlm{suffix}[trl-internal-testing/tiny-{name}]": _NO_STAND_IN
    for suffix, names in (
        (
            "",
            (
                "Gemma3ForConditionalGeneration",
                "Gemma4ForConditionalGeneration",
                "Lfm2VlForConditionalGeneration-2.5",
                "LlavaForConditionalGeneration",
                "LlavaNextForConditionalGeneration",
                "MuseGlimmerForConditionalGeneration",
                "Qwen2VLForConditionalGeneration",
                "Qwen3VLForConditionalGeneration",
                "Qwen3_5ForConditionalGeneration-NoThink",
                "Qwen3_5MoeForConditionalGeneration-3.6",
            ),
        ),
        ("_prompt_completion", ("Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration")),
    )
    for name in names
}
# The tests with the vision-language model that needs torchvision.
WITH_TORCHVISION = (
    f"test_train_vlm[{VISION_MODEL}]",
    "test_train_vlm_multi_image",
    f"test_train_vlm_prompt_completion[{VISION_MODEL}]",
    "test_train_vlm_text_only_data",
    "test_train_vlm_text_only_data_packing",
    "test_pad_token_id_synced_with_model_config_vision",
)
if not is_torchvision_available():
    UNAVAILABLE |= dict.fromkeys(WITH_TORCHVISION, "The processor of Qwen2.5-VL needs torchvision.")

# Tests that P2DTrainer cannot pass by intent -> why.
_PACKED_LATER = (
    "P2DTrainer chooses samples and packs what it has chosen, in train(). The test looks for packs before that."
)
EXCLUDED: dict[str, str] = dict.fromkeys(("test_eval_packing", "test_only_train_packing"), _PACKED_LATER)

_IMAGES = ("has images", "P2D chooses heads and rows by text. It says so before anything is trained.")
# Tests of what P2DTrainer refuses: -> (the error's message, why). They pass if it does refuse.
REFUSED: dict[str, tuple[str, str]] = {
    f"test_train_vlm[{VISION_MODEL}]": _IMAGES,
    "test_train_vlm_multi_image": _IMAGES,
    f"test_train_vlm_prompt_completion[{VISION_MODEL}]": _IMAGES,
    "test_pad_token_id_synced_with_model_config_vision": _IMAGES,
    "test_train[trl-internal-testing/tiny-FalconMambaForCausalLM]": (
        "has no attention heads",
        "A model without attention has no heads to choose.",
    ),
}

# Test -> (what it says, what follows for P2DTrainer, why).
SAID_DIFFERENTLY: dict[str, tuple[str, str, str]] = {
    "test_train_with_set_chat_template_from_path": (
        "checkpoint-9",
        "checkpoint-3",
        "The last step of three epochs: 17 rows make three steps an epoch, the two of them that are chosen one.",
    ),
}


# -- what the tests say of SFTTrainer's weights, said of P2DTrainer's


class _AskFirst(ast.NodeTransformer):
    """Puts `if not only_heads_changed(...)` before the loops that compare all weights after a training with those before."""

    def visit_For(self, node: ast.For) -> ast.AST:
        if ast.unparse(node.iter) != "previous_trainable_params.items()":
            return node
        (condition,) = ast.parse("if not only_heads_changed(trainer, previous_trainable_params): ...").body
        assert isinstance(condition, ast.If)
        condition.body = [node]
        return condition


def adapt(path: Path, trainer: str) -> None:
    """
    Rewrite the file of tests: with the numbers of the stand-in's tokens and, for `P2DTrainer`, such that the tests ask
    [`only_heads_changed`] and expect what `SAID_DIFFERENTLY` says.
    """
    tree: ast.AST = ast.parse(path.read_text())
    _replace_constants(tree, TOKEN_NUMBERS)
    if trainer == "P2DTrainer":
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name in SAID_DIFFERENTLY:
                theirs, ours, _ = SAID_DIFFERENTLY[function.name]
                _replace_constants(function, {theirs: ours})
        tree = _AskFirst().visit(tree)
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))


def _replace_constants(tree: ast.AST, replacements: dict[Any, Any]) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (int, str):
            node.value = replacements.get(node.value, node.value)


def only_heads_changed(trainer: trl.SFTTrainer, before: dict[str, torch.Tensor]) -> bool:
    """
    What "all weights have changed" means for an adapter of P2DTrainer's own: all of the adapter's have, and no other.

    Args:
        trainer (`SFTTrainer`): A trainer after its training.
        before (`dict[str, torch.Tensor]`): The weights of its model before.

    Returns:
        `bool`: `False` if the model has another adapter, or none, and the test's own check has to be made.
    """
    model = trainer.model
    if not isinstance(model, peft.PeftModel) or not isinstance(model.active_peft_config, HeadSparseConfig):
        return False
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    assert trained, "Nothing was trained."
    for name, parameter in trained.items():
        assert not torch.equal(parameter, _start(model, name)), f"{name} has not changed."
    after = {_base_name(name): parameter for name, parameter in parameters.items() if not _is_adapters(name)}
    unseen = set(after)
    for name, parameter in before.items():
        if not _is_adapters(name):
            assert torch.equal(after[_base_name(name)], parameter), f"{name} has changed."
            unseen.remove(_base_name(name))
    assert not unseen, f"{unseen} were not there before."
    return True


def _is_adapters(name: str) -> bool:
    return any(part in name for part in ("head_sparse_", ".modules_to_save.", ".trainable_tokens_"))


def _base_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".token_adapter.", ".")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _start(model: peft.PeftModel, name: str) -> torch.Tensor:
    """What a trained weight was before: zeros for a head's, and what was there for the tokens of a cloned chat template."""
    assert _is_adapters(name), f"{name} was trained."
    place, _, rest = name.partition(".modules_to_save.")
    if rest:
        return model.get_submodule(place).original_module.get_parameter(rest.partition(".")[2])
    place, _, adapter = name.partition(".trainable_tokens_delta.")
    if adapter:
        tokens = model.get_submodule(place)
        return tokens.get_base_layer().weight[tokens.token_indices[adapter]]
    return torch.zeros_like(model.get_parameter(name))


# -- running


class Matrix:
    """The plugin for pytest that exchanges the trainer, leaves out what cannot be, and counts."""

    def __init__(self, trainer: str) -> None:
        self.trainer = trainer
        self.left_out = {"unavailable": UNAVAILABLE}
        self.to_refuse: dict[str, tuple[str, str]] = {}
        if trainer == "P2DTrainer":
            self.left_out["excluded"] = EXCLUDED
            self.to_refuse = REFUSED
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.asked: set[str] = set()
        self.running = ""

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left_out = [], []
        for item in items:
            name = _name(item.nodeid)
            for kind, reasons in self.left_out.items():
                if (reason := _entry(reasons, name)) is not None and name not in self.outcomes:
                    self.outcomes[name], self.reasons[name] = kind, reason
            (left_out if name in self.outcomes else kept).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
        for module in {item.module for item in items}:  # type: ignore[attr-defined]
            module.SFTTrainer = TRAINERS[self.trainer]
            module.only_heads_changed = self.only_heads_changed

    def only_heads_changed(self, trainer: trl.SFTTrainer, before: dict[str, torch.Tensor]) -> bool:
        asked = only_heads_changed(trainer, before)
        if asked:
            self.asked.add(self.running)
        return asked

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self.running = _name(item.nodeid)
        refusal = _entry(self.to_refuse, self.running)
        if refusal is None:
            return (yield)
        message, self.reasons[self.running] = refusal
        with pytest.raises(ValueError, match=message):
            yield
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = _name(report.nodeid)
        self.outcomes[name] = report.outcome
        if report.outcome == "passed" and name in self.reasons:
            self.outcomes[name] = "refused"
        if report.outcome == "skipped":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[name] = reason.removeprefix("Skipped: ")
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.errors[name] = (crash.message if crash is not None else report.longreprtext).strip().splitlines()[0]

    def summary(self) -> dict[str, Any]:
        of_outcome = {
            outcome: _grouped(
                {name: reason for name, reason in self.reasons.items() if self.outcomes[name] == outcome}
            )
            for outcome in ("refused", "skipped", *self.left_out)
        }
        return {
            "outcomes": dict(sorted(Counter(self.outcomes.values()).items())),
            **({"passed_with_the_weights_checked_as_p2d_means": len(self.asked)} if self.asked else {}),
            **{outcome: groups for outcome, groups in of_outcome.items() if groups},
            "failed": dict(sorted(self.errors.items())),
        }


def _entry(table: dict[str, Any], name: str) -> Any:
    """What a table says of a test: of this case, or of all of its cases."""
    return table.get(name, table.get(name.partition("[")[0]))


def _name(nodeid: str) -> str:
    return nodeid.rpartition(".py::")[2].rpartition("::")[2]


def _grouped(reasons: dict[str, str]) -> list[dict[str, Any]]:
    """The cases of one test with one reason, counted."""
    counts = Counter((name.partition("[")[0], reason) for name, reason in reasons.items())
    return [{"test": test, "reason": reason, "count": count} for (test, reason), count in sorted(counts.items())]


def run(trainer: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """Run the tests with a trainer, in a process of its own, where the libraries find the stand-ins; returns the summary."""
    tests = folder / trainer / "tests"
    adapt(tests / FILE, trainer)
    # SFTConfig has bf16 on, for which training arguments want a GPU or `use_cpu=True`; a CPU computes in bf16 as well
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    os.chdir(folder)
    sys.path.append(str(folder / "plugins"))
    matrix = Matrix(trainer)
    command = [str(tests / FILE), "-c", str(folder / "pytest.ini"), f"--rootdir={tests.parent}"]
    command += ["-p", "no:cacheprovider", "-q", "--tb=short", "-W", "ignore", *options]
    code = pytest.main(command, plugins=[matrix])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"The tests could not be run: {code!r}.")
    return matrix.summary()


def main(argv: list[str] | None = None) -> int:
    """Run the tests; returns 1 if one failed with `P2DTrainer` and not with `SFTTrainer`."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--tests", type=Path, required=True, help="the `tests` folder of a checkout of TRL")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("-k", dest="expression", help="only tests that match, as in pytest")
    parser.add_argument("-x", dest="stop", action="store_true", help="stop at the first failure")
    arguments = parser.parse_args(argv)
    if not (arguments.tests / FILE).is_file():
        parser.error(f"--tests must be the `tests` folder of a checkout of TRL, '{arguments.tests}' has no {FILE}")
    options = ["-k", arguments.expression] if arguments.expression else []
    options += ["-x"] if arguments.stop else []

    summary: dict[str, Any] = {module.__name__: module.__version__ for module in (trl, torch, transformers, peft)}
    version = arguments.tests.parent / "VERSION"  # as in a checkout
    summary["tests_of_trl"] = version.read_text().strip() if version.is_file() else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_datasets(folder)
        make_models(folder / "huggingface" / "hub")
        (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n")
        (folder / "plugins").mkdir()
        if importlib.util.find_spec("pytest_datadir") is None:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*command, "--target", str(folder / "plugins"), "pytest-datadir"], check=True)
        # read by the libraries when they are imported, so that each run is a process of its own
        os.environ |= {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1"}
        os.environ.pop("HF_HUB_CACHE", None)
        for trainer in arguments.trainers:
            shutil.copytree(arguments.tests, folder / trainer / "tests")
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                summary[trainer] = executor.submit(run, trainer, folder, options).result()

    baseline, ours = (summary.get(trainer, {}).get("failed", {}) for trainer in ("SFTTrainer", "P2DTrainer"))
    # these say nothing of P2DTrainer: the tests may be of another version of TRL
    summary["failed_with_both"] = sorted(set(baseline) & set(ours))
    print(json.dumps(summary, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n")
    return int(bool(set(ours) - set(baseline)))


if __name__ == "__main__":
    sys.exit(main())
