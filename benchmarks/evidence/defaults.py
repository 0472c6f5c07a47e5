"""The defaults of `P2DConfig`, each against what could stand in its place."""

from __future__ import annotations

from dataclasses import dataclass

from p2d_peft import P2DConfig

from .claims import EPOCHS, P2D
from .summary import Comparison, Evidence, comparable, compare


# The sides on which shares of heads and of rows are tried: cheaper to train, the same on both.
TRIED = ("affinity:proxy/first/robin", "heads:proxy/last")


@dataclass(frozen=True)
class Alternative:
    """
    Another choice for one default.

    Args:
        field (`str`): The field of `P2DConfig`.
        instead (`str`): What stands in the default's place, in words.
        ours (`tuple[str, str]`), theirs (`tuple[str, str]`): Data and parameters of the sides.
        setting (`str`): Where the two are compared.
    """

    field: str
    instead: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    setting: str = "mixed"

    @property
    def default(self) -> str:
        """The field with its default."""
        value = "proxy" if self.field == "localize_method" else getattr(P2DConfig, self.field)
        return f"{self.field}={value}"


def _layers(instead: str, parameters: str) -> Alternative:
    return Alternative("train_last_layers", instead, (TRIED[0], P2D[1]), (TRIED[0], parameters))


def _method(instead: str, method: str) -> Alternative:
    return Alternative("localize_method", instead, P2D, (P2D[0], P2D[1].replace("proxy", method)))


def _rows(field: str, instead: str, data: str, setting: str = "mixed") -> Alternative:
    return Alternative(field, instead, P2D, (data, P2D[1]), setting)


def _heads(instead: str, parameters: str) -> Alternative:
    return Alternative("head_ratio", instead, TRIED, (TRIED[0], parameters))


def _ratio(instead: str, data: str) -> Alternative:
    return Alternative("data_ratio", instead, TRIED, (data, TRIED[1]))


ALTERNATIVES = (
    _layers("heads of all layers", "heads:proxy"),
    _layers("heads of the last third of the layers", "heads:proxy/last"),
    _method("random heads", "random"),
    *(_method(f"`{method}`", method) for method in ("gate", "gain", "taylor", "fisher", "agreement", "magnitude")),
    Alternative(
        "heads_per_layer", "the best heads of all layers, wherever they lie", P2D, (P2D[0], "heads:proxy/global")
    ),
    _heads("a hundredth", f"{TRIED[1]}@0.01"),
    _heads("a twentieth", f"{TRIED[1]}@0.05"),
    _heads("three tenths", f"{TRIED[1]}@0.3"),
    _rows("scorer", "random rows", "random"),
    _rows("scorer", "random rows", "random", "own"),
    _rows("scorer", "`bm25`", "bm25/robin"),
    _rows("scorer", "`rds`", "rds/robin"),
    _rows("scorer", "`less`", "less/robin"),
    _rows("scorer", "`gradient`", "gradient:proxy/robin"),
    _rows("scorer", "`icl`, the paper's", "icl:proxy"),
    _rows("scorer", "`influence`", "influence:proxy"),
    _rows("scorer", "`ifd`", "ifd"),
    _rows("scorer", "`perplexity`", "perplexity"),
    _rows("score_first_layers", "heads of the first third of the layers", "affinity:proxy/first/robin"),
    _rows("score_first_layers", "heads of all layers", "affinity:proxy/robin"),
    _rows("round_robin", "the best scores", "affinity:proxy/fifth", "own"),
    _ratio("a hundredth", f"{TRIED[0]}@0.01"),
    _ratio("a twentieth", f"{TRIED[0]}@0.05"),
    _ratio("three tenths", f"{TRIED[0]}@0.3"),
    _ratio("all rows", "full"),
)


def measured(evidence: Evidence) -> list[tuple[Alternative, Comparison, float | None]]:
    """The alternatives that were run, how the default compares with each, and its seconds over theirs, where they can be compared."""
    found = []
    for alternative in ALTERNATIVES:
        comparison = compare(
            evidence, alternative.ours, alternative.theirs, setting=alternative.setting, epochs=EPOCHS
        )
        if comparison is not None:
            found.append((alternative, comparison, _seconds(evidence, alternative, comparison)))
    return found


def _seconds(evidence: Evidence, alternative: Alternative, comparison: Comparison) -> float | None:
    ours, theirs = (
        [evidence.lines[(alternative.setting, target, *side, EPOCHS)] for target in comparison.of_targets]
        for side in (alternative.ours, alternative.theirs)
    )
    if not comparable(ours + theirs):
        return None
    taken = [sum(line.seconds("localize", "select", "train") for line in lines) for lines in (ours, theirs)]
    return taken[0] / taken[1]
