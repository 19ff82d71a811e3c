"""Generating images: batches that do not depend on how they are cut, and what `--sample` writes. No parsing.

Letters: B images of a batch, S their side in pixels, L tokens, C latent channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.generation import decode, preview
from models.sampling import OPTION_NAMES, SamplerOptions, SamplerState, image_seed
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import dist
from util.images import save_frames, save_grid, save_png

SHOWN_STEPS_IMAGES = 16           # --show_steps writes the unmasking of so many images; each frame costs a pass through the VAE


@dataclass(kw_only=True)
class SampleSettings(SamplerOptions):
    """How images are made; the flags of main_tokenbridge.py have the same names."""

    seed: int = 0
    batch_size: int = 64
    precision: str = "fp32"

    @property
    def options(self) -> dict:
        """What the sampler takes."""
        return {name: getattr(self, name) for name in OPTION_NAMES}


@dataclass
class Edit:
    """What --init and --mask say: only the chosen tokens are drawn."""

    latents: Tensor               # (1, C, H, W) scaled
    chosen: Tensor                # (L,) bool


def balanced_labels(num_images: int, classes: Sequence[int]) -> list[int]:
    """Class-major labels, num_images / classes of each (SPEC 9); the first classes get one more if that is no whole number."""
    each, rest = divmod(num_images, len(classes))
    return [label for i, label in enumerate(classes) for _ in range(each + (i < rest))]


def mixtures(first: int, last: int, count: int) -> list[dict[int, float]]:
    """`count` class mixtures from all of class `first` to all of class `last`."""
    return [{first: 1.0} if first == last else {first: 1 - i / max(1, count - 1), last: i / max(1, count - 1)} for i in range(count)]


@torch.no_grad()
def generate(model: TokenBridge, vae: AutoencoderKL, labels: Sequence[int | None | Mapping[int, float]], indices: Sequence[int], settings: SampleSettings,
             device: torch.device, on_step: Callable[[int, int], None] | None = None, *, seeds: Sequence[int] | None = None, edit: Edit | None = None,
             on_state: Callable[[list[int], SamplerState], None] | None = None) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (image numbers, uint8 images (B, 3, S, S)) for the image numbers `indices` with labels[i]; image i depends on (seed, i) only.

    labels: classes, or mixtures of them (see TokenBridge.class_embeddings). seeds: the sampler's own, one per image number, instead of those
    of (seed, i). on_step(step, num_iter) and on_state(numbers, state) are called after each step. ValueError if an image's logits or pixels
    are not finite.
    """
    s = settings
    for first in range(0, len(indices), s.batch_size):
        numbers = list(indices[first : first + s.batch_size])
        batch_seeds = [image_seed(s.seed, i) if seeds is None else seeds[i] for i in numbers]
        editing = {} if edit is None else dict(init=edit.latents, regenerate=edit.chosen)
        with dist.autocast(device, s.precision):
            for state in model.sample_steps(len(numbers), class_embedding=model.class_embeddings([labels[i] for i in numbers]), seeds=batch_seeds,
                                            **editing, **s.options):
                if on_step is not None:
                    on_step(state.step, state.num_iter)
                if on_state is not None:
                    on_state(numbers, state)
        yield numbers, decode(vae, state.latents, numbers)


class StepFrames:
    """Collects pictures of the unmasking, `count` per image, evenly spread over the steps, the last one the result."""

    def __init__(self, vae: AutoencoderKL, num_iter: int, count: int):
        count = min(count, num_iter)
        self.vae, self.steps = vae, {math.ceil(num_iter * (i + 1) / count) - 1 for i in range(count)}
        self.frames: dict[int, list[Tensor]] = {}

    def __call__(self, numbers: list[int], state: SamplerState) -> None:
        if state.step in self.steps and numbers[0] < SHOWN_STEPS_IMAGES:
            for number, image in zip(numbers, preview(self.vae, state).cpu(), strict=True):
                self.frames.setdefault(number, []).append(image)

    def write(self, folder: Path) -> None:
        """folder/000000.gif and folder/000000.png, a strip, for each of the first images; forgets them."""
        for number, frames in self.frames.items():
            if number < SHOWN_STEPS_IMAGES:
                save_frames(folder / f"{number:06d}.gif", torch.stack(frames))
                save_grid(folder / f"{number:06d}.png", torch.stack(frames), len(frames))
        self.frames.clear()


def write_images(model: TokenBridge, vae: AutoencoderKL, labels: Sequence[int | Mapping[int, float]], settings: SampleSettings, device: torch.device,
                 output: Path, *, seeds: Sequence[int] | None = None, edit: Edit | None = None, show_steps: int = 0,
                 on_step: Callable[[int, int], None] | None = None) -> None:
    """This process's share of the images, as output/000000.png and so on; with show_steps their unmasking in output/steps."""
    frames = StepFrames(vae, settings.num_iter, show_steps) if show_steps else None
    mine = range(dist.rank(), len(labels), dist.world_size())
    for numbers, images in generate(model, vae, labels, mine, settings, device, on_step, seeds=seeds, edit=edit, on_state=frames):
        for number, image in zip(numbers, images, strict=True):
            save_png(output / f"{number:06d}.png", image)
        if frames is not None:
            frames.write(output / "steps")
    dist.barrier()
