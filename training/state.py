"""What a checkpoint keeps: model, optimizer, EMA, scaler, step; on one process, several (DDP), or sharded (--fsdp)."""

import inspect
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.tokenbridge import TokenBridge
from training.ema import SIGMA_RELS, ModelEma, PowerEma
from training.guard import SkippedSteps
from training.optimizer_state import load_optimizer, saved_groups
from training.settings import TrainSettings
from training.sharding import full, shard, to_host
from util import dist, seeds
from util.log import get_logger, warn_once
from util.options import ArgumentError

logger = get_logger()

# How AdamW computes is no part of its state: files have the published optimizer's defaults, which any AdamW takes.
IMPLEMENTATION = {"fused": None, "foreach": None, "capturable": False}


class TrainState:
    """Model, optimizer, EMA, scaler and the number of optimizer steps done.

    The model comes with its weights, on the CPU with fsdp (no device then ever holds all of it), otherwise wherever it
    is to stay, unless `device` says where.
    """

    def __init__(self, model: TokenBridge, settings: TrainSettings, device: torch.device | None = None):
        self.model, self.fsdp = model, settings.fsdp
        self.device = device or next(model.parameters()).device
        if settings.compile:
            compile_blocks(model)
        if settings.fsdp:
            # the head stays in the root's unit, gathered for the whole step: its loss is computed in groups of tokens
            shard(model, (*model.encoder_blocks, *model.decoder_blocks), self.device)
        elif device is not None:
            model.to(device)
        self.wrapped: nn.Module = model if settings.fsdp else wrap(model, settings.accum_iter > 1)
        groups = weight_decay_groups(model, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
        self.ema = ModelEma(model, settings.ema_rate, settings.ema_warmup)
        self.power_emas = [PowerEma(model, sigma_rel) for sigma_rel in SIGMA_RELS] if settings.posthoc_ema_freq else []
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.step = 0  # optimizer steps done
        self.skipped = SkippedSteps()

    def update_averages(self) -> None:
        """After an optimizer step, before it is counted. No host sync."""
        for average in (self.ema, *self.power_emas):
            average.update(self.step)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and averages by name: what must be finite before a checkpoint is written."""
        averages = {average.key: average.state_dict() for average in (self.ema, *self.power_emas)}
        found = dict(self.model.named_parameters())
        return found | {f"{key} {name}": value for key, state in averages.items() for name, value in state.items()}

    def hold_gradients(self, hold: bool) -> None:
        """Whether the next backward pass only adds to this process's gradients, or averages them over the processes."""
        if self.fsdp:
            self.model.set_requires_gradient_sync(not hold)
        elif isinstance(self.wrapped, DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = not hold  # what its no_sync() sets

    def snapshot(self, steps_per_epoch: int) -> dict | None:
        """A copy on the CPU, for rank 0 (None elsewhere); every process must call it, since shards are gathered.

        The published checkpoint layout (docs/spec.md 7) and, beyond it, `step`, `rng`, `versions`, and `posthoc_ema`
        where those averages are kept. `epoch` is the last one finished, -1 before that.
        """
        rng = dist.gather_objects(seeds.random_state(self.device))
        if not dist.is_main() and not self.fsdp:
            return None
        parts = {"model": self.model, "model_ema": self.ema, "optimizer": self.optimizer}
        tensors = {name: part.state_dict() for name, part in parts.items()}
        if self.power_emas:
            tensors["posthoc_ema"] = {f"{average.sigma_rel:g}": average.state_dict() for average in self.power_emas}
        content = to_host(tensors, keep=dist.is_main())
        if not dist.is_main():
            return None
        for group in content["optimizer"]["param_groups"]:
            group.update(IMPLEMENTATION)
        if self.scaler.is_enabled():  # the published code refuses an empty state
            content["scaler"] = self.scaler.state_dict()
        return content | {
            "epoch": self.step // steps_per_epoch - 1,
            "step": self.step,
            "steps_per_epoch": steps_per_epoch,
            "rng": rng,
            "versions": seeds.versions(),
        }

    def load_state_dict(self, content: dict, steps_per_epoch: int, source: str) -> None:
        """Continue from a checkpoint whose weights are in the model already; names in the log what it lacks.

        The optimizer takes the moments and step counts alone: its settings are those it was built with
        (`saved_hyper_parameters`). ValueError naming the source for a part that is there but does not fit.
        """
        if isinstance(content.get("model_ema"), dict):
            self.ema.load_state_dict(content["model_ema"], source)
        else:
            warn_once("%s has no model_ema: the average starts from its weights", source)
        if "optimizer" in content:
            load_optimizer(self, self.model, content, source)
        else:
            warn_once("%s has no optimizer state: the optimizer starts without moments", source)
        self._load_step(content, steps_per_epoch, source)
        self._load_power_emas(content, source)
        self._load_random_state(content, source)

    def _load_step(self, content: dict, steps_per_epoch: int, source: str) -> None:
        step, epoch, saved_steps = content.get("step"), content.get("epoch", -1), content.get("steps_per_epoch")
        wrong = "step" in content and (type(step) is not int or step < 0)
        if wrong or type(epoch) is not int or epoch < -1:
            raise ValueError(f"step and epoch in {source} must be whole numbers, they are {step!r} and {epoch!r}")
        same = step is not None and saved_steps == steps_per_epoch
        self.step = step if same else (epoch + 1) * steps_per_epoch
        if step is not None and not same:
            now = f"now there are {steps_per_epoch} (batch size or data changed): continuing after its last full epoch"
            warn_once("%s was written with %s steps per epoch, %s", source, saved_steps, now)

    def _load_power_emas(self, content: dict, source: str) -> None:
        """They weigh the steps by their number, so they can only be kept from the first one on."""
        saved = content.get("posthoc_ema")
        if not self.power_emas:
            if saved is not None:
                end = "without it they end here and cannot be taken up again"
                warn_once("%s has the averages of posthoc_ema_freq; %s", source, end)
            return
        keys = [f"{average.sigma_rel:g}" for average in self.power_emas]
        complete = isinstance(saved, dict) and all(isinstance(saved.get(key), dict) for key in keys)
        if self.step and not (complete and content.get("step") == self.step):
            needs = "posthoc_ema_freq needs averages that were kept from the first step on"
            those = f"has those of step {content.get('step')}, and training continues at step {self.step}"
            advice = "leave it out, or start in another output_dir"
            reason = f"{needs}, and {source} {those if complete else 'has none'}: {advice}"
            raise ArgumentError("posthoc_ema_freq", reason)
        for key, average in zip(keys, self.power_emas, strict=True):
            if complete:
                average.load_state_dict(saved[key], source)

    def _load_random_state(self, content: dict, source: str) -> None:
        """For draws outside the loop, which seeds its own by step. Skipped if the number of processes changed."""
        rng, saved_versions = content.get("rng"), content.get("versions")
        if isinstance(rng, list) and len(rng) == dist.world_size():
            try:
                seeds.set_random_state(rng[dist.rank()], self.device)
            except (ValueError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"the random state in {source} cannot be restored: {error}") from error
        elif rng:
            same = (
                "data, token orders and noise stay those of their step; mask ratios and dropout do where batch_size is"
            )
            logger.info("%s is of %d processes, now there are %d: %s", source, len(rng), dist.world_size(), same)
        if isinstance(saved_versions, dict) and (changed := changes(seeds.versions(), saved_versions)):
            logger.info("%s: bitwise equality is not to be expected: %s", source, ", ".join(changed))

    @torch.no_grad()
    def averaged_model(self) -> TokenBridge:
        """A plain model with the averages for its parameters, in eval mode, on this device; every process must call it.

        A copy: compiled, wrapped and sharded modules stay with training.
        """
        with torch.device("meta"):
            copy = TokenBridge(self.model.config)
        copy.to_empty(device=self.device)
        for name, parameter in copy.named_parameters():
            parameter.copy_(full(self.ema.shadow[name]))
        for buffer, own in zip(copy.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(own)
        return copy.eval()


def compile_blocks(model: TokenBridge) -> None:
    """Compile each block of the backbone, and the head's loss of a group of tokens, in place.

    Separately: few shapes, short compilation, and keys and hooks stay as they are. The number of visible tokens changes
    from step to step, so sizes are symbols.
    """
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        block.compile(dynamic=True)
    model.summed_losses = torch.compile(model.summed_losses, dynamic=True)


def wrap(model: TokenBridge, accumulates: bool) -> nn.Module:
    """The model itself on one process; on several, DDP, which averages their gradients.

    Every step uses the same parameters, so its graph is static, except with accumulation: DDP's first backward pass
    would have to average then (torch 2.15 stops with an internal error), and a resumed run would sum in another order.
    """
    if dist.world_size() == 1:
        return model
    device = next(model.parameters()).device
    known = inspect.signature(DistributedDataParallel).parameters
    # the second is its name before torch 2.15; ours are constants
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=not accumulates,
        **{sync_buffers: False},
    )


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Biases and 1-D parameters without decay first, then all others with it (docs/spec.md 7; the published order)."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def saved_hyper_parameters(content: dict, source: str) -> dict:
    """weight_decay, betas and eps of a checkpoint's optimizer state, {} if it has none. ValueError if unreadable.

    The weight decay is that of the group that has one: biases and 1-D parameters are never decayed.
    """
    if "optimizer" not in content:
        return {}
    try:
        groups = saved_groups(content["optimizer"])
        decay = max(float(group["weight_decay"]) for group in groups)
        (first, second), eps = map(float, groups[0]["betas"]), float(groups[0]["eps"])
        if not (0 <= first < 1 and 0 <= second < 1 and 0 <= eps < math.inf and 0 <= decay < math.inf):
            raise ValueError(f"betas ({first}, {second}), eps {eps}, weight_decay {decay}")
    except (KeyError, TypeError, ValueError) as error:
        problem = f"the optimizer state in {source} is not that of an AdamW with parameter groups: {error!r}"
        advice = 'leave out its key "optimizer" to start a new one from these weights'
        raise ValueError(f"{problem}; {advice}") from error
    return {"weight_decay": decay, "betas": (first, second), "eps": eps}


def changes(now: Mapping[str, object], before: Mapping[str, object], names: Iterable[str] | None = None) -> list[str]:
    """ "name value, was value" for every name (of `now` unless given) that both have and that differs."""
    names = [name for name in names or now if name in now and name in before]
    return [f"{name} {now[name]}, was {before[name]}" for name in names if now[name] != before[name]]
