"""Settings for all tests: offline, quiet, and with the same random numbers in each."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
import transformers


@pytest.fixture(autouse=True)
def _seed() -> None:
    transformers.set_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    # tiny matrices: more threads only wait for one another
    torch.set_num_threads(1)
