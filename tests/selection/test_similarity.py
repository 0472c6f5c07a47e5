import torch

from p2d_peft.selection.scoring import ScoringContext
from p2d_peft.selection.similarity import similarity_to_target

from ..tiny_models import tiny_model, tiny_tokenizer
from .direct import samples_of


def test_similarities_keep_their_digits_under_autocast():
    samples = samples_of()
    features = torch.randn(24, 300)
    context = ScoringContext(
        tiny_model(), tiny_tokenizer(), None, samples.subset([0, 1, 2]), None, 8, 0, torch.device("cpu")
    )
    score = similarity_to_target(context, lambda part: features[part.rows], centred=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = score(samples)
    exact = torch.nn.functional.cosine_similarity(features[:, None], features[None, :3], dim=2)
    torch.testing.assert_close(found.per_target, exact, rtol=1e-5, atol=1e-6)
    assert found.scores.dtype == torch.float32
