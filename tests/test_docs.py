"""Every code block of the README and of the docs runs: Python in order, with tiny stand-ins for what the Hub would give."""

import re
import shlex
from pathlib import Path

import datasets
import matplotlib
import pytest
import transformers
from transformers import training_args
from trl.trainer import sft_trainer

from p2d_peft import cli
from p2d_peft.commands import sft
from p2d_peft.commands.launch import launch_arguments

from .tiny_data import conversational
from .tiny_models import tiny_model, tiny_tokenizer


matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, *languages):
    return [code for language, code in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


# docs/hub.md is run by tests/trainer/test_hub.py, in a process that takes a local server for the Hub
IN_PROCESS = [page for page in PAGES if page.name != "hub.md" and blocks(page, "python")]


@pytest.mark.parametrize("page", IN_PROCESS, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_model())
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: tiny_model().config)
    monkeypatch.setattr(sft_trainer, "create_model_from_path", lambda *_, **__: tiny_model())
    for name in ("AutoTokenizer", "AutoProcessor"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, **__: tiny_tokenizer())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: conversational(40))
    # SFTConfig's default, bf16, is refused on a machine without a GPU
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    namespace = {}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)


def test_there_are_blocks_to_run():
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_call_what_exists(page, monkeypatch):
    """
    The commands themselves run in CI (scripts/test.sh), in tests/test_quickstart.py and in tests/commands; here their names
    and flags are held.
    """
    monkeypatch.chdir(ROOT)
    for code in blocks(page, "bash", "sh"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            for word in words:
                if re.match(r"(scripts|examples|benchmarks|\.ci)/", word):
                    assert (ROOT / word).is_file(), word
            if words[:1] == ["p2d"]:
                parse(*words[1:])


def parse(command, *arguments):
    """Parse what stands behind `p2d` and run nothing; what is wrong with it ends in an exception."""
    if command != "sft":
        cli.make_parser().parse_args([command, *arguments])
        return
    *_, unknown = sft.make_parser().parse_args_and_config([*arguments, "--use_cpu"], return_remaining_strings=True)
    launch_arguments(unknown, ["sft"])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_yaml_blocks_are_recipes(page, tmp_path):
    for code in blocks(page, "yaml"):
        (tmp_path / "recipe.yaml").write_text(code, encoding="utf-8")
        # raises at a key that it does not know
        sft.make_parser().parse_args_and_config(["--config", f"{tmp_path}/recipe.yaml", "--use_cpu"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_escapes_the_tests(page):
    languages = {language for language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert languages <= {"python", "bash", "sh", "text", "yaml", "bibtex"}
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(BLOCK.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_takes_from_other_files_is_there(page):
    for name, _, section in re.findall(
        r'^--8<-- "([^":]+)(:(\w+))?"$', page.read_text(encoding="utf-8"), re.MULTILINE
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not section or (f"[start:{section}]" in text and f"[end:{section}]" in text), (name, section)


def test_what_one_adds_is_short():
    for code in blocks(ROOT / "docs" / "extending.md", "python"):
        assert len(code.splitlines()) < 40
