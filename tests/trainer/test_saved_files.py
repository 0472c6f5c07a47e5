import sys

import torch
from peft import LoraConfig, PeftModel

from p2d_peft import HeadScores, HeadSet, HeadSparseConfig
from p2d_peft.trainer.saved_files import load_head_scores, save_beside_model, save_heads

from ..tiny_models import tiny_model
from .test_model_card import trainer


MAP = ("p2d_heads.json", "p2d_head_scores.json", "p2d_heads.png")
LORA = ("lora/adapter_config.json", "lora/adapter_model.safetensors")


def there(folder, names=MAP + LORA):
    return [name for name in names if (folder / name).is_file()]


def test_a_result_has_head_map_picture_and_lora_and_a_checkpoint_the_head_map(tmp_path):
    run = trainer(tmp_path, changes={"save_strategy": "steps", "save_steps": 1, "localize_method": "taylor"})
    run.train()
    assert there(tmp_path / "checkpoint-1") == list(MAP[:2])
    run.save_model(str(tmp_path / "result"))
    assert there(tmp_path / "result") == [*MAP, *LORA]
    for folder in (tmp_path / "checkpoint-1", tmp_path / "result"):
        assert HeadSet.from_pretrained(folder) == run.heads
        assert torch.equal(load_head_scores(folder).values, run.head_scores.values)

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        lora = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "result" / "lora")).eval()
        torch.testing.assert_close(lora(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)

    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(resumed.head_scores.values, run.head_scores.values)


def test_what_is_up_to_date_is_not_touched(tmp_path):
    # it may be on its way to the Hub, in the background
    heads, model = HeadSet([(0, 1)]), tiny_model()
    save_heads(tmp_path, model, heads, HeadScores(torch.ones(3, 4), "proxy"))
    before = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    assert there(tmp_path) == list(MAP)
    save_heads(tmp_path, model, heads, HeadScores(torch.ones(3, 4), "proxy"))
    assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == before


def test_the_picture_of_a_draw_shows_no_scores(tmp_path):
    heads, model = HeadSet([(0, 1)]), tiny_model()
    for name, scores in (("drawn", HeadScores(torch.rand(3, 4), "random")), ("given", None)):
        save_heads(tmp_path / name, model, heads, scores)
    drawn, given = ((tmp_path / name / "p2d_heads.png").read_bytes() for name in ("drawn", "given"))
    assert drawn == given and there(tmp_path / "drawn") == list(MAP)  # by which the draw can be made again


def test_what_an_earlier_run_left_gives_way(tmp_path):
    model = tiny_model()
    save_heads(tmp_path, model, HeadSet([(0, 1)]), HeadScores(torch.ones(3, 4), "proxy"))
    first = (tmp_path / "p2d_heads.png").read_bytes()
    save_heads(tmp_path, model, HeadSet([(2, 2)]), None)
    assert there(tmp_path) == ["p2d_heads.json", "p2d_heads.png"]
    assert (tmp_path / "p2d_heads.png").read_bytes() != first
    save_heads(tmp_path, model, HeadSet([(2, 3)]), None, picture=False)
    assert there(tmp_path) == ["p2d_heads.json"]  # not the picture of other heads
    save_heads(tmp_path, model, None, None)
    assert there(tmp_path) == []


def test_without_matplotlib_the_picture_is_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO", logger="p2d_peft"):
        save_heads(tmp_path, tiny_model(), HeadSet([(0, 1)]), None)
    assert there(tmp_path) == ["p2d_heads.json"]
    (record,) = caplog.records
    assert "There is no p2d_heads.png" in record.message and "pip install 'p2d_peft[plots]'" in record.message


def test_no_lora_of_what_fits_into_none(tmp_path, caplog):
    model = tiny_model("llama-mha-bias")
    run = trainer(tmp_path, model, peft_config=HeadSparseConfig(heads=[0], bias="all", task_type="CAUSAL_LM"))
    run.train()
    (tmp_path / "lora").mkdir()
    for name in LORA:
        (tmp_path / name).touch()  # of an earlier run
    with caplog.at_level("INFO", logger="p2d_peft"):
        run.save_model()
    assert there(tmp_path, LORA) == []
    assert "No LoRA was saved. Adapter 'default' trains biases" in caplog.text


def test_no_lora_of_shards_or_of_another_adapter(tmp_path, caplog):
    run = trainer(tmp_path)
    run.train()
    with caplog.at_level("INFO", logger="p2d_peft"):
        save_beside_model(run, tmp_path / "sharded", is_whole=False)
    assert there(tmp_path / "sharded") == [*MAP] and "the weights are sharded" in caplog.text
    adapter = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    other = trainer(tmp_path / "other", changes={"p2d": False}, peft_config=adapter)
    other.save_model()
    assert there(tmp_path / "other") == []


def test_a_folder_that_is_called_like_a_checkpoint_is_a_result(tmp_path):
    run = trainer(tmp_path)
    run.train()
    for name in ("checkpoint-final", "checkpoint-1-best", "my-checkpoint-1"):
        run.save_model(str(tmp_path / name))
        assert there(tmp_path / name) == [*MAP, *LORA], name
