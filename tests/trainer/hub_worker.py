"""What test_hub.py runs in a process that takes a local server for the Hub; `python -m tests.trainer.hub_worker`."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback, training_args

from p2d_peft import HeadSet, P2DConfig, P2DTrainer
from tests.test_docs import ROOT, blocks
from tests.tiny_data import conversational, prompt_completion
from tests.tiny_models import tiny_model, tiny_tokenizer


BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the name; the model is tiny
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def push_base() -> None:
    HfApi().create_repo(BASE)
    tiny_model().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    HfApi().upload_folder(repo_id=BASE, folder_path="base")


def trainer(repo_id: str, base: str = BASE, **changes: object) -> P2DTrainer:
    """A trainer of four steps, with a checkpoint after the second and the fourth."""
    values = {
        "bf16": False,
        "report_to": "none",
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-1,
        "data_ratio": 0.5,
        "head_ratio": 0.25,
        "localize_method": "taylor",
        "reference_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": repo_id,
        "hub_always_push": True,
    }
    args = P2DConfig(repo_id.replace("/", "-"), **{**values, **changes})
    return P2DTrainer(base, args, train_dataset=prompt_completion(32), target_dataset=prompt_completion(6, seed=1))


def wait_for_pushes(run: P2DTrainer) -> None:
    for job in run.push_in_progress.jobs if run.push_in_progress is not None else ():
        job.result()  # raises what the push raised


class PushBeforeTheNextStep(TrainerCallback):
    """Trainer pushes beside the training, and what it reads may be of a later step."""

    def __init__(self, run: P2DTrainer) -> None:
        self.run = run

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        wait_for_pushes(self.run)


def train(run: P2DTrainer) -> None:
    run.add_callback(PushBeforeTheNextStep(run))
    run.train()
    wait_for_pushes(run)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def a_run_and_back() -> P2DTrainer:
    run = trainer("user/adapter", hub_strategy="checkpoint")
    train(run)
    run.push_to_hub(dataset_name="user/data")

    base = AutoModelForCausalLM.from_pretrained(BASE)
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, "user/adapter")
    assert torch.equal(logits(loaded), logits(run.model))
    assert not torch.equal(logits(loaded), before)
    # what the card says, as it stands
    card = ModelCard.load("user/adapter")
    assert (card.data.base_model, card.data.datasets) == (BASE, "user/data")
    namespace: dict = {}
    exec(first_block(card.text), namespace)
    assert torch.equal(logits(namespace["model"]), logits(run.model))
    assert namespace["tokenizer"]("copy") == run.processing_class("copy")
    with open("expected.json", "w") as file:
        data = {"block": first_block(card.text), "ids": IDS.tolist(), "logits": logits(run.model).tolist()}
        json.dump(data, file)

    assert HeadSet.from_pretrained("user/adapter") == run.heads
    assert HeadSet.from_pretrained("user/adapter", subfolder="last-checkpoint") == run.heads
    return run


def first_block(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


def resume_from_the_hub(whole: P2DTrainer) -> None:
    folder = snapshot_download("user/adapter", allow_patterns="last-checkpoint/*")
    resumed = trainer("user/resumed", push_to_hub=False)
    resumed.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
    assert resumed.heads == whole.heads and resumed.report.selected_rows == whole.report.selected_rows
    assert torch.equal(resumed.head_scores.values, whole.head_scores.values)
    assert torch.equal(logits(resumed.model), logits(whole.model))


def other_strategies() -> None:
    # a base that is not on the Hub, which refuses cards that name it
    run = trainer("user/all", base=str(Path("base").resolve()), hub_strategy="all_checkpoints")
    train(run)
    run = trainer("user/end", hub_strategy="end")
    train(run)
    run.save_model()  # which pushes


def heads_alone() -> None:
    heads = HeadSet([(0, 1), (2, 3)])
    info = heads.push_to_hub("heads", private=True)  # into one's own namespace
    assert HeadSet.from_pretrained("user/heads") == heads
    HeadSet([(1, 1)]).push_to_hub("user/heads", commit_message="Other heads")
    assert HeadSet.from_pretrained("user/heads") == HeadSet([(1, 1)])
    assert HeadSet.from_pretrained("user/heads", revision=info.oid) == heads
    assert HeadSet.from_pretrained("user/heads", local_files_only=True) == HeadSet([(1, 1)])
    request = heads.push_to_hub("user/heads", create_pr=True)
    assert HeadSet.from_pretrained("user/heads", revision=request.pr_revision) == heads
    assert HeadSet.from_pretrained("user/heads") == HeadSet([(1, 1)])

    with pytest.raises(FileNotFoundError, match=r"The Hub repository '.*' has no 'p2d_heads\.json'"):
        HeadSet.from_pretrained(BASE)
    with pytest.raises(FileNotFoundError, match=r"'user/heads' has no 'sub/p2d_heads\.json'"):
        HeadSet.from_pretrained("user/heads", subfolder="sub")
    with pytest.raises(RepositoryNotFoundError):
        HeadSet.from_pretrained("user/nothing")
    with pytest.raises(RevisionNotFoundError):
        HeadSet.from_pretrained("user/heads", revision="nowhere")
    with pytest.raises(HfHubHTTPError, match="401"):
        heads.push_to_hub("user/heads", token="hf_wrong")

    for content, message in (
        (b"{", "not a JSON file"),
        (b'{"format": "p2d_peft.HeadSet", "heads": {"0": [-1]}}', "holds no head set.*counted from 0"),
    ):
        HfApi().upload_file(path_or_fileobj=content, path_in_repo="p2d_heads.json", repo_id="user/heads")
        with pytest.raises(ValueError, match=rf"p2d_heads\.json'.*{message}"):
            HeadSet.from_pretrained("user/heads")


def page_of_the_docs() -> None:
    datasets.load_dataset = lambda *_, **__: conversational(40)
    # SFTConfig's default, bf16, is refused on a machine without a GPU
    training_args.is_torch_bf16_gpu_available = lambda: True
    namespace: dict = {}
    for number, code in enumerate(blocks(ROOT / "docs" / "hub.md", "python")):
        exec(compile(code, f"hub.md, block {number}", "exec"), namespace)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.set_seed(0)
    push_base()
    resume_from_the_hub(a_run_and_back())
    other_strategies()
    heads_alone()
    page_of_the_docs()
