"""
The claims, and whether the evidence bears them out.

The claims and their bounds were set before the arms were run. What they are judged by was not: `P2D` are P2DTrainer's defaults,
which were changed four times, each time after others had been looked at on the same targets' test rows. So `variants` judges what
else was looked at, too. The first and the third claim are about heads that are found, and judged by these (`FOUND`), whether or not
the defaults find any.

While results of a target are missing that could change a verdict, a claim is not decided. A claim about the mean over the targets
needs all of them, since one can turn the mean; the first claim, which counts targets, may be decided before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from localize_report import difference_text, paired

from p2d_peft import P2DConfig

from .profile import ALL_HEADS, Parameters
from .summary import REFERENCE, Comparison, Evidence, Line, Result, comparable, compare


P2D = ("affinity:random/fifth/robin", "heads:random/late")
# the same with heads that are found by the paper's method
FOUND = ("affinity:proxy/fifth/robin", "heads:proxy/late")
LORA = (P2D[0], "lora-attention")
# the same with as many samples of the target as P2DTrainer takes at most; a problem has fewer
MORE_SAMPLES = (f"{P2D[0]}/from{P2DConfig.target_samples}", P2D[1])
# what was tried beside it, and what it was before, the newest first
VARIANTS = (
    MORE_SAMPLES,
    FOUND,
    (FOUND[0], P2D[1]),
    ("affinity:proxy/first/robin", "heads:proxy/late"),
    ("affinity:proxy/first/robin", "heads:proxy"),
    ("affinity:proxy/first/robin", "heads:proxy/last"),
    ("affinity:proxy", "heads:proxy"),
)
# heads that no method found
CONTROLS = ("random", "magnitude", ALL_HEADS)
# whose heads score in the place of those that are found
COUPLING_CONTROLS = ("affinity:random/fifth/robin", "affinity:all/fifth/robin")
# By `FOUND` heads of the first layers score and heads of the later ones are trained. The paper's form: the same do both.
SAME_HEADS = ("affinity:proxy", "heads:proxy")
SAME_HEADS_CONTROLS = ("affinity:random", "affinity:all")
# the whole of it: these heads score by attention, and the best scores are kept
PAPER = ("icl:proxy", "heads:proxy")
# a choice of the adapter's configuration, not of P2DConfig
WITHOUT_KV = (FOUND[0], "heads-qo:proxy/late")
EPOCHS = 3
# targets of the full comparison, and how many of them the first claim asks for
ALL_TARGETS, ENOUGH_TARGETS = 4, 3
LEAST_GAIN_OF_DATA = 0.083
MOST_LOSS, MOST_AER = 0.01, 0.10

HELD, NOT_HELD, UNDECIDED = "held", "not held", "not decided"


@dataclass(frozen=True)
class Claim:
    """
    One claim and what became of it.

    Args:
        text (`str`): What is claimed.
        verdict (`str`): `HELD`, `NOT_HELD` or `UNDECIDED`.
        figures (`list[str]`): The numbers that say so.
    """

    text: str
    verdict: str
    figures: list[str]


@dataclass(frozen=True)
class Variant:
    """
    What became of the last two claims with other rows and weights in the place of the defaults.

    Args:
        side (`tuple[str, str]`): The rows and the weights.
        exact_match (`dict`, *optional*): Against full fine-tuning; None where it has no arms.
        pairs (`int`): Of how many pairs of target and seed.
        aer (`float`, *optional*): The mean over the targets.
        whole (`str`), forgetting (`str`): The verdicts.
    """

    side: tuple[str, str]
    exact_match: dict[str, Any] | None
    pairs: int
    aer: float | None
    whole: str
    forgetting: str


def variants(evidence: Evidence) -> list[Variant]:
    """The defaults, and what else was looked at, whether it has arms or not."""
    found = []
    for side in (P2D, *VARIANTS):
        full = compare(evidence, side, REFERENCE, epochs=EPOCHS)
        verdicts = [claim(evidence, side).verdict for claim in (_whole, _forgetting)]
        aer = _mean(_aers(evidence, _lines(evidence, side)))
        found.append(Variant(side, full and full.exact_match, full.pairs if full else 0, aer, *verdicts))
    return found


def judge(evidence: Evidence) -> list[Claim]:
    """All claims, in the order in which they have to stand."""
    return [_heads(evidence), _data(evidence), _coupling(evidence), _whole(evidence), _forgetting(evidence)]


def points(difference: dict[str, Any]) -> str:
    """A difference of shares in points, with its interval."""
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def nll_text(comparison: Comparison) -> str:
    return f"NLL {difference_text(comparison.nll, 3)}"


def _figure(what: str, comparison: Comparison) -> str:
    return f"{what}: {points(comparison.exact_match)} exact match, {nll_text(comparison)}, {comparison.pairs} pairs"


def _settled(held: bool, n_targets: int) -> str:
    """The verdict on a claim about the mean over the targets, of which so many have results."""
    return UNDECIDED if n_targets < ALL_TARGETS else HELD if held else NOT_HELD


def _heads(evidence: Evidence) -> Claim:
    text = "Heads matter: localized heads beat as many random heads on the same rows, on 3 of 4 targets."
    judged: list[str] = []
    beside: list[str] = []
    most, reachable = 0, 0
    for rows, weights in sorted({(line.data, line.parameters) for line in evidence.lines.values()}):
        side = Parameters.read(weights)
        if side.method in (None, *CONTROLS):
            continue
        control = str(dataclasses.replace(side, method="random"))
        found = compare(evidence, (rows, weights), (rows, control), epochs=EPOCHS)
        if found is None:
            continue
        n_better = sum(difference["low"] > 0 for difference in found.of_targets.values())
        n_targets = len(found.of_targets)
        figure = f"{_figure(f'`{weights}`', found)}; better beyond its interval on {n_better} of {n_targets} targets"
        if rows != FOUND[0] or side.ratio != Parameters.read(FOUND[1]).ratio:
            beside.append(f"beside it, on rows by `{rows}`: {figure}")
            continue
        judged.append(figure)
        most = max(most, n_better)
        # with what is still to be run of this method
        reachable = max(reachable, n_better + ALL_TARGETS - n_targets)
    open_ = reachable >= ENOUGH_TARGETS or not judged
    verdict = HELD if most >= ENOUGH_TARGETS else UNDECIDED if open_ else NOT_HELD
    return Claim(text, verdict, judged + beside)


def _data(evidence: Evidence) -> Claim:
    text = (
        "Data matter: the selected tenth beats a random tenth by 8.3 points over the targets in a mixed pool, and is no "
        "worse than random in a pool of the task's own."
    )
    drawn = ("random", P2D[1])
    mixed = compare(evidence, P2D, drawn, epochs=EPOCHS)
    own = compare(evidence, P2D, drawn, setting="own", epochs=EPOCHS)
    figures = [_figure(name, found) for name, found in (("mixed pool", mixed), ("own pool", own)) if found]
    beside = [
        _figure(f"with {P2DConfig.target_samples} samples of the target, {setting} pool", found)
        for setting in ("mixed", "own")
        if (found := compare(evidence, MORE_SAMPLES, drawn, setting=setting, epochs=EPOCHS))
    ]
    worse, remarks = _worse_in_own_pool(evidence, own) if own else (False, ["own pool: not run"])
    figures += remarks
    if worse and mixed is not None and mixed.exact_match["mean"] >= LEAST_GAIN_OF_DATA:
        figures.append("the first half holds, the second does not")
    figures += beside
    if worse:
        return Claim(text, NOT_HELD, figures)  # whatever the mixed pool says
    if mixed is None:
        return Claim(text, UNDECIDED, figures)
    verdict = _settled(mixed.exact_match["mean"] >= LEAST_GAIN_OF_DATA, len(mixed.of_targets))
    return Claim(text, UNDECIDED if verdict == HELD and own is None else verdict, figures)


def _worse_in_own_pool(evidence: Evidence, own: Comparison) -> tuple[bool, list[str]]:
    """Whether our side is worse by the mean, as in claim 5, and what is to be said of that."""
    sides = [evidence.lines["own", name, *side, EPOCHS] for name in own.of_targets for side in (own.ours, own.theirs)]
    if not any(line.mean("exact_match") for line in sides):
        return own.nll["mean"] > 0, ["own pool: neither side has an answer that is right to the token, so NLL decides"]
    worse = own.exact_match["mean"] < 0
    open_ = worse and own.exact_match["high"] >= 0
    return worse, ["own pool: the mean is worse, though the interval holds zero"] * open_


def _coupling(evidence: Evidence) -> Claim:
    text = (
        "Coupling matters: rows scored by the heads that are found for the target beat rows scored by random heads, and by all "
        "heads."
    )
    found = coupling(evidence)
    figures = [_figure(f"against `{comparison.theirs[0]}`", comparison) for comparison in found]
    figures += [
        _figure(f"where the heads that are trained score, against `{comparison.theirs[0]}`", comparison)
        for comparison in _against_rows(evidence, SAME_HEADS, SAME_HEADS_CONTROLS)
    ]
    if len(found) < len(COUPLING_CONTROLS):
        return Claim(text, UNDECIDED, figures)
    held = all(comparison.exact_match["low"] > 0 for comparison in found)
    return Claim(text, _settled(held, min(len(comparison.of_targets) for comparison in found)), figures)


def coupling(evidence: Evidence) -> list[Comparison]:
    """The rows of the heads that are found against those of other heads, as far as these were run."""
    return _against_rows(evidence, FOUND, COUPLING_CONTROLS)


def _against_rows(evidence: Evidence, side: tuple[str, str], rows: tuple[str, ...]) -> list[Comparison]:
    """A side against the same weights on other rows, as far as these were run."""
    found = [compare(evidence, side, (other, side[1]), epochs=EPOCHS) for other in rows]
    return [comparison for comparison in found if comparison]


def _lines(evidence: Evidence, side: tuple[str, str]) -> dict[str, Line]:
    found = {target: evidence.lines.get(("mixed", target, *side, EPOCHS)) for target in evidence.targets}
    return {target: line for target, line in found.items() if line}


def _pairs(ours: dict[str, Line], theirs: dict[str, Line]) -> list[tuple[str, Result, Result]]:
    """The arms of two sides that have target and seed in common, with the target."""
    return [
        (target, line.results[seed], theirs[target].results[seed])
        for target, line in ours.items()
        if target in theirs
        for seed in sorted(set(line.results) & set(theirs[target].results))
    ]


def _aers(evidence: Evidence, lines: dict[str, Line]) -> dict[str, float]:
    return {target: aer for target, line in lines.items() if (aer := evidence.aer(line)) is not None}


def _mean(of_targets: dict[str, float]) -> float | None:
    return sum(of_targets.values()) / len(of_targets) if of_targets else None


def _whole(evidence: Evidence, side: tuple[str, str] = P2D) -> Claim:
    text = (
        "The whole: within a point of full fine-tuning on all data, or above it, at an AER of at most 0.10, and ahead of "
        "LoRA on the same rows in accuracy per second."
    )
    same_rows = (side[0], LORA[1])
    full = compare(evidence, side, REFERENCE, epochs=EPOCHS)
    lora = compare(evidence, side, same_rows, epochs=EPOCHS)
    if full is None:
        return Claim(text, UNDECIDED, [])
    of_targets = ", ".join(f"{target} {points(found)}" for target, found in full.of_targets.items())
    figures = [f"{_figure('against full data and full fine-tuning', full)} ({of_targets})"]
    held = full.exact_match["mean"] >= -MOST_LOSS
    if held and full.exact_match["low"] < -MOST_LOSS:
        figures.append(
            f'"within a point" is said of the mean alone; its interval reaches {100 * full.exact_match["low"]:+.1f} points'
        )
    cost = _cost(evidence, side, same_rows)
    again = evidence.again and _cost(evidence.again, side, same_rows)
    if cost is not None:
        figures.append(cost.aer)
    if lora is not None:
        figures.append(_figure("against LoRA on the same rows", lora))
    if cost is not None:
        figures += cost.rates
        held = held and cost.low_enough
    if again:
        figures += [f"once more on another machine: {figure}" for figure in (again.aer, *again.rates)]
        # of fewer targets it is another mean, by which nothing is decided
        held = held and (again.low_enough or again.n_targets < len(full.of_targets))
    open_ = held and (lora is None or cost is None)
    return Claim(text, UNDECIDED if open_ else _settled(held, len(full.of_targets)), figures)


@dataclass(frozen=True)
class _Cost:
    """
    What a side costs on one machine.

    Args:
        low_enough (`bool`): Whether it is as low as claimed, over `n_targets` (`int`).
        aer (`str`), rates (`list[str]`): The figures; without LoRA's arms none of `rates`.
    """

    low_enough: bool
    n_targets: int
    aer: str
    rates: list[str]


def _cost(evidence: Evidence, side: tuple[str, str], lora: tuple[str, str]) -> _Cost | None:
    """AER, and exact match for the time against LoRA's; None without comparable seconds of each target."""
    ours, theirs = _lines(evidence, side), _lines(evidence, lora)
    aers = _aers(evidence, ours)
    mean = _mean(aers)
    if mean is None or len(aers) < len(ours) or not comparable([*ours.values(), *theirs.values()]):
        return None
    figure = f"AER {mean:.3f} ({', '.join(f'{target} {aer:.3f}' for target, aer in aers.items())})"
    low_enough, per_second = mean <= MOST_AER, []
    if theirs:
        rates = [
            sum(line.mean("exact_match") for line in lines.values())
            / sum(line.seconds("localize", "select", "train") for line in lines.values())
            for lines in (ours, theirs)
        ]
        per_second.append(f"exact match per 1,000 s: {100_000 * rates[0]:.0f} points, LoRA {100_000 * rates[1]:.0f}")
        low_enough = low_enough and rates[0] >= rates[1]
    return _Cost(low_enough, len(ours), figure, per_second)


def _forgetting(evidence: Evidence, side: tuple[str, str] = P2D) -> Claim:
    text = "Forgetting is no worse than LoRA's on the same rows."
    verdict, figures = _forgetting_of(evidence, side)
    _, others = _forgetting_of(evidence, WITHOUT_KV)
    lora = compare(evidence, WITHOUT_KV, (WITHOUT_KV[0], LORA[1]), epochs=EPOCHS)
    if lora is not None:
        others.append(_figure("against LoRA", lora))
    figures += [
        f"found heads without keys and values (`share_kv=False`), on rows by found heads: {figure}"
        for figure in others
    ]
    figures += _forgetting_of_other_task(evidence, side)
    if evidence.again:
        figures += [
            f"once more on another machine: {figure}" for figure in _forgetting_of_other_task(evidence.again, side)
        ]
    return Claim(text, verdict, figures + _forgetting_by_rate(evidence, side))


def _forgetting_of_other_task(evidence: Evidence, side: tuple[str, str]) -> list[str]:
    """What became of another task's test rows, in the arms that were judged on them."""
    trained = _pairs(_lines(evidence, side), _lines(evidence, (side[0], LORA[1])))
    of_each = [[arm.get("other_task") for arm in (evidence.base.get(target, {}), a, b)] for target, a, b in trained]
    pairs = [[judged["nll"] for judged in found] for found in of_each if all(found)]
    if not pairs:
        return []
    found = paired([a - b for _, a, b in pairs])
    changes = [sum(pair[index] - pair[0] for pair in pairs) / len(pairs) for index in (1, 2)]
    return [
        f"NLL of another task's answers {difference_text(found, 3)} nats a token against LoRA, {found['pairs']} pairs; the change "
        f"from the base model is {changes[0]:+.3f} and {changes[1]:+.3f}"
    ]


def _forgetting_by_rate(evidence: Evidence, side: tuple[str, str]) -> list[str]:
    """
    The same at each learning rate that both sides tried, with the seed it was tried with: the rates that the sides were given go by
    validation rows of the target, on which what is forgotten does not show.
    """
    found: dict[tuple[str, float], dict[str, Result]] = {}
    for arm in evidence.tried:
        if (arm["setting"], arm["data"], arm["epochs"]) == ("mixed", side[0], EPOCHS):
            found.setdefault((arm["parameters"], arm["lr"]), {})[arm["target"]] = arm
    figures = []
    for parameters, lr in sorted(found, key=lambda tried: tried[1]):
        theirs = found.get((LORA[1], lr))
        if parameters != side[1] or theirs is None:
            continue
        pairs = [(arm, theirs[target]) for target, arm in found[parameters, lr].items() if target in theirs]
        forgotten = paired([ours["passages_nll"] - lora["passages_nll"] for ours, lora in pairs])
        right = [
            ours["test"][ours["target"]]["exact_match"] - lora["test"][ours["target"]]["exact_match"]
            for ours, lora in pairs
        ]
        figures.append(
            f"both at a learning rate of {lr:g}, one seed: NLL of unrelated passages {difference_text(forgotten, 3)} nats a token against "
            f"LoRA, {100 * sum(right) / len(right):+.1f} points exact match, {len(pairs)} pairs"
        )
    return figures


def _forgetting_of(evidence: Evidence, side: tuple[str, str]) -> tuple[str, list[str]]:
    """Whether rows and weights raise the NLL of unrelated texts no more than LoRA does, and the figure that says so."""
    ours, theirs = _lines(evidence, side), _lines(evidence, (side[0], LORA[1]))
    pairs = _pairs(ours, theirs)
    differences = [a["passages_nll"] - b["passages_nll"] for _, a, b in pairs]
    if not differences:
        return UNDECIDED, []
    found = paired(differences)
    rises = [sum(evidence.forgotten(line) for line in lines.values()) / len(lines) for lines in (ours, theirs)]
    figure = (
        f"NLL of unrelated passages {difference_text(found, 3)} nats a token against LoRA, {found['pairs']} pairs; the "
        f"rise over the base model is {rises[0]:+.3f} and {rises[1]:+.3f}"
    )
    return _settled(found["mean"] <= 0, len(set(ours) & set(theirs))), [figure]
