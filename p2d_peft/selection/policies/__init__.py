"""Policies: what stands between a ranking of rows by their scores and the rows that are kept."""

from .diverse import Diverse
from .length_between import LengthBetween
from .policy import Policy, Ranking
from .quotas import Quotas
from .round_robin import RoundRobin
from .without_near_duplicates import WithoutNearDuplicates


__all__ = [
    "Diverse",
    "LengthBetween",
    "Policy",
    "Quotas",
    "Ranking",
    "RoundRobin",
    "WithoutNearDuplicates",
]
