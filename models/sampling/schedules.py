"""Schedules of the sampler: tokens masked, guidance scale, temperature. Letters: L tokens, N steps."""

import math
from collections.abc import Callable

# Share of the tokens that stays masked after `done` of `total` steps: 1 before the first, 0 after the last.
MASK_SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda done, total: math.cos(math.pi / 2 * done / total),  # published (docs/spec.md 6)
    "linear": lambda done, total: 1 - done / total,
    "square": lambda done, total: 1 - (done / total) ** 2,
    "cubic": lambda done, total: 1 - (done / total) ** 3,
    "sqrt": lambda done, total: 1 - math.sqrt(done / total),
    "arccos": lambda done, total: math.acos(done / total) / (math.pi / 2),
}
CFG_SCHEDULES = ("linear", "constant", "cosine", "interval")
TEMPERATURE_SCHEDULES = ("constant", "linear", "cosine")


def keep_masked(step: int, num_iter: int, num_tokens: int, masked_now: int, schedule: str = "cosine") -> int:
    """Number of tokens that stay masked after sampling step `step` (0-based) of `num_iter` (docs/spec.md 6).

    floor(L * share) in float64, clipped to [1, masked_now - 1] so that every step but the last predicts at least one
    token and leaves at least one (with N > L, a step that finds a single masked token predicts none). Raises
    ValueError if step is outside [0, N).
    """
    if not 0 <= step < num_iter:
        raise ValueError(f"step {step} is outside [0, {num_iter})")
    return max(1, min(masked_now - 1, math.floor(num_tokens * MASK_SCHEDULES[schedule](step + 1, num_iter))))


def unmasking_plan(num_iter: int, num_tokens: int, schedule: str = "cosine") -> list[tuple[int, int, int]]:
    """(masked before, masked after, `keep` for the guidance) of every step.

    The last step leaves nothing masked, while its clipped keep, which the guidance uses, is 1 (docs/spec.md 6).
    """
    plan, masked = [], num_tokens
    for step in range(num_iter):
        keep = keep_masked(step, num_iter, num_tokens, masked, schedule)
        after = 0 if step == num_iter - 1 else keep
        plan.append((masked, after, keep))
        masked = after
    return plan


def guidance_scale(
    cfg: float, schedule: str, num_tokens: int, keep: int, interval: tuple[float, float] = (0.0, 1.0)
) -> float:
    """Classifier-free guidance scale of a step that leaves `keep` of L tokens masked; x = (L - keep) / L.

    linear (published, docs/spec.md 6): 1 + (cfg - 1) x. constant: cfg. cosine: 1 + (cfg - 1) (1 - cos(pi x)) / 2.
    interval: cfg while x lies in `interval`, otherwise 1, which skips the unconditional pass. ValueError for others.
    """
    revealed = (num_tokens - keep) / num_tokens
    if schedule == "linear":
        return 1 + (cfg - 1) * (num_tokens - keep) / num_tokens
    if schedule == "cosine":
        return 1 + (cfg - 1) * (1 - math.cos(math.pi * revealed)) / 2
    if schedule == "interval":
        return cfg if interval[0] <= revealed <= interval[1] else 1.0
    if schedule != "constant":
        raise ValueError(f"cfg_schedule {schedule!r} is unknown; choose from {', '.join(CFG_SCHEDULES)}")
    return cfg


def temperature_at(step: int, num_iter: int, start: float, end: float, schedule: str) -> float:
    """Temperature of a step: `start` (constant), or from `start` to `end` over the steps (linear, cosine)."""
    if schedule == "constant":
        return start
    share = step / max(1, num_iter - 1)
    return start + (end - start) * (share if schedule == "linear" else (1 - math.cos(math.pi * share)) / 2)
