"""What the quantizer costs: images through VAE and quantizer and back, for several quantizers, and their figures.

Each image is encoded once; every variant (the VAE alone, or one quantizer) decodes the same latents.

Letters: B images of a batch, S their side, C latent channels, K levels, h x w the latent grid.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.folders import ImageFolderDataset, readable_images, spread_evenly
from dataset.images import save_png, to_uint8
from evaluation.image_metrics import psnr, ssim
from evaluation.metrics import IS_SPLITS, FeatureSums, Reference, Statistics, fid
from evaluation.reconstruction_options import Measures, ReconstructionOptions
from evaluation.report import published_figures
from models.quantizer import TableQuantizer
from models.quantizer_tables import build_quantizer
from models.vae import AutoencoderKL
from util import dist
from util.options import ArgumentError
from util.seeds import mixed_seed

FITTED_IMAGES = 256  # Lloyd-Max levels are fitted to the latents of so many images


def several(value: object) -> list:
    """The values of an option that takes one or several, each once."""
    return list(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else [value]


# ---- images


def first_of_each_class(labels: Sequence[int], images_per_class: int, num_images: int | None) -> list[int]:
    """Numbers of the first `images_per_class` samples of each label; of these, `num_images` evenly spaced ones."""
    counts: Counter[int] = Counter()
    chosen = []
    for number, label in enumerate(labels):
        counts[label] += 1
        chosen += [number] if counts[label] <= images_per_class else []
    return chosen if num_images is None else spread_evenly(chosen, num_images)


def posterior_noise(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Normal noise (B, C, h, w) on the CPU; row i depends on (seed, numbers[i]) alone."""
    generators = (torch.Generator("cpu").manual_seed(mixed_seed(seed, number)) for number in numbers)
    return torch.stack([torch.randn(*shape, generator=generator, device="cpu") for generator in generators])


def finite(x: Tensor, numbers: Sequence[int], what: str, precision: str) -> Tensor:
    """x (B, ...) itself; ValueError naming an image if its part of x is not finite."""
    bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if not bad:
        return x
    message = f"the {what} of image {numbers[bad[0]]} (and {len(bad) - 1} more of its batch) are not finite"
    if precision == "fp32":
        raise ArgumentError("vae_path", f"{message}: the VAE is broken")
    raise ArgumentError("precision", f"{message}: {precision} overflowed; use fp32")


@dataclass
class EncodedBatch:
    """Some images and their latents."""

    numbers: list[int]
    originals: Tensor  # (B, 3, S, S) uint8
    latents: Tensor  # (B, C, h, w) scaled


@torch.no_grad()
def encode_batches(
    vae: AutoencoderKL,
    folder: ImageFolderDataset,
    numbers: Sequence[int],
    options: ReconstructionOptions,
    device: torch.device,
    bad: list[int] | None = None,
) -> Iterator[EncodedBatch]:
    """The images with these numbers, encoded in batches; those that cannot be read are left out and added to `bad`."""
    bad, loading = [] if bad is None else bad, (options.batch_size, options.num_workers, options.pin_mem)
    for images, found in readable_images(folder, numbers, *loading, bad):
        images = images.to(device)  # (B, 3, S, S)
        with dist.autocast(device, options.precision):
            posterior = vae.encode(images)
        latents = posterior.mean.float()  # (B, C, h, w)
        if not options.mode:
            noise = posterior_noise(options.seed, found, latents.shape[1:]).to(device)
            latents = latents + posterior.std.float() * noise
        yield EncodedBatch(found, to_uint8(images), finite(vae.scale(latents), found, "latents", options.precision))


# ---- variants


@dataclass
class Variant:
    """One way to decode the latents, with its sums: through a quantizer, or unquantized (None, "VAE alone")."""

    quantizer: TableQuantizer | None
    index_counts: Tensor | None = None  # (C, K) int64: how often each index occurred in each dimension
    num_clamped: Tensor | int = 0  # latents outside the quantizer's range
    num_latents: int = 0
    # image number -> PSNR, SSIM and, with weights, LPIPS
    scores: dict[int, tuple[float, ...]] = field(default_factory=dict)
    sums: FeatureSums | None = None

    @property
    def pair(self) -> tuple[int, float] | None:
        """(bits, range)."""
        return None if self.quantizer is None else (self.quantizer.bits, self.quantizer.max_value)

    @property
    def name(self) -> str:
        """The name of its row."""
        if self.quantizer is None:
            return "VAE alone"
        kind = "" if self.quantizer.kind == "gaussian" else f", {self.quantizer.kind}"
        return f"{self.quantizer.bits} bits, ±{self.quantizer.max_value:g}{kind}"

    @torch.no_grad()
    def decode(self, vae: AutoencoderKL, batch: EncodedBatch, options: ReconstructionOptions) -> Tensor:
        """uint8 images (B, 3, S, S) of the batch's latents, which are counted if they are quantized."""
        latents = batch.latents
        if self.quantizer is not None:
            indices = self.quantizer.quantize(latents)
            levels = len(self.quantizer.reconstruction_values)
            counts = torch.stack([torch.bincount(one.flatten(), minlength=levels) for one in indices.unbind(1)])
            self.index_counts = counts if self.index_counts is None else self.index_counts + counts
            self.num_clamped = self.num_clamped + (latents.abs() > self.quantizer.max_value).sum()
            self.num_latents += latents.numel()
            latents = self.quantizer.dequantize(indices)
        with dist.autocast(latents.device, options.precision):
            decoded = vae.decode(vae.unscale(latents))
        return to_uint8(finite(decoded, batch.numbers, "pixels", options.precision), options.pixels)


def decode_variants(
    options: ReconstructionOptions, device: torch.device, latents: Tensor | None = None
) -> list[Variant]:
    """VAE alone first, then every kind of quantizer with every pair of bits and range.

    latents: those that Lloyd-Max levels are fitted to.
    """
    fitted_to = None if latents is None else latents.numpy()
    return [Variant(None)] + [
        Variant(build_quantizer(kind, bits, -half_width, half_width, latents=fitted_to).to(device))
        for kind in several(options.quantizer)
        for bits in several(options.bits)
        for half_width in several(options.range)
    ]


def latents_to_fit(
    vae: AutoencoderKL,
    folder: ImageFolderDataset,
    chosen: Sequence[int],
    options: ReconstructionOptions,
    device: torch.device,
) -> Tensor:
    """Scaled latents (N, C, h, w) of at most FITTED_IMAGES of the chosen images, on the CPU; rank 0 computes them."""
    found, problem = [], None
    sampled = replace(options, batch_size=1, precision="fp32", mode=False, num_workers=0)
    try:
        if dist.is_main():
            numbers = spread_evenly(chosen, FITTED_IMAGES)
            found = [batch.latents.cpu() for batch in encode_batches(vae, folder, numbers, sampled, device)]
    except (ValueError, OSError) as error:
        problem = error
    dist.agree(problem)
    latents = dist.broadcast_from_main(torch.cat(found) if found else None)
    if latents is None:
        raise ArgumentError("image_dir", f"{options.image_dir}: no image to fit the quantizer lloyd to can be read")
    return latents


@dataclass
class Outcome:
    """What one pass over this process's images gives besides the variants' sums."""

    done: list[int] = field(default_factory=list)  # numbers of the images that were read
    bad: list[int] = field(default_factory=list)  # and of those that could not be
    originals: FeatureSums | None = None
    # number -> original, VAE alone, first pair; uint8 (3, S, S)
    pictures: dict[int, list[Tensor]] = field(default_factory=dict)


def reconstruct(
    vae: AutoencoderKL,
    variants: Sequence[Variant],
    folder: ImageFolderDataset,
    chosen: Sequence[int],
    shown: Sequence[int],
    options: ReconstructionOptions,
    device: torch.device,
    measures: Measures,
) -> Outcome:
    """Fill `variants` from this process's share of the chosen images; pictures are kept of those `shown`."""
    extractor, out = measures.extractor, Outcome()
    places = {number: place for place, number in enumerate(chosen)}  # it decides the split of the Inception Score
    if extractor is not None:
        out.originals, enough = FeatureSums(extractor.dim), len(chosen) if len(chosen) >= IS_SPLITS else None
        for variant in variants:
            variant.sums = FeatureSums(extractor.dim, enough)
    local = chosen[dist.rank() :: dist.world_size()]
    batches = encode_batches(vae, folder, local, options, device, out.bad)
    for batch in tqdm(batches, total=-(-len(local) // options.batch_size), disable=not dist.is_main(), unit="batch"):
        out.done += batch.numbers
        numbers = [places[number] for number in batch.numbers]
        if extractor is not None:
            out.originals.add(numbers, extractor(batch.originals))
        versions = [batch.originals]
        for variant in variants:
            images = variant.decode(vae, batch, options)
            scores = [psnr(images, batch.originals), ssim(images, batch.originals)]
            scores += [measures.lpips(images, batch.originals)] if measures.lpips is not None else []
            per_image = zip(*(values.tolist() for values in scores), strict=True)
            variant.scores.update(zip(batch.numbers, per_image, strict=True))
            if extractor is not None:
                variant.sums.add(numbers, extractor(images))
            if len(versions) < 3:  # original, VAE alone, first pair
                versions.append(images)
        for i, number in enumerate(batch.numbers):
            if options.save_images:
                name = Path(folder.samples[number][0]).relative_to(options.image_dir)
                name = name if name.suffix == ".png" else f"{name}.png"
                save_png(Path(options.output_dir) / "images" / name, versions[2][i])
            if number in shown:
                out.pictures[number] = [version[i].cpu() for version in versions]
    return out


def gathered(local: dict[int, object]) -> dict[int, object]:
    """All processes' {image number: value}, in image order."""
    everything = {number: value for part in dist.gather_objects(local) for number, value in part.items()}
    return {number: everything[number] for number in sorted(everything)}


RATE_KEYS = ("indices_used", "clamped_share", "bits_per_image", "entropy_bits_per_image", "entropy_per_dimension")


def _rates(variant: Variant, num_images: int, num_channels: int, device: torch.device) -> dict:
    """Bits per image as stored, and the entropy of the indices; over all processes."""
    levels = len(variant.quantizer.reconstruction_values)
    counts = variant.index_counts
    if counts is None:  # a process without images
        counts = torch.zeros(num_channels, levels, dtype=torch.int64, device=device)
    counts = dist.all_reduce_sum(counts)
    totals = torch.tensor([int(variant.num_clamped), variant.num_latents], device=device)
    clamped, latents = dist.all_reduce_sum(totals).tolist()
    p = counts.double() / counts.sum(1, keepdim=True)  # (C, K)
    entropy = -torch.xlogy(p, p).sum(1) / math.log(2)  # (C,) bits
    tokens = latents / num_images / num_channels  # of an image
    per_image = (variant.quantizer.bits * num_channels * tokens, float(entropy.sum()) * tokens)
    used = int((counts.sum(0) > 0).sum())
    return dict(zip(RATE_KEYS, (used, clamped / latents, *per_image, entropy.tolist()), strict=True))


def summarise(
    variant: Variant,
    num_images: int,
    num_channels: int,
    device: torch.device,
    originals: Statistics | None,
    reference: Reference | None,
    comparable: bool,
) -> dict:
    """A variant's figures over all processes' images; every process must call it. rFID, FID and IS are on rank 0 only.

    originals: statistics of the images' own features, for rFID. comparable: with the published figures.
    """
    scores = list(zip(*gathered(variant.scores).values(), strict=True))
    means = [math.fsum(values) / len(values) for values in scores] + [None] * (3 - len(scores))
    kind = None if variant.quantizer is None else variant.quantizer.kind
    bits, half_width = variant.pair or (None, None)
    figures = {"name": variant.name, "bits": bits, "range": half_width, "quantizer": kind}
    figures |= dict(zip(("psnr", "ssim", "lpips"), means, strict=True))
    figures |= dict.fromkeys(("rfid", "fid", "inception_score", "inception_score_std", *RATE_KEYS))
    figures |= published_figures(variant.pair, comparable and kind in (None, "gaussian"))
    if variant.quantizer is not None:
        figures |= _rates(variant, num_images, num_channels, device)
    if originals is None:
        return figures
    sums = variant.sums.merge()
    if dist.is_main():  # an eigenvalue problem: seconds on all cores
        figures["rfid"] = fid(sums.pool.as_dict(), originals)
        figures["fid"] = None if reference is None else fid(sums.pool.as_dict(), reference.pool)
        if sums.classes is not None:
            figures["inception_score"], figures["inception_score_std"] = sums.classes.score()
    return figures


def pictures_of(
    vae: AutoencoderKL,
    quantizer: TableQuantizer,
    folder: ImageFolderDataset,
    numbers: Sequence[int],
    options: ReconstructionOptions,
    device: torch.device,
) -> Tensor:
    """uint8 (M, 3, S, S): original | VAE alone | quantized, of the images with these numbers, one after the other."""
    pictures, variants = {}, [Variant(None), Variant(quantizer)]
    once = replace(options, num_workers=0)
    for batch in encode_batches(vae, folder, list(dict.fromkeys(numbers)), once, device):
        versions = [batch.originals, *(variant.decode(vae, batch, options) for variant in variants)]
        pictures |= {number: [v[i].cpu() for v in versions] for i, number in enumerate(batch.numbers)}
    return torch.stack([picture for number in numbers for picture in pictures[number]])
