"""Exponential moving average of the weights (SPEC 7)."""

import torch
from torch import Tensor, nn

from util.sharding import like


class ModelEma:
    """EMA of every parameter, float32, under its name in the model: what the checkpoint calls `model_ema`.

    After each optimizer step: ema = rate * ema + (1 - rate) * parameter. It starts as a copy of the parameters.
    warmup: step t (from 0) takes the rate min(rate, (1 + t) / (10 + t)), so that the random weights are soon forgotten; published: none.
    """

    def __init__(self, model: nn.Module, rate: float, warmup: bool = False):
        if not 0 <= rate < 1:
            raise ValueError(f"the EMA rate must be in [0, 1) (--ema_rate), got {rate}")
        self.rate, self.warmup = rate, warmup
        self.parameters = {name: p for name, p in model.named_parameters()}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    def rate_at(self, step: int) -> float:
        """The rate of the update after optimizer step `step` (from 0)."""
        return min(self.rate, (1 + step) / (10 + step)) if self.warmup else self.rate

    @torch.no_grad()
    def update(self, step: int = 0) -> None:
        """One step, one fused operation over all parameters. `step` matters during a warm-up only."""
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.parameters.values()], 1 - self.rate_at(step))

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor], source: str = "checkpoint") -> None:
        """Copy the averages; ValueError if a parameter is missing, has another shape or holds NaN."""
        bad = [n for n, value in self.shadow.items() if getattr(state.get(n), "shape", None) != value.shape]
        if bad:
            raise ValueError(f"model_ema in {source} lacks or misshapes {len(bad)} parameters: {', '.join(bad[:3])}")
        not_finite = [n for n in self.shadow if not torch.isfinite(state[n]).all()]
        if not_finite:
            raise ValueError(f"model_ema in {source} holds NaN or infinite values, first: {', '.join(not_finite[:3])}")
        for name, value in self.shadow.items():
            value.copy_(like(state[name].to(value.dtype), value))
