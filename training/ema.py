"""Averages of the weights: the exponential one (docs/spec.md 7), and those whose length grows with the steps."""

import numpy as np
import torch
from torch import Tensor, nn

from training.sharding import like
from util.ema import rate_at
from util.options import ArgumentError

# of the averages with power-function profiles that training keeps, as in the paper (PowerEma)
SIGMA_RELS = (0.05, 0.10)


class ModelEma:
    """EMA of every parameter, float32, under its name in the model: what the checkpoint calls `model_ema`.

    After each optimizer step: ema = rate * ema + (1 - rate) * parameter. It starts as a copy of the parameters. warmup:
    step t (from 0) takes the rate min(rate, (1 + t) / (10 + t)), so that the random weights are soon forgotten;
    published: none.
    """

    def __init__(self, model: nn.Module, rate: float, warmup: bool = False):
        if not 0 <= rate < 1:
            raise ArgumentError("ema_rate", f"ema_rate must be in [0, 1), got {rate}")
        self.rate, self.warmup, self.key = rate, warmup, "model_ema"
        self.parameters = {name: p for name, p in model.named_parameters()}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def rate_at(self, step: int) -> float:
        """The rate of the update after optimizer step `step` (from 0)."""
        return rate_at(self.rate, self.warmup, step)

    @torch.no_grad()
    def update(self, step: int = 0) -> None:
        """One step, one fused operation over all parameters. `step` matters during a warm-up only."""
        torch._foreach_lerp_(
            list(self.shadow.values()), [p.detach() for p in self.parameters.values()], 1 - self.rate_at(step)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return self.shadow

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], source: str = "checkpoint") -> None:
        """Copy the averages; ValueError if a parameter is missing, has another shape or holds NaN.

        Buffers in `state` are ignored (MAR's files have a whole state dict); the copies never require grad, whatever
        `state` does.
        """
        bad = [n for n, value in self.shadow.items() if getattr(state.get(n), "shape", None) != value.shape]
        if bad:
            raise ValueError(f"{self.key} in {source} lacks or misshapes {len(bad)} parameters: {', '.join(bad[:3])}")
        not_finite = [n for n in self.shadow if not torch.isfinite(state[n]).all()]
        if not_finite:
            raise ValueError(f"{self.key} in {source} holds NaN or infinite values, first: {', '.join(not_finite[:3])}")
        for name, value in self.shadow.items():
            value.copy_(like(state[name].to(value.dtype), value))


def power_exponent(sigma_rel: float) -> float:
    """gamma of the profile tau^gamma on [0, t] whose standard deviation is sigma_rel * t (Karras et al. 2024, arXiv
    2312.02696, section 3).

    sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)), so g is the largest root of g^3 + 7 g^2 + (16 - s) g + (12 - s) with s
    = sigma_rel^-2. ValueError outside (0, 12^-1/2]: at the upper end gamma is 0, and all steps count alike.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise ArgumentError("sigma_rel", f"sigma_rel must be in (0, {12**-0.5:.4f}], got {sigma_rel}")
    s = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - s, 12 - s]).real.max()))


class PowerEma(ModelEma):
    """Average with a power-function profile: after t steps, the weights after step s count as s^(gamma+1) -
    (s-1)^(gamma+1), over t^(gamma+1).

    Its length is always the same share of the training so far; the random initial weights have no part in it (same
    section).
    """

    def __init__(self, model: nn.Module, sigma_rel: float):
        super().__init__(model, 0.0)
        self.sigma_rel, self.gamma, self.key = sigma_rel, power_exponent(sigma_rel), f"posthoc_ema {sigma_rel:g}"

    def rate_at(self, step: int) -> float:
        """The rate of the update after optimizer step `step` (from 0): (1 - 1/t)^(gamma+1) with t = step + 1."""
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)
