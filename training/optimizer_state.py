"""A saved state of Adam or AdamW, checked before an optimizer takes it up: the fused kernels trust shapes and types."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from training.sharding import like
from util.checkpoint import shape_of
from util.log import warn_once

MOMENTS = ("exp_avg", "exp_avg_sq")
# Values of a gradient scaler's state: lowest and highest, both excluded.
SCALER = {"scale": (0, math.inf), "growth_factor": (1, math.inf), "backoff_factor": (0, 1)}
SCALER |= {"growth_interval": (0, math.inf), "_growth_tracker": (-1, math.inf)}


class Stepped(Protocol):
    """What optimizer steps need of a training's state."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def load_optimizer(state: Stepped, model: nn.Module, content: dict, source: str) -> None:
    """Take up moments and step counts ("optimizer") and the fp16 scaler's state ("scaler", where there is one).

    The settings stay those that the optimizer was built with. ValueError, which names `source`, if something is absent,
    or has another shape, type or range.
    """
    try:
        complete = isinstance(content.get("config"), dict)  # the published code steps no parameter without a gradient
        state.optimizer.load_state_dict(fitted(content["optimizer"], state.optimizer, model, complete))
        if state.scaler.is_enabled() and (scaler := content.get("scaler")):
            _check_scaler(scaler)
            state.scaler.load_state_dict(scaler)
    except ValueError as error:
        raise ValueError(f"the optimizer state in {source} does not fit this model: {error}") from error


def _check_scaler(saved: object) -> None:
    for name, (lowest, highest) in SCALER.items():
        value = saved.get(name) if isinstance(saved, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest < value < highest:
            raise ValueError(f"{name} of its gradient scaler is {value!r}, not a number between {lowest} and {highest}")


def fitted(saved: object, optimizer: torch.optim.Optimizer, model: nn.Module, complete: bool = True) -> dict:
    """A saved optimizer state with this optimizer's settings, laid out and sharded as the parameters are.

    ValueError if it does not fit: number of groups and parameters, names where the file has them, and for every
    parameter the step count and both moments: presence (a warning unless `complete`), shape, type, finite numbers.
    """
    groups, own, entries = saved_groups(saved), optimizer.param_groups, saved.get("state")
    numbers = [number for group in groups for number in _list(group.get("params"))]
    if len(set(map(repr, numbers))) < len(numbers) or not all(type(number) is int for number in numbers):
        raise ValueError("the parameters in its groups are no list of different numbers")
    sizes, own_sizes = ([len(group["params"]) for group in either] for either in (groups, own))
    if sizes != own_sizes:
        raise ValueError(f"its groups hold {sizes} parameters, here they hold {own_sizes} (biases and 1-D ones first)")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = dict(pairs(groups, own, names))
    if not isinstance(entries, dict) or entries.keys() - parameters.keys():
        raise ValueError("its state is no dict by the numbers of the parameters")
    if missing := [names[id(p)] for number, p in parameters.items() if number not in entries]:
        lacks = f"it lacks the moments of {len(missing)} of {len(parameters)} parameters, first: {missing[0]}"
        if entries and complete:
            raise ValueError(lacks)
        warn_once("the optimizer state: %s; they start from zero", lacks)
    state = {number: _entry(entry, parameters[number], names) for number, entry in entries.items()}
    settings = [mine | {"params": theirs["params"]} for mine, theirs in zip(own, groups, strict=True)]
    return {"state": state, "param_groups": settings}


def saved_groups(saved: object) -> list[dict]:
    """The parameter groups of a saved state; ValueError if it has none."""
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        raise ValueError("it has no parameter groups")
    return groups


def _list(value: object) -> list:
    return value if isinstance(value, list) else [None]


def pairs(groups: list[dict], own: list[dict], names: dict[int, str]) -> Iterator[tuple[int, nn.Parameter]]:
    """(number in the file, parameter here); ValueError where the file has names and they differ."""
    for theirs, mine in zip(groups, own, strict=True):
        here = [names[id(parameter)] for parameter in mine["params"]]
        for saved, name in zip(_list(theirs.get("param_names", here)), here, strict=False):
            if saved != name:
                raise ValueError(f"it is of a parameter {saved!r} where this model has {name}")
        yield from zip(theirs["params"], mine["params"], strict=True)


def _entry(entry: object, parameter: nn.Parameter, names: dict[int, str]) -> dict[str, object]:
    name = names[id(parameter)]
    if not isinstance(entry, dict):
        raise ValueError(f"its entry of {name} is {shape_of(entry)}")
    step = entry.get("step")
    count = step.item() if isinstance(step, Tensor) and step.numel() == 1 and step.device.type != "meta" else step
    if isinstance(count, bool) or not isinstance(count, (int, float)) or not 0 <= count < math.inf:
        raise ValueError(f"the step count of {name} is {count!r}")
    moments = {key: _moment(entry.get(key), parameter, f"{key} of {name}", key == MOMENTS[1]) for key in MOMENTS}
    return {"step": torch.tensor(float(count))} | moments


def _moment(value: object, parameter: nn.Parameter, what: str, positive: bool) -> Tensor:
    """The moment as the parameter is: float32 or the type in the file, its strides, its shard."""
    if value is None:
        raise ValueError(f"it lacks {what}")
    if shape_of(value) != tuple(parameter.shape):
        raise ValueError(f"{what} has shape {shape_of(value)}, the parameter {tuple(parameter.shape)}")
    dense = value.layout == torch.strided and value.device.type != "meta" and value.is_floating_point()
    if not dense:
        raise ValueError(f"{what} is of type {value.dtype} ({value.layout}, {value.device}), not of dense floats")
    low, high = (float(part) for part in value.float().aminmax()) if value.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)) or positive and low < 0:
        raise ValueError(f"{what} has values from {low:g} to {high:g}")
    sharded = like(value, parameter)
    if sharded is not value or value.stride() == parameter.stride():
        return sharded
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)
