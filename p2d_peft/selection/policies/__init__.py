"""Policies: what stands between a ranking of rows by their scores and the rows that are kept."""

from .policy import Policy, Ranking


__all__ = ["Policy", "Ranking"]
