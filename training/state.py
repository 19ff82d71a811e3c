"""What a checkpoint keeps: model, optimizer, EMA, scaler, step; on one process, on several (DDP), or cut over them (--fsdp)."""

import inspect

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.tokenbridge import TokenBridge
from training.ema import SIGMA_RELS, ModelEma, PowerEma
from training.sharding import full, like, shard, to_host
from util import checkpoint, dist
from util.log import get_logger

logger = get_logger()

BETAS, EPS = (0.9, 0.95), 1e-8  # of AdamW, as published
# How AdamW computes is this optimizer's own affair; files carry the published optimizer's defaults, so that any AdamW takes them.
IMPLEMENTATION = {"fused": None, "foreach": None, "capturable": False}


def saved_hyper_parameters(content: dict, source: str) -> dict:
    """weight_decay, betas and eps of the optimizer state in a checkpoint, {} if it has none. ValueError naming the source if unreadable.

    The weight decay is that of the group that has one: biases and 1-D parameters are never decayed.
    """
    if "optimizer" not in content:
        return {}
    try:
        groups = content["optimizer"]["param_groups"]
        return {
            "weight_decay": max(float(group["weight_decay"]) for group in groups),
            "betas": tuple(float(beta) for beta in groups[0]["betas"]),
            "eps": float(groups[0]["eps"]),
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"the optimizer state in {source} is not that of an AdamW with parameter groups: {error!r}; "
            'leave out its key "optimizer" to start a new one from these weights'
        ) from error


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Biases and 1-D parameters without decay first, then all others with it (SPEC 7; the published optimizer's order)."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def compile_blocks(model: TokenBridge) -> None:
    """Compile every transformer block by itself, in place: few shapes, short compilation, and keys and hooks stay as they are.

    The number of visible tokens changes from step to step, so sizes are symbols.
    """
    for block in (*model.encoder_blocks, *model.decoder_blocks, *model.channel_blocks):
        block.compile(dynamic=True)


def wrap(model: TokenBridge, accumulates: bool) -> nn.Module:
    """The model itself on one process; on several, DDP, which averages their gradients.

    Every step uses the same parameters, so its graph may be called static, but for accumulation: DDP's first backward pass would have to
    average then (torch 2.15 stops with an internal error), and a resumed run would add in another order than one never stopped.
    """
    if dist.world_size() == 1:
        return model
    device = next(model.parameters()).device
    sync_buffers = (
        "forward_sync_buffers"
        if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        else "broadcast_buffers"
    )  # its name before torch 2.15; ours are constants
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=not accumulates,
        **{sync_buffers: False},
    )


class TrainState:
    """Model, optimizer, EMA, scaler and the number of optimizer steps done.

    The model comes with its weights, on the CPU with fsdp (no device then ever holds all of it), otherwise wherever it is to stay.
    """

    def __init__(
        self,
        model: TokenBridge,
        *,
        weight_decay: float,
        ema_rate: float,
        precision: str,
        ema_warmup: bool = False,
        compiled: bool = False,
        fsdp: bool = False,
        accumulates: bool = False,
        posthoc_ema: bool = False,
        device: torch.device | None = None,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
    ):
        self.model, self.fsdp = model, fsdp
        self.device = device or next(model.parameters()).device
        if compiled:
            compile_blocks(model)
        if fsdp:
            linears = [layer[1] for layer in model.modulation_layers]  # these run before the block that holds them
            shard(model, (*linears, *model.encoder_blocks, *model.decoder_blocks, *model.channel_blocks), self.device)
        self.wrapped: nn.Module = model if fsdp else wrap(model if device is None else model.to(device), accumulates)
        self.optimizer = torch.optim.AdamW(
            weight_decay_groups(model, weight_decay), lr=0.0, betas=betas, eps=eps, fused=True
        )
        self.ema = ModelEma(model, ema_rate, ema_warmup)
        self.power_emas = [PowerEma(model, sigma_rel) for sigma_rel in SIGMA_RELS] if posthoc_ema else []
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.step = 0  # optimizer steps done
        self.bad_in_row = 0  # steps skipped one after another, up to now

    def update_averages(self) -> None:
        """After an optimizer step, before it is counted. No host sync."""
        for average in (self.ema, *self.power_emas):
            average.update(self.step)

    def hold_gradients(self, hold: bool) -> None:
        """Whether the coming backward pass only adds to this process's gradients, or the processes average them at its end."""
        if self.fsdp:
            self.model.set_requires_gradient_sync(not hold)
        elif isinstance(self.wrapped, DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = not hold  # what its no_sync() sets

    # ------------------------------------------------------------------------------------------------------- checkpoints

    def snapshot(self, steps_per_epoch: int) -> dict | None:
        """A copy on the CPU, for rank 0 (None elsewhere): the published checkpoint layout (SPEC 7) and, beyond it, `step`, `rng` and `versions`,
        and `posthoc_ema` where those averages are kept.

        `epoch` is the last one finished, -1 before that. Every process must call it. Whole tensors, however they are cut over the processes.
        """
        rng = dist.gather_objects(checkpoint.random_state(self.device))
        if not dist.is_main() and not self.fsdp:
            return None
        tensors = {
            "model": self.model.state_dict(),
            "model_ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.power_emas:
            tensors["posthoc_ema"] = {f"{average.sigma_rel:g}": average.state_dict() for average in self.power_emas}
        copies = to_host(tensors, keep=dist.is_main())
        if not dist.is_main():
            return None
        copies["optimizer"]["param_groups"] = [group | IMPLEMENTATION for group in copies["optimizer"]["param_groups"]]
        # the published code refuses an empty one
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return (
            copies
            | scaler
            | {
                "epoch": self.step // steps_per_epoch - 1,
                "step": self.step,
                "steps_per_epoch": steps_per_epoch,
                "rng": rng,
                "versions": checkpoint.versions(),
            }
        )

    def load_state_dict(self, content: dict, steps_per_epoch: int, source: str) -> None:
        """Continue from a checkpoint whose weights are in the model already; works without our extra keys, and says what is absent.

        The optimizer takes the moments and step counts alone: its settings are those it was built with (`saved_hyper_parameters`),
        the learning rate is set at every step. ValueError naming the source for a part that is there but does not fit.
        """
        if isinstance(content.get("model_ema"), dict):
            self.ema.load_state_dict(content["model_ema"], source)
        else:
            logger.warning("%s has no model_ema: the average starts anew from its weights", source)
        if "optimizer" not in content:
            logger.warning("%s has no optimizer state: it starts anew", source)
        try:
            if "optimizer" in content:
                self.optimizer.load_state_dict(self._cut_like_parameters(self._with_own_settings(content["optimizer"])))
            if content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the optimizer state in {source} does not fit this model: {error}") from error
        self._load_step(content, steps_per_epoch, source)
        self._load_power_emas(content, source)
        self._load_random_state(content, source)

    def _cut_like_parameters(self, state: dict) -> dict:
        """The optimizer's state dict with the tensors of each parameter cut as the parameter is."""
        if not self.fsdp:
            return state
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return state | {
            "state": {
                i: {key: like(v, parameters[i]) if isinstance(v, torch.Tensor) else v for key, v in entry.items()}
                for i, entry in state["state"].items()
            }
        }

    def _with_own_settings(self, state: dict) -> dict:
        """The optimizer's state dict with this optimizer's settings in its groups. ValueError for other groups or moments of other shapes."""
        own, groups = self.optimizer.param_groups, state["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
            raise ValueError(
                f"its groups hold {[len(group['params']) for group in groups]} parameters, here they hold "
                f"{[len(group['params']) for group in own]} (biases and 1-D parameters first)"
            )
        pairs = zip(
            [i for group in groups for i in group["params"]], [p for group in own for p in group["params"]], strict=True
        )
        for number, parameter in pairs:
            shape = getattr(state["state"].get(number, {}).get("exp_avg"), "shape", parameter.shape)
            if shape != parameter.shape:
                raise ValueError(
                    f"the moments of parameter {number} have shape {tuple(shape)}, the parameter {tuple(parameter.shape)}"
                )
        return state | {
            "param_groups": [
                {key: value for key, value in group.items() if key != "params"} | {"params": theirs["params"]}
                for group, theirs in zip(own, groups, strict=True)
            ]
        }

    def _load_step(self, content: dict, steps_per_epoch: int, source: str) -> None:
        if not all(isinstance(content.get(key, -1), int) for key in ("step", "epoch")):
            raise ValueError(
                f"step and epoch in {source} must be whole numbers, they are {content.get('step')!r} and {content.get('epoch')!r}"
            )
        if "step" in content and content.get("steps_per_epoch") == steps_per_epoch:
            self.step = content["step"]
        else:
            self.step = (content.get("epoch", -1) + 1) * steps_per_epoch
            if "step" in content:
                logger.warning(
                    "%s was written with %s steps per epoch, now there are %d (batch size or data changed): continuing after its last "
                    "full epoch",
                    source,
                    content.get("steps_per_epoch"),
                    steps_per_epoch,
                )
        if len(set(dist.gather_objects(self.step))) > 1:
            raise ValueError(
                f"the processes read different checkpoints of {source}: they are at steps {dist.gather_objects(self.step)}; "
                "is --resume on a disk that all nodes share?"
            )

    def _load_power_emas(self, content: dict, source: str) -> None:
        """They weigh the steps by their number, so they can only be kept from the first one on."""
        saved = content.get("posthoc_ema")
        if not self.power_emas:
            if saved is not None:
                logger.warning(
                    "%s has the averages of --posthoc_ema_freq; without the flag they end here and cannot be taken up again",
                    source,
                )
            return
        keys = [f"{average.sigma_rel:g}" for average in self.power_emas]
        whole = isinstance(saved, dict) and all(isinstance(saved.get(key), dict) for key in keys)
        if self.step and not (whole and content.get("step") == self.step):
            why = (
                f"has those of step {content.get('step')}, and training continues at step {self.step}"
                if whole
                else "has none"
            )
            raise ValueError(
                f"--posthoc_ema_freq needs averages that were kept from the first step on, and {source} {why}: leave the flag out, or "
                "train anew in another --output_dir"
            )
        for key, average in zip(keys, self.power_emas, strict=True):
            if whole:
                average.load_state_dict(saved[key], source)

    def _load_random_state(self, content: dict, source: str) -> None:
        """The loop seeds its draws by step; this is for whatever else draws. Left as it is if the number of processes changed."""
        if isinstance(content.get("rng"), list) and len(content["rng"]) == dist.world_size():
            try:
                checkpoint.set_random_state(content["rng"][dist.rank()], self.device)
            except (ValueError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"the random state in {source} cannot be put back: {error}") from error
        elif content.get("rng"):
            logger.info(
                "%s is of %d processes, now there are %d: data, token orders and noise stay those of their step; mask ratios and "
                "dropout do where --batch_size is the same",
                source,
                len(content["rng"]),
                dist.world_size(),
            )
        changed = [
            f"{name} {now} instead of {content['versions'].get(name)}"
            for name, now in checkpoint.versions().items()
            if isinstance(content.get("versions"), dict) and content["versions"].get(name) != now
        ]
        if changed:
            logger.info("%s: equality to the last bit is not to be expected: %s", source, ", ".join(changed))

    # ------------------------------------------------------------------------------------------------------- images

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
        buffers = dict(self.model.named_buffers())
        for name, buffer in copy.named_buffers():
            buffer.copy_(buffers[name])
        return copy.eval()
