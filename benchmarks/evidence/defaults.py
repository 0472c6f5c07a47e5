"""The defaults of `P2DConfig`, each against what could stand in its place."""

from __future__ import annotations

from dataclasses import dataclass

from p2d_peft import P2DConfig

from .claims import EPOCHS, P2D
from .summary import Comparison, Evidence, compare


@dataclass(frozen=True)
class Alternative:
    """
    Another choice for one default.

    Args:
        field (`str`): The field of `P2DConfig`.
        instead (`str`): What stands in the default's place, in words.
        data (`str`), parameters (`str`): The side that has it.
        setting (`str`): Where the two are compared.
    """

    field: str
    instead: str
    data: str = P2D[0]
    parameters: str = P2D[1]
    setting: str = "mixed"

    @property
    def default(self) -> str:
        """The field with its default."""
        value = getattr(P2DConfig, self.field)
        return f"{self.field}={'proxy' if self.field == 'localize_method' else value}"


ALTERNATIVES = (
    Alternative("localize_method", "random heads", parameters="heads:random/last"),
    Alternative("localize_method", "`gate`", parameters="heads:gate/last"),
    Alternative("localize_method", "`gain`", parameters="heads:gain/last"),
    Alternative("train_last_layers", "heads of all layers", parameters="heads:proxy"),
    Alternative("head_ratio", "a hundredth", parameters="heads:proxy/last@0.01"),
    Alternative("head_ratio", "a twentieth", parameters="heads:proxy/last@0.05"),
    Alternative("head_ratio", "three tenths", parameters="heads:proxy/last@0.3"),
    Alternative("scorer", "random rows", data="random"),
    Alternative("scorer", "random rows", data="random", setting="own"),
    Alternative("scorer", "`rds`", data="rds/robin"),
    Alternative("scorer", "`bm25`", data="bm25/robin"),
    Alternative("scorer", "`gradient`", data="gradient:proxy/robin"),
    Alternative("scorer", "`icl`, the paper's", data="icl:proxy"),
    Alternative("score_first_layers", "heads of all layers", data="affinity:proxy/robin"),
    Alternative("round_robin", "the best scores", data="affinity:proxy/first", setting="own"),
    Alternative("data_ratio", "a hundredth", data=f"{P2D[0]}@0.01"),
    Alternative("data_ratio", "a twentieth", data=f"{P2D[0]}@0.05"),
    Alternative("data_ratio", "three tenths", data=f"{P2D[0]}@0.3"),
    Alternative("data_ratio", "all rows", data="full"),
)


def measured(evidence: Evidence) -> list[tuple[Alternative, Comparison, float]]:
    """The alternatives that were run, how the default compares with each, and its seconds over theirs."""
    found = []
    for alternative in ALTERNATIVES:
        theirs = (alternative.data, alternative.parameters)
        comparison = compare(evidence, P2D, theirs, setting=alternative.setting, epochs=EPOCHS)
        if comparison is not None:
            found.append((alternative, comparison, _seconds(evidence, alternative, comparison)))
    return found


def _seconds(evidence: Evidence, alternative: Alternative, comparison: Comparison) -> float:
    ours, theirs = (
        sum(
            evidence.lines[(alternative.setting, target, *side, EPOCHS)].seconds("localize", "select", "train")
            for target in comparison.of_targets
        )
        for side in (P2D, (alternative.data, alternative.parameters))
    )
    return ours / theirs
