"""How much a command generates: several guidance scales and temperatures, and a limit."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from models.sampling.options import SamplerOptions
from util.options import ArgumentError, option

MODES = {"cfg": ("evaluate", "online_eval", "sample"), "temperature": ("evaluate", "online_eval")}

MOST_PASSES = 10**10  # of the model, for an image and a step each; the published evaluation has 12.8 million


def check_passes(num_images: int, num_iter: int) -> None:
    """ValueError for more passes of the model than anybody means."""
    if num_images * num_iter > MOST_PASSES:
        many = f"--num_images {num_images} x --num_iter {num_iter} is {num_images * num_iter:,} passes of the model"
        raise ValueError(f"{many}, more than {MOST_PASSES:,}: was that meant?")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """One or several values of each; ArgumentError for values out of the sampler's bounds."""

    cfg: float | tuple[float, ...] = option(1.0, "guidance scale, 1 for none; several: in turn", nargs="+", check=False)
    temperature: float | tuple[float, ...] = option(
        1.0, "divides the logits; several: all pairs with --cfg", nargs="+", check=False
    )

    def __post_init__(self) -> None:
        for name in MODES:
            for value in self.values(name):
                SamplerOptions(**{name: value})

    def values(self, name: str) -> list[float]:
        """The different values of `name`, in the order given."""
        value = getattr(self, name)
        return list(dict.fromkeys(value if isinstance(value, tuple) else (value,)))

    def pairs(self, modes: Collection[str]) -> list[tuple[float, float]]:
        """All pairs (guidance scale, temperature). modes: what the command does ("evaluate", "online_eval", "sample").

        ArgumentError if several values are given where only one makes sense.
        """
        for name, possible in MODES.items():
            senseless = "sample" in modes and "sample" not in possible or not set(modes) & set(possible)
            if len(self.values(name)) > 1 and senseless:
                raise ArgumentError(name, f"{name} takes several values with {' and '.join(possible)} only")
        return list(itertools.product(self.values("cfg"), self.values("temperature")))
