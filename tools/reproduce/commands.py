"""The published commands of docs/spec.md 10, and what is changed in them to run them on one machine."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from checkpoints.download import PUBLISHED as FILES
from tools.reproduce.cost import Work
from util.stages import Stage

# As docs/spec.md 10 has them (tested): DIR and OUT are the reader's folders, … is left open there.
PUBLISHED = {
    "reconstruction": "python reconstruction.py --bits 6 --range 5.0 --image_dir DIR",
    "large": "torchrun --nproc_per_node=8 … main_tokenbridge.py --model tokenbridge_large --eval_bsz 256"
    " --num_images 50000 --num_iter 256 --cfg 3.1 --quant_bits 6 --cfg_schedule linear --temperature 0.96"
    " --output_dir OUT --resume pretrained_models/tokenbridge/tokenbridge_large --data_path DIR --evaluate",
    "huge": "torchrun --nproc_per_node=8 … main_tokenbridge.py --model tokenbridge_huge --eval_bsz 256"
    " --num_images 50000 --num_iter 256 --cfg 3.45 --quant_bits 6 --cfg_schedule linear --temperature 0.91"
    " --output_dir OUT --resume pretrained_models/tokenbridge/tokenbridge_huge --data_path DIR --evaluate",
    "cache": "torchrun … main_cache.py --img_size 256 --vae_path pretrained_models/vae/kl16.ckpt --vae_embed_dim 16"
    " --batch_size 128 --data_path DIR --cached_path DIR",
    "train": "torchrun --nproc_per_node=8 --nnodes=4 … main_tokenbridge.py"
    " --img_size 256 --vae_path … --vae_embed_dim 16 --vae_stride 16 --patch_size 1"
    " --model tokenbridge_large --quant_bits 6 --quant_min -5.0 --quant_max 5.0"
    " --epochs 400 --warmup_epochs 100 --batch_size 64 --blr 5.0e-5"
    " --output_dir OUT --resume OUT --data_path DIR",
}
REASONS = {  # of what is added to a published command or changed in it
    "precision fp16": "the published scripts' own; here the default is bf16 where there is one",
    "pr_reference": "precision and recall need ADM's reference images",
    "cfg": "guidance scales on request",
    "accum_iter": "the published global batch of 2,048 on fewer GPUs",
    "max_steps": "the first steps only",
}


@dataclass(frozen=True)
class Command:
    """A script, or -m and a module, and the flags with their values; torchrun starts it if `processes` are several."""

    script: tuple[str, ...]
    flags: dict[str, list[str]] = field(default_factory=dict)
    processes: int = 1

    def changed(self, **flags: object) -> "Command":
        """With these flags, at their places or at the end; True is a switch."""
        return replace(self, flags=self.flags | {name: _words(value) for name, value in flags.items()})

    def typed(self) -> list[str]:
        """The words as one would type them."""
        flags = [word for name, values in self.flags.items() for word in (f"--{name}", *values)]
        several = ["torchrun", f"--nproc_per_node={self.processes}", "--standalone"]
        launcher = several if self.processes > 1 else ["python"]
        return [*launcher, *self.script, *flags]


@dataclass(frozen=True, kw_only=True)
class PlannedStage(Stage):
    """A stage whose result is {key of a figure: value}, None where it could not be computed.

    published: name of the published command that it is; added: what differs from that. cost: computed beforehand.
    """

    published: str = ""
    added: Sequence[str] = ()
    cost: Work = field(default_factory=Work)

    @classmethod
    def of(cls, command: Command, published: str = "", **fields: object) -> "PlannedStage":
        """The stage of a command."""
        more = added(command, published) if published else ()
        return cls(command=command.typed(), published=published, added=more, **fields)


def _words(value: object) -> list[str]:
    if value is True:
        return []
    return [str(part) for part in (value if isinstance(value, (list, tuple)) else [value])]


def parse(name: str) -> tuple[str, dict[str, list[str]]]:
    """Script and flags of a published command."""
    words = shlex.split(PUBLISHED[name])
    first, flags = next(i for i, word in enumerate(words) if word.endswith(".py")), {}
    for word in words[first + 1 :]:
        if word.startswith("--"):
            flags[word[2:]] = []
        else:
            flags[list(flags)[-1]].append(word)
    return words[first], flags


def added(command: Command, name: str) -> list[str]:
    """The flags that a published command lacks or has with another value, with the reason where one is known."""
    flags, found = parse(name)[1], []
    for flag, values in command.flags.items():
        if flags.get(flag) not in (values, ["DIR"], ["OUT"], ["…"]):
            reason = REASONS.get(flag) or REASONS.get(f"{flag} {' '.join(values)}")
            found.append(shlex.join((f"--{flag}", *values)) + (f" ({reason})" if reason else ""))
    return found


def published(name: str, processes: int, data: str = "DIR", out: str = "OUT", cache: str = "") -> Command:
    """A published command with its folders filled in; its launcher starts `processes` on this machine."""
    places = {"data_path": data, "image_dir": data, "cached_path": cache, "output_dir": out, "resume": out}
    script, flags = parse(name)
    for flag, values in flags.items():
        if values in (["DIR"], ["OUT"]):
            flags[flag] = [str(places[flag])]
        elif values == ["…"]:
            flags[flag] = [FILES["vae"].target]
    return Command((script,), flags, processes)
