"""`main_tokenbridge.py --sample`: images as files, with their grid, their unmasking and a record of the settings.

Letters: B images of a batch, S their side in pixels.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.classes import labels_in_words, misleading_numbers, parse_classes
from dataset.images import center_crop_adm, read_image, save_frames, save_grid, save_png, to_tensor, to_uint8
from generation.editing import Edit, make_edit
from generation.pipeline import GenerationSettings, GenerationStep, Pipeline, generate_batches
from util import dist
from util.cli import check_writable
from util.files import write_json
from util.json_reader import read_json
from util.log import get_logger
from util.options import ArgumentError, check_options, option
from util.seeds import mixed_seed

logger = get_logger()

LARGEST_RECORD = 2**28  # bytes of samples.json, which lists a class for each image
SHOWN_STEPS_IMAGES = 16  # show_steps writes the unmasking of so many images; each frame is decoded by the VAE
GRID_IMAGES = 400  # most images in grid.png
SWEEP_COLUMNS = 20
SAMPLES = "samples.json"
WRITTEN = re.compile(r"\d{6,}\.png|grid\.png|sweep\.png|samples\.json|steps|cfg_.+")  # what `sample` writes


@dataclass(kw_only=True)
class SampleOptions:
    """What --sample writes. ArgumentError for options that do not go together."""

    classes: str = option("", "for --sample: class numbers or names such as 207,360 or tench,goldfish, or all")
    interpolate: str = option("", "two classes, such as 207,360 or names: --num_images mixtures of them, from one seed")
    init: str = option("", "an image to edit; needs --mask")
    mask: str = option("", "black and white image of --init's size: white is regenerated, tokens without it are kept")
    show_steps: int = option(
        0,
        "write the unmasking of the first images as GIF and PNG strip, 8 frames unless said",
        lowest=0,
        nargs="?",
        const=8,
        metavar="FRAMES",
    )
    num_images: int | None = None  # None: 4 per class, or 8 mixtures

    def __post_init__(self) -> None:
        check_options(self)
        if bool(self.classes) == bool(self.interpolate):
            raise ArgumentError("classes", "sampling needs classes, such as 207,360, or all; or interpolate instead")
        if bool(self.init) != bool(self.mask):
            raise ArgumentError("init", "init and mask go together: an image, and which part of it is regenerated")

    def labels(self, class_num: int, names: Sequence[str]) -> tuple[list[int | dict[int, float]], int]:
        """The class or mixture of each image, and the number of columns that suits their grid."""
        if self.interpolate:
            ends = parse_classes(self.interpolate, class_num, "interpolate", names)
            if len(ends) != 2:
                raise ArgumentError("interpolate", f"interpolate takes two classes, got {self.interpolate!r}")
            labels = mixtures(*ends, self.num_images or 8)
            row = len(labels)
        else:
            classes = parse_classes(self.classes, class_num, "classes", names)
            labels = balanced_labels(self.num_images or 4 * len(classes), classes)
            row = len(labels) // len(classes) if len(labels) % len(classes) == 0 else 0
        return labels, row if 1 < row <= 20 else math.ceil(min(len(labels), GRID_IMAGES) ** 0.5)

    def record(self, labels: Sequence[int | Mapping[int, float]], names: Sequence[str]) -> dict[str, object]:
        """What samples.json says of these options, of the labels and of the names of their classes."""
        numbers = sorted({n for label in labels for n in (label if isinstance(label, Mapping) else [label])})
        found = {name: getattr(self, name) for name in ("init", "mask", "show_steps")} | {"labels": labels}
        return found | {"class_names": {n: names[n] for n in numbers if n < len(names)}}

    def read_edit(self, pipeline: Pipeline) -> Edit | None:
        """The edit of init and mask, both cropped to the model's size; ArgumentError if their sizes differ.

        What is transparent in the mask is kept.
        """
        if not self.init:
            return None
        image, mask, size = read_image(self.init), read_image(self.mask, "black"), pipeline.image_size
        if image.size != mask.size:
            raise ArgumentError(
                "mask",
                f"{self.mask} (--mask) is {mask.width} x {mask.height} pixels, {self.init} (--init) {image.width} x "
                f"{image.height}; they must have the same size",
            )
        return make_edit(pipeline.model, pipeline.vae, center_crop_adm(image, size), center_crop_adm(mask, size))


def balanced_labels(num_images: int, classes: Sequence[int]) -> list[int]:
    """Labels in the order of `classes`, num_images / len(classes) of each; the first classes get one more of a rest."""
    each, rest = divmod(num_images, len(classes))
    return [label for i, label in enumerate(classes) for _ in range(each + (i < rest))]


def mixtures(first: int, last: int, count: int) -> list[dict[int, float]]:
    """`count` class mixtures from all of class `first` to all of class `last`."""
    shares = [i / max(1, count - 1) for i in range(count)]
    return [{first: 1.0} if first == last else {first: 1 - share, last: share} for share in shares]


def claim_folder(
    output: Path, record: Mapping[str, object], name: str = SAMPLES, written: re.Pattern = WRITTEN
) -> None:
    """Make the folder and write `record` to the file `name` in it; every process calls it.

    ArgumentError if it holds images of another run (names that `written` matches), with which these would be mixed. The
    same command may run again: equal images replace each other.
    """
    found = [path.name for path in output.iterdir() if written.fullmatch(path.name)] if output.is_dir() else []
    record = json.loads(json.dumps(record)) | {"complete": False}
    try:
        same = read_json(output / name, largest=LARGEST_RECORD) | {"complete": False} == record
    except (OSError, ValueError, TypeError):
        same = False
    what = f"holds images of another run ({', '.join(sorted(found)[:3])}{', ...' if len(found) > 3 else ''})"
    advice = "choose another folder, or delete them first"
    dist.agree(ArgumentError("output_dir", f"{output} {what}: {advice}") if found and not same else None)
    check_writable(output, "--output_dir")
    if dist.is_main():
        write_json(output / name, record)


def sampled_files(folder: Path, flag: str) -> list[Path] | None:
    """The images that --sample wrote to a folder, without grid.png and the like; None if it did not write it.

    ValueError if they are not complete, or in a folder for each guidance scale.
    """
    try:
        record = read_json(folder / SAMPLES, {"labels": list, "cfg": object}, LARGEST_RECORD)
    except (OSError, ValueError):
        return None
    count, scale, complete = len(record["labels"]), record["cfg"], record.get("complete", True)
    if isinstance(scale, list):
        raise ValueError(f"{folder} ({flag}) has a folder of images for each guidance scale: name one of them, cfg_...")
    files = [folder / f"{i:06d}.png" for i in range(count)]
    if not complete or not all(file.is_file() for file in files):
        raise ValueError(f"{folder} ({flag}) holds part of {count} images: --sample was interrupted, run it again")
    return files


def scale_folder(cfg: float) -> str:
    """The folder of a guidance scale: cfg_2 for 2.0, a name of its own for each number."""
    return f"cfg_{cfg:g}" if float(f"{cfg:g}") == cfg else f"cfg_{cfg!r}"


class StepFrames:
    """Collects frames of the unmasking, `count` per image, evenly spaced over the steps; the last one is the result."""

    def __init__(self, num_iter: int, count: int):
        count = min(count, num_iter)
        self.steps = {math.ceil(num_iter * (i + 1) / count) - 1 for i in range(count)}
        self.frames: dict[int, list[Tensor]] = {}

    def add(self, step: GenerationStep) -> None:
        """Decode the step's batch if a frame is due."""
        if step.step in self.steps and step.numbers[0] < SHOWN_STEPS_IMAGES:
            for number, image in zip(step.numbers, step.pixels().cpu(), strict=True):
                self.frames.setdefault(number, []).append(image)

    def write(self, folder: Path) -> None:
        """folder/000000.gif and folder/000000.png, a strip, for each of the first images; then forgets them."""
        for number, frames in self.frames.items():
            if number < SHOWN_STEPS_IMAGES:
                save_frames(folder / f"{number:06d}.gif", torch.stack(frames))
                save_grid(folder / f"{number:06d}.png", torch.stack(frames), len(frames))
        self.frames.clear()


def write_images(
    pipeline: Pipeline,
    labels: Sequence[int | Mapping[int, float]],
    settings: GenerationSettings,
    output: Path,
    *,
    seeds: Sequence[int] | None = None,
    edit: Edit | None = None,
    show_steps: int = 0,
    after_step: Callable[[], object],
) -> None:
    """Write this process's share of the images as output/000000.png and so on, their unmasking to output/steps."""
    model, vae, device = pipeline.model, pipeline.vae, pipeline.device
    frames = StepFrames(settings.num_iter, show_steps)

    def on_step(step: GenerationStep) -> None:
        after_step()
        frames.add(step)

    indices, options = range(dist.rank(), len(labels), dist.world_size()), dict(on_step=on_step, seeds=seeds, edit=edit)
    for numbers, images in generate_batches(model, vae, labels, indices, settings, device, **options):
        for number, image in zip(numbers, images, strict=True):
            save_png(output / f"{number:06d}.png", image)
        frames.write(output / "steps")
    dist.barrier()


def read_pixels(files: Sequence[Path]) -> Tensor:
    """uint8 (B, 3, S, S) of PNG files that every process may have written."""
    return torch.stack([to_uint8(to_tensor(read_image(file))) for file in files])


def sample(
    pipeline: Pipeline,
    options: SampleOptions,
    settings: GenerationSettings,
    scales: Sequence[float],
    output: Path,
    about: Mapping[str, object],
) -> None:
    """Write output/000000.png and so on, class by class, grid.png, and samples.json with the settings and `about`.

    scales: guidance scales; with several, each has a folder output/cfg_SCALE, and sweep.png shows them row by row.
    ValueError for what does not fit, or if the folder holds images of another run, before anything is written.
    """
    names = pipeline.class_names
    labels, columns = options.labels(pipeline.model.class_num, names)
    seeds = [mixed_seed(settings.seed, 0)] * len(labels) if options.interpolate else None  # only the class changes
    edit = options.read_edit(pipeline)
    settings.check(pipeline.model.token_dim)
    record = asdict(settings) | dict(about) | options.record(labels, names)
    output, several = Path(output), len(scales) > 1
    claim_folder(output, record | {"cfg": list(scales) if several else scales[0]})
    logger.info("%s", labels_in_words(labels, names))
    if warning := misleading_numbers(names):
        logger.warning("%s; classes takes class numbers", warning)
    folders = {cfg: output / scale_folder(cfg) if several else output for cfg in scales}
    batches = math.ceil(len(range(dist.rank(), len(labels), dist.world_size())) / settings.batch_size)
    with tqdm(total=len(folders) * batches * settings.num_iter, unit="step", disable=not dist.is_main()) as bar:
        for cfg, folder in folders.items():
            bar.set_description(f"{len(labels)} images, cfg {cfg:g}")
            more = dict(seeds=seeds, edit=edit, show_steps=options.show_steps, after_step=bar.update)
            write_images(pipeline, labels, replace(settings, cfg=cfg), folder, **more)
            if dist.is_main():
                files = [folder / f"{i:06d}.png" for i in range(min(len(labels), GRID_IMAGES))]
                save_grid(folder / "grid.png", read_pixels(files), columns)
                if options.show_steps:
                    strips = [folder / "steps" / file.name for file in files[:SHOWN_STEPS_IMAGES]]
                    save_grid(folder / "steps" / "grid.png", read_pixels(strips), 1)
                write_json(folder / SAMPLES, record | {"cfg": cfg, "complete": True})
                logger.info("wrote %d images, grid.png and samples.json to %s", len(labels), folder)
    if dist.is_main() and several:
        write_json(output / SAMPLES, record | {"cfg": list(scales), "complete": True})
        shown = min(len(labels), SWEEP_COLUMNS)
        files = [folder / f"{i:06d}.png" for folder in folders.values() for i in range(shown)]
        save_grid(output / "sweep.png", read_pixels(files), shown)
