"""Random bits that depend on nothing but the numbers they are made from, and the states of the global generators."""

import platform
import random

import numpy as np
import torch

from util import dist


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


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state(device: torch.device) -> dict:
    """The states of this process's global generators: torch's (CPU and device), numpy's, Python's; weights_only reads
    it.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "device": dist.device_random_state(device),
        "numpy": [name, keys.tolist(), *rest],
        "python": list(random.getstate()),
    }


def set_random_state(state: dict, device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    dist.set_device_random_state(device, state["device"])
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def versions() -> dict[str, str]:
    """The versions that the last bits of a run's numbers depend on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
