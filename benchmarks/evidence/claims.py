"""The claims, and whether the evidence bears them out. The bounds were set before the arms were run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from localize_report import bootstrap

from .profile import ALL_HEADS, Parameters
from .summary import REFERENCE, Comparison, Evidence, Line, compare


P2D = ("affinity:proxy/fifth/robin", "heads:proxy/late")
LORA = (P2D[0], "lora-attention")
# a choice of the adapter's configuration, not of P2DConfig
WITHOUT_KV = "heads-qo:proxy/late"
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


def judge(evidence: Evidence) -> list[Claim]:
    """All claims, in the order in which they have to stand."""
    return [_heads(evidence), _data(evidence), _coupling(evidence), _whole(evidence), _forgetting(evidence)]


def points(difference: dict[str, Any]) -> str:
    """A difference of shares in points, with its interval."""
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def nll_text(comparison: Comparison) -> str:
    nll = comparison.nll
    if nll["low"] is None:
        return f"NLL {nll['mean']:+.3f}"
    return f"NLL {nll['mean']:+.3f} ({nll['low']:+.3f} to {nll['high']:+.3f})"


def _figure(what: str, comparison: Comparison) -> str:
    return f"{what}: {points(comparison.exact_match)} exact match, {nll_text(comparison)}, {comparison.pairs} pairs"


def _heads(evidence: Evidence) -> Claim:
    text = "Heads matter: localized heads beat as many random heads on the same rows, on 3 of 4 targets."
    figures, best, n_targets = [], 0, 0
    for parameters in sorted({line.parameters for line in evidence.lines.values()}):
        side = Parameters.read(parameters)
        if side.method in (None, "random", ALL_HEADS):
            continue
        control = str(dataclasses.replace(side, method="random"))
        found = compare(evidence, (P2D[0], parameters), (P2D[0], control), epochs=EPOCHS)
        if found is None:
            continue
        better = [name for name, difference in found.of_targets.items() if difference["low"] > 0]
        best, n_targets = max(best, len(better)), max(n_targets, len(found.of_targets))
        figures.append(
            f"{_figure(f'`{parameters}`', found)}; better beyond its interval on {len(better)} of {len(found.of_targets)} targets"
        )
    # what is still to be run could not change it
    reachable = best + ALL_TARGETS - n_targets >= ENOUGH_TARGETS
    verdict = HELD if best >= ENOUGH_TARGETS else UNDECIDED if reachable else NOT_HELD
    return Claim(text, verdict, figures)


def _data(evidence: Evidence) -> Claim:
    text = (
        "Data matter: the selected tenth beats a random tenth by 8.3 points over the targets in a mixed pool, and is no "
        "worse than random in a pool of the task's own."
    )
    drawn = ("random", P2D[1])
    mixed = compare(evidence, P2D, drawn, epochs=EPOCHS)
    own = compare(evidence, P2D, drawn, setting="own", epochs=EPOCHS)
    figures = [_figure(name, found) for name, found in (("mixed pool", mixed), ("own pool", own)) if found]
    if own is None:
        figures.append("own pool: not run")
    if mixed is None:
        return Claim(text, UNDECIDED, figures)
    enough = mixed.exact_match["mean"] >= LEAST_GAIN_OF_DATA
    if not enough or (own is not None and own.exact_match["high"] < 0):
        return Claim(text, NOT_HELD, figures)
    return Claim(text, UNDECIDED if own is None else HELD, figures)


def _coupling(evidence: Evidence) -> Claim:
    text = "Coupling matters: rows scored by the trained heads beat rows scored by random heads, and by all heads."
    pairs = {
        f"against `{data}`": compare(evidence, P2D, (data, P2D[1]), epochs=EPOCHS)
        for data in ("affinity:random/fifth/robin", "affinity:all/fifth/robin")
    }
    found = {name: comparison for name, comparison in pairs.items() if comparison}
    figures = [_figure(name, comparison) for name, comparison in found.items()]
    if len(found) < len(pairs):
        return Claim(text, UNDECIDED, figures)
    held = all(comparison.exact_match["low"] > 0 for comparison in found.values())
    return Claim(text, HELD if held else NOT_HELD, figures)


def _lines(evidence: Evidence, side: tuple[str, str]) -> dict[str, Line]:
    found = {target: evidence.lines.get(("mixed", target, *side, EPOCHS)) for target in evidence.targets}
    return {target: line for target, line in found.items() if line}


def _whole(evidence: Evidence) -> Claim:
    text = (
        "The whole: within a point of full fine-tuning on all data, or above it, at an AER of at most 0.10, and ahead of "
        "LoRA on the same rows in accuracy per second."
    )
    full = compare(evidence, P2D, REFERENCE, epochs=EPOCHS)
    lora = compare(evidence, P2D, LORA, epochs=EPOCHS)
    ours = _lines(evidence, P2D)
    aers = {target: aer for target, line in ours.items() if (aer := evidence.aer(line)) is not None}
    if full is None:
        return Claim(text, UNDECIDED, [])
    of_targets = ", ".join(f"{target} {points(found)}" for target, found in full.of_targets.items())
    figures = [f"{_figure('against full data and full fine-tuning', full)} ({of_targets})"]
    held = full.exact_match["mean"] >= -MOST_LOSS
    theirs = _lines(evidence, LORA)
    timed = bool(aers) and all(line.timed for line in theirs.values())
    if timed:
        mean_aer = sum(aers.values()) / len(aers)
        figures.append(f"AER {mean_aer:.3f} ({', '.join(f'{target} {aer:.3f}' for target, aer in aers.items())})")
        held = held and mean_aer <= MOST_AER
    if lora is not None:
        figures.append(_figure("against LoRA on the same rows", lora))
    if lora is not None and timed:
        rates = [
            sum(line.mean("exact_match") for line in lines.values())
            / sum(line.seconds("localize", "select", "train") for line in lines.values())
            for lines in (ours, theirs)
        ]
        figures.append(f"exact match per 1,000 s: {100_000 * rates[0]:.0f} points, LoRA {100_000 * rates[1]:.0f}")
        held = held and rates[0] >= rates[1]
    open_ = held and (lora is None or not timed)
    return Claim(text, UNDECIDED if open_ else HELD if held else NOT_HELD, figures)


def _forgetting(evidence: Evidence) -> Claim:
    text = "Forgetting is no worse than LoRA's on the same rows."
    mean, figures = _forgetting_of(evidence, P2D)
    if mean is None:
        return Claim(text, UNDECIDED, [])
    without = (P2D[0], WITHOUT_KV)
    _, others = _forgetting_of(evidence, without)
    lora = compare(evidence, without, LORA, epochs=EPOCHS)
    if lora is not None:
        others.append(_figure("against LoRA", lora))
    figures += [f"without keys and values (`share_kv=False`): {figure}" for figure in others]
    return Claim(text, HELD if mean <= 0 else NOT_HELD, figures)


def _forgetting_of(evidence: Evidence, side: tuple[str, str]) -> tuple[float | None, list[str]]:
    """By how much more data and parameters raise the NLL of unrelated texts than LoRA, and the figure that says so."""
    ours, theirs = _lines(evidence, side), _lines(evidence, LORA)
    differences = [
        ours[target].results[seed]["passages_nll"] - theirs[target].results[seed]["passages_nll"]
        for target in ours
        if target in theirs
        for seed in sorted(set(ours[target].results) & set(theirs[target].results))
    ]
    if not differences:
        return None, []
    found = bootstrap(differences)
    interval = "" if found["low"] is None else f" ({found['low']:+.3f} to {found['high']:+.3f})"
    rises = [sum(evidence.forgotten(line) for line in lines.values()) / len(lines) for lines in (ours, theirs)]
    figure = (
        f"NLL of unrelated passages {found['mean']:+.3f} nats a token{interval} against LoRA, {found['pairs']} pairs; the "
        f"rise over the base model is {rises[0]:+.3f} and {rises[1]:+.3f}"
    )
    return found["mean"], [figure]
