from types import SimpleNamespace

import pytest

from p2d_peft import HeadSparseConfig
from p2d_peft.trainer.added_tokens import brings_tokens, learn_tokens

from ..tiny_models import LAYOUTS, tiny_model


MODELS = {"llama": tiny_model, "gpt-neox": LAYOUTS["gpt-neox"].model}


@pytest.mark.parametrize(("name", "embeddings"), [("llama", "embed_tokens"), ("gpt-neox", "embed_in")])
def test_the_model_says_what_its_embeddings_are_called(name, embeddings):
    config, model = HeadSparseConfig(trainable_token_indices=[3]), MODELS[name]()
    # transformers renamed gpt-neox's within its version 5
    head = "lm_head" if hasattr(model, "lm_head") else "embed_out"
    learn_tokens(config, [7, 8], model)
    assert config.trainable_token_indices == {embeddings: [3, 7, 8]} and config.modules_to_save == [head]
    learn_tokens(config, [9], model)
    assert config.trainable_token_indices == {embeddings: [3, 7, 8, 9]} and config.modules_to_save == [head]


def test_a_template_file_brings_no_tokens(tmp_path):
    (tmp_path / "chat.jinja").write_text("")
    for path, brings in ((None, False), (tmp_path / "chat.jinja", False), (tmp_path, True), ("org/name", True)):
        assert brings_tokens(SimpleNamespace(chat_template_path=path and str(path))) is brings
