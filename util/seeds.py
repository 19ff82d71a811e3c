"""Seeds and random bits that depend on nothing but the numbers they are made from."""

import numpy as np


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several non-negative numbers, such as (run seed, image number) or (run seed, step)."""
    if any(part < 0 for part in parts):
        raise ValueError(f"seeds and numbers must not be negative, got {parts}")
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


def mix(seed: int) -> int:
    """64 well-mixed bits of a seed (the finalizer of SplitMix64, Steele et al. 2014): one per sample, so it must cost
    next to nothing.
    """
    x = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def coin(seed: int) -> bool:
    """A fair coin that depends on the seed alone."""
    return mix(seed) >> 63 == 1


def pick(seed: int, choices: int) -> int:
    """A number in [0, choices) that depends on the seed alone, and not on its `coin`."""
    return mix(mix(seed)) % choices
