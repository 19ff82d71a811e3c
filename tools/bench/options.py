"""Options that several benches share, and the model they describe."""

from dataclasses import dataclass

import torch

from models import MODELS
from models.quantizer import MAX_BITS
from models.tokenbridge import TokenBridge
from util import dist
from util.options import check_options, option

REPEATS = "timed runs; the median counts"


@dataclass
class BenchOptions:
    """Device and number of repetitions. ArgumentError for an option out of range."""

    device: str = option("auto", dist.DEVICES)
    repeats: int = option(1, REPEATS, lowest=1)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class ModelOptions(BenchOptions):
    """A model with random weights, batch size, precision, and whether anything is computed at all."""

    model: str = option("tokenbridge_base", choices=list(MODELS))
    batch_size: int = option(1, lowest=1)
    precision: str | None = option(None, "default: bf16 or fp16 on cuda, fp32 on cpu", choices=dist.PRECISIONS)
    dry: bool = option(False, "count only, compute nothing")
    seed: int = option(0)
    img_size: int = option(256, lowest=1)
    vae_stride: int = option(16, lowest=1)
    vae_embed_dim: int = option(16, lowest=1)
    buffer_size: int = option(64, lowest=1)
    quant_bits: int = option(6, lowest=1, highest=MAX_BITS)

    def picked_device(self) -> torch.device:
        """The device of --device; with --dry also a GPU that is not there, since nothing is computed."""
        missing = self.dry and self.device == "cuda" and not torch.cuda.is_available()
        return torch.device("cuda") if missing else dist.pick_device(self.device)

    def build_model(self, **changes: int) -> TokenBridge:
        """The model with random weights, adaLN's too: their zeros would make every block of the head the identity."""
        sizes = {name: getattr(self, name) for name in ("img_size", "vae_stride", "vae_embed_dim", "buffer_size")}
        model = MODELS[self.model](quant_levels=2**self.quant_bits, **sizes | changes)
        for layer in model.modulation_layers:
            torch.nn.init.xavier_uniform_(layer[1].weight)
        return model

    def built(self, device: torch.device, **changes: int) -> TokenBridge:
        """The model of --seed, made on the device."""
        torch.manual_seed(self.seed)
        with device:
            return self.build_model(**changes)
