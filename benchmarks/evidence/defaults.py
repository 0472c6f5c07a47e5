"""The defaults of `P2DConfig`, each against what could stand in its place."""

from __future__ import annotations

from dataclasses import dataclass

from p2d_peft import P2DConfig

from .claims import EPOCHS, FOUND, MORE_SAMPLES, P2D
from .summary import Comparison, Evidence, comparable, compare


# The sides on which shares of heads and of rows were tried when heads were found: cheaper to train.
TRIED = ("affinity:proxy/first/robin", "heads:proxy/last")
# Other ways to choose rows were run with found heads to train, on which rows are chosen by P2DTrainer's defaults as well.
WITH_FOUND_HEADS = (P2D[0], FOUND[1])


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
        return f"{self.field}={getattr(P2DConfig, self.field)}"

    @property
    def same(self) -> str:
        """What both sides have: the rows, or the weights, or neither."""
        return next((f"`{a}`" for a, b in zip(self.ours, self.theirs, strict=True) if a == b), "")


def _layers(instead: str, share: str) -> list[Alternative]:
    return [
        Alternative("train_last_layers", instead, (rows, f"heads:{method}/late"), (rows, f"heads:{method}{share}"))
        for rows, method in ((P2D[0], "random"), (TRIED[0], "proxy"))
    ]


def _method(method: str) -> Alternative:
    return Alternative("localize_method", f"`{method}`", (FOUND[0], P2D[1]), (FOUND[0], f"heads:{method}/late"))


def _rows(instead: str, data: str) -> Alternative:
    return Alternative("scorer", instead, WITH_FOUND_HEADS, (data, FOUND[1]))


def _scoring(instead: str, share: str) -> list[Alternative]:
    return [
        Alternative("score_first_layers", instead, side, (side[0].replace("/fifth", share), side[1]))
        for side in (P2D, FOUND)
    ]


def _heads(instead: str, share: str) -> list[Alternative]:
    return [Alternative("head_ratio", instead, side, (side[0], f"{side[1]}{share}")) for side in (P2D, TRIED)]


def _samples(instead: str, count: str, setting: str) -> Alternative:
    return Alternative("target_samples", instead, MORE_SAMPLES, (f"{P2D[0]}{count}", P2D[1]), setting)


def _ratio(instead: str, share: str) -> list[Alternative]:
    return [Alternative("data_ratio", instead, side, (f"{side[0]}{share}", side[1])) for side in (P2D, TRIED)]


ALTERNATIVES = (
    *_layers("heads of all layers", ""),
    *_layers("heads of the last third of the layers", "/last"),
    Alternative("localize_method", "`proxy`, the paper's, for rows and weights", P2D, FOUND),
    Alternative("localize_method", "`proxy` for the rows", P2D, (FOUND[0], P2D[1])),
    Alternative("localize_method", "`proxy` for the weights", P2D, WITH_FOUND_HEADS),
    *map(_method, ("proxy", "gate", "gain", "taylor", "fisher", "agreement", "magnitude")),
    Alternative(
        "heads_per_layer", "the best heads of all layers, wherever they lie", FOUND, (FOUND[0], "heads:proxy/global")
    ),
    Alternative(
        "heads_per_group", "one of those that share keys and values", FOUND, (FOUND[0], "heads:proxy/late-groups")
    ),
    *_heads("a hundredth", "@0.01"),
    *_heads("a twentieth", "@0.05"),
    *_heads("three tenths", "@0.3"),
    Alternative("head_ratio", "all heads, of all layers", P2D, (P2D[0], "heads:all")),
    Alternative("scorer", "random rows", P2D, ("random", P2D[1])),
    Alternative("scorer", "random rows", P2D, ("random", P2D[1]), "own"),
    _rows("`bm25`", "bm25/robin"),
    _rows("`rds`", "rds/robin"),
    _rows("`less`", "less/robin"),
    _rows("`gradient`", "gradient:random/robin"),
    _rows("`icl`, the paper's", "icl:proxy"),
    _rows("`influence`", "influence:random"),
    _rows("`ifd`", "ifd"),
    _rows("`perplexity`", "perplexity"),
    *_scoring("heads of the first third of the layers", "/first"),
    *_scoring("heads of all layers", ""),
    Alternative("round_robin", "the best scores", P2D, ("affinity:random/fifth", P2D[1]), "own"),
    Alternative("round_robin", "the best scores", FOUND, ("affinity:proxy/fifth", FOUND[1]), "own"),
    Alternative("round_robin", "turns, then `Diverse`", P2D, (f"{P2D[0]}/diverse", P2D[1]), "own"),
    Alternative("round_robin", "turns, then `Diverse`", P2D, (f"{P2D[0]}/diverse", P2D[1])),
    Alternative("round_robin", "`Diverse`", P2D, ("affinity:random/fifth/diverse", P2D[1]), "own"),
    _samples("40, as in all other rows", "", "mixed"),
    _samples("40, as in all other rows", "", "own"),
    _samples("10", "/from10", "mixed"),
    *_ratio("a hundredth", "@0.01"),
    *_ratio("a twentieth", "@0.05"),
    *_ratio("three tenths", "@0.3"),
    Alternative("data_ratio", "all rows", P2D, ("full", P2D[1])),
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
