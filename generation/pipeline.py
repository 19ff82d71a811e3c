"""Generating images: batches that do not depend on how they are cut, and `main_tokenbridge.py --sample`, which writes them.

Letters: B images of a batch, S their side in pixels, L tokens, C latent channels.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.images import center_crop_adm, read_image, save_frames, save_grid, save_png, to_tensor, to_uint8
from generation.library import decode, encode_init, preview, token_mask
from models.sampling.loop import SamplerState
from models.sampling.options import OPTION_NAMES, SamplerOptions
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import dist
from util.cli import check_writable
from util.files import write_json
from util.log import get_logger
from util.seeds import mixed_seed

logger = get_logger()

SHOWN_STEPS_IMAGES = 16  # --show_steps writes the unmasking of so many images; each frame costs a pass through the VAE


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

    latents: Tensor  # (1, C, H, W) scaled
    chosen: Tensor  # (L,) bool


def balanced_labels(num_images: int, classes: Sequence[int]) -> list[int]:
    """Class-major labels, num_images / classes of each (SPEC 9); the first classes get one more if that is no whole number."""
    each, rest = divmod(num_images, len(classes))
    return [label for i, label in enumerate(classes) for _ in range(each + (i < rest))]


def mixtures(first: int, last: int, count: int) -> list[dict[int, float]]:
    """`count` class mixtures from all of class `first` to all of class `last`."""
    return [
        {first: 1.0} if first == last else {first: 1 - i / max(1, count - 1), last: i / max(1, count - 1)}
        for i in range(count)
    ]


@torch.no_grad()
def generate(
    model: TokenBridge,
    vae: AutoencoderKL,
    labels: Sequence[int | None | Mapping[int, float]],
    indices: Sequence[int],
    settings: SampleSettings,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
    *,
    seeds: Sequence[int] | None = None,
    edit: Edit | None = None,
    on_state: Callable[[list[int], SamplerState], None] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (image numbers, uint8 images (B, 3, S, S)) for the image numbers `indices` with labels[i]; image i depends on (seed, i) only.

    labels: classes, or mixtures of them (see TokenBridge.class_embeddings). seeds: the sampler's own, one per image number, instead of those
    of (seed, i). on_step(step, num_iter) and on_state(numbers, state) are called after each step. ValueError if an image's logits or pixels
    are not finite.
    """
    s = settings
    for first in range(0, len(indices), s.batch_size):
        numbers = list(indices[first : first + s.batch_size])
        batch_seeds = [mixed_seed(s.seed, i) if seeds is None else seeds[i] for i in numbers]
        editing = {} if edit is None else dict(init=edit.latents, regenerate=edit.chosen)
        with dist.autocast(device, s.precision):
            for state in model.sample_steps(
                len(numbers),
                class_embedding=model.class_embeddings([labels[i] for i in numbers]),
                seeds=batch_seeds,
                **editing,
                **s.options,
            ):
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


def write_images(
    model: TokenBridge,
    vae: AutoencoderKL,
    labels: Sequence[int | Mapping[int, float]],
    settings: SampleSettings,
    device: torch.device,
    output: Path,
    *,
    seeds: Sequence[int] | None = None,
    edit: Edit | None = None,
    show_steps: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """This process's share of the images, as output/000000.png and so on; with show_steps their unmasking in output/steps."""
    frames = StepFrames(vae, settings.num_iter, show_steps) if show_steps else None
    mine = range(dist.rank(), len(labels), dist.world_size())
    for numbers, images in generate(
        model, vae, labels, mine, settings, device, on_step, seeds=seeds, edit=edit, on_state=frames
    ):
        for number, image in zip(numbers, images, strict=True):
            save_png(output / f"{number:06d}.png", image)
        if frames is not None:
            frames.write(output / "steps")
    dist.barrier()


# ------------------------------------------------------------------------------------------------------------- --sample


def sampler_options(args: argparse.Namespace) -> SamplerOptions:
    return SamplerOptions(**{name: getattr(args, name) for name in OPTION_NAMES})


def sample_settings(args: argparse.Namespace, device: torch.device) -> SampleSettings:
    return SampleSettings(
        seed=args.seed,
        batch_size=args.eval_bsz,
        precision=dist.pick_precision(args.precision, device),
        **vars(sampler_options(args)),
    )


def parse_classes(text: str, class_num: int, flag: str = "--classes") -> list[int]:
    """--classes 207,360 or all -> class numbers; ValueError if one is not in [0, class_num)."""
    if text == "all":
        return list(range(class_num))
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} takes numbers separated by commas, or all; got {text!r}") from None
    wrong = [c for c in classes if not 0 <= c < class_num]
    if wrong:
        raise ValueError(f"{flag}: {wrong} not in [0, {class_num}), the model's classes")
    return classes


def read_edit(args: argparse.Namespace, model: TokenBridge, vae: AutoencoderKL, device: torch.device) -> Edit | None:
    """--init and --mask, cropped alike to the model's size; ValueError if the mask is of another size or chooses nothing."""
    if not args.init:
        return None
    image, mask, size = read_image(args.init), read_image(args.mask), model.config.img_size
    if image.size != mask.size:
        raise ValueError(
            f"{args.mask} (--mask) is {mask.width} x {mask.height} pixels, {args.init} (--init) {image.width} x {image.height}; "
            "they must have the same size"
        )
    return Edit(
        encode_init(vae, [center_crop_adm(image, size)], size, device),
        token_mask(center_crop_adm(mask, size), size, model.grid_size),
    )


def picture_grid(output: Path, numbers: Sequence[int], columns: int, name: str) -> None:
    """Join output/000000.png and so on into output/<name>."""
    pictures = [to_uint8(to_tensor(read_image(output / f"{i:06d}.png"))) for i in numbers]
    save_grid(output / name, torch.stack(pictures), columns)


def sample(
    args: argparse.Namespace,
    given: set[str],
    model: TokenBridge,
    vae: AutoencoderKL,
    source: Path,
    device: torch.device,
) -> None:
    """Write OUT/000000.png and so on, class by class, OUT/grid.png and OUT/samples.json; a folder for each of --cfg_scale, and sweep.png."""
    seeds, count = None, args.num_images if "num_images" in given else None
    if args.interpolate:
        ends = parse_classes(args.interpolate, model.class_num, "--interpolate")
        if len(ends) != 2:
            raise ValueError(f"--interpolate takes two classes, got {args.interpolate!r}")
        labels = mixtures(*ends, count or 8)
        seeds = [mixed_seed(args.seed, 0)] * len(labels)  # one seed: only the class changes
        each = len(labels)
    else:
        classes = parse_classes(args.classes, model.class_num)
        labels = balanced_labels(count or 4 * len(classes), classes)
        each = len(labels) // len(classes) if len(labels) % len(classes) == 0 else 0
    edit, settings = read_edit(args, model, vae, device), sample_settings(args, device)
    settings.check(model.token_dim)
    output = check_writable(args.output_dir, "--output_dir")
    sweep = [(cfg, output / f"cfg_{cfg:g}") for cfg in args.cfg_scale] if args.cfg_scale else [(args.cfg, output)]
    shown = min(len(labels), 400)
    columns = each if 1 < each <= 20 else math.ceil(shown**0.5)
    batches = math.ceil(len(range(dist.rank(), len(labels), dist.world_size())) / args.eval_bsz)
    with tqdm(total=len(sweep) * batches * args.num_iter, unit="step", disable=not dist.is_main()) as bar:
        for cfg, folder in sweep:
            settings.cfg = cfg
            bar.set_description(f"{len(labels)} images, cfg {cfg:g}")
            write_images(
                model,
                vae,
                labels,
                settings,
                device,
                folder,
                seeds=seeds,
                edit=edit,
                show_steps=args.show_steps,
                on_step=lambda *_: bar.update(),
            )
            if dist.is_main():
                picture_grid(folder, range(shown), columns, "grid.png")
                write_json(
                    folder / "samples.json",
                    asdict(settings) | {"checkpoint": str(source), "weights": args.weights, "labels": labels},
                )
                logger.info("wrote %d images, grid.png and samples.json to %s", len(labels), folder)
    if dist.is_main() and args.cfg_scale:
        shown = min(len(labels), 20)
        rows = [to_uint8(to_tensor(read_image(folder / f"{i:06d}.png"))) for _, folder in sweep for i in range(shown)]
        save_grid(output / "sweep.png", torch.stack(rows), shown)
