"""Exponential moving average of the weights (SPEC 7)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class ModelEma:
    """EMA of every parameter, float32, under its name in the model: what the checkpoint calls `model_ema`.

    After each optimizer step: ema = rate * ema + (1 - rate) * parameter. It starts as a copy of the parameters.
    """

    def __init__(self, model: nn.Module, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"the EMA rate must be in [0, 1) (--ema_rate), got {rate}")
        self.rate = rate
        self.parameters = {name: p for name, p in model.named_parameters()}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step, two fused operations over all parameters."""
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [p.detach() for p in self.parameters.values()], 1 - self.rate)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the model has the averages for its parameters; afterwards its own again."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._fill(self.shadow)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

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
            value.copy_(state[name])
