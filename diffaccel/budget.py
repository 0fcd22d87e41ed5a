"""Budgets: maximum numbers of network evaluations per image."""

from collections.abc import Collection


def nearest(budgets: Collection[int], nfe: float) -> int:
    """Return the highest of the budgets that is not above ``nfe``, or the lowest."""
    return max((budget for budget in budgets if budget <= nfe), default=min(budgets))
