"""Rates of the exponential moving average of the weights, and how much of the initial weights it still holds."""

import math


def rate_at(rate: float, warmup: bool, step: int) -> float:
    """The rate of the update after optimizer step `step` (0-based); warmup: at most (1 + step) / (10 + step)."""
    return min(rate, (1 + step) / (10 + step)) if warmup else rate


def initial_share(rate: float, warmup: bool, steps: int) -> float:
    """The share of the initial weights in the average after `steps` updates: the product of their rates."""
    return math.prod(rate_at(rate, True, step) for step in range(steps)) if warmup else rate**steps
