"""The costs of a run as the page and the pictures show them."""

from __future__ import annotations

from dataclasses import dataclass

from .run_report import P2DReport


STAGES = ("localize", "select", "train")
_SOURCES = {
    "measured": "measured in a run of its own",
    "given": "measured, as the user says",
    "estimated": "estimated from a few steps",
}
# Below this share of the reference the stages are too small to be told apart, and are shown enlarged, too.
SMALL = 0.3


@dataclass(frozen=True)
class StageCost:
    """
    A stage.

    Args:
        name (`str`): `localize`, `select` or `train`.
        seconds (`float`): Its seconds.
        share (`float`): Of the seconds of all stages.
        of_scale (`float`): Of the longer of the run and its reference.
        tokens, peak_memory (`int`, *optional*): As in [`P2DReport`].
    """

    name: str
    seconds: float
    share: float
    of_scale: float
    tokens: int | None
    peak_memory: int | None


@dataclass(frozen=True)
class Costs:
    """
    A run beside its reference.

    Args:
        stages (`list[StageCost]`): Those that were run, in order.
        total (`float`): Their seconds.
        reference (`float`, *optional*): The seconds of the reference.
        reference_of_scale (`float`): Of the longer of the two.
        source (`str`): How the reference is known, in words.
        is_estimate (`bool`): Whether it is an estimate.
        is_small (`bool`): Whether the stages had better be shown enlarged, too.
    """

    stages: list[StageCost]
    total: float
    reference: float | None
    reference_of_scale: float
    source: str
    is_estimate: bool
    is_small: bool

    @classmethod
    def of(cls, report: P2DReport) -> Costs:
        """The costs in a report; what is below 0 there counts as 0."""
        seconds = {name: max(report.stage_seconds[name], 0.0) for name in STAGES if name in report.stage_seconds}
        total = sum(seconds.values())
        reference = report.reference_seconds if (report.reference_seconds or 0) > 0 else None
        scale = max(total, reference or 0.0) or 1.0
        return cls(
            stages=[
                StageCost(
                    name,
                    value,
                    value / (total or 1.0),
                    value / scale,
                    report.stage_tokens.get(name),
                    report.stage_peak_memory.get(name),
                )
                for name, value in seconds.items()
            ],
            total=total,
            reference=reference,
            reference_of_scale=(reference or 0.0) / scale,
            source=_SOURCES.get(report.reference_source or "", "of unknown source"),
            is_estimate=report.reference_source == "estimated",
            is_small=reference is not None and total < SMALL * reference,
        )
