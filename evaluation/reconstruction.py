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

from dataset.folders import spread_evenly
from dataset.image_folder import ImageFolderDataset, readable_images
from dataset.images import save_png, to_uint8
from evaluation.feature_sums import IS_SPLITS, FeatureSums, Statistics
from evaluation.image_metrics import psnr, ssim
from evaluation.metrics import Reference, fid
from evaluation.reconstruction_options import Measures, ReconstructionOptions
from evaluation.reconstruction_report import published_figures
from models.quantizer import TableQuantizer
from models.quantizer_tables import build_quantizer
from models.vae import AutoencoderKL
from util import dist
from util.options import ArgumentError
from util.seeds import mixed_seed

FITTED_IMAGES = 256  # Lloyd-Max levels are fitted to the latents of so many images


@dataclass
class EncodedBatch:
    """Some images and their latents."""

    numbers: list[int]
    originals: Tensor  # (B, 3, S, S) uint8
    latents: Tensor  # (B, C, h, w) scaled


@dataclass
class Codec:
    """The VAE and the images, which are encoded and decoded as the options say."""

    vae: AutoencoderKL
    folder: ImageFolderDataset
    options: ReconstructionOptions
    device: torch.device

    @torch.no_grad()
    def encode(self, numbers: Sequence[int], bad: list[int] | None = None) -> Iterator[EncodedBatch]:
        """The images with these numbers in batches; those that cannot be read are left out and added to `bad`."""
        o, bad = self.options, [] if bad is None else bad
        for images, found in readable_images(self.folder, numbers, o.batch_size, o.num_workers, o.pin_mem, bad):
            images = images.to(self.device)  # (B, 3, S, S)
            with dist.autocast(self.device, o.precision):
                posterior = self.vae.encode(images)
            latents = posterior.mean.float()  # (B, C, h, w)
            if not o.mode:
                noise = posterior_noise(o.seed, found, latents.shape[1:]).to(self.device)
                latents = latents + posterior.std.float() * noise
            latents = finite(self.vae.scale(latents), found, "latents", o.precision)
            yield EncodedBatch(found, to_uint8(images), latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, numbers: Sequence[int]) -> Tensor:
        """uint8 (B, 3, S, S) of scaled latents of the images with these numbers."""
        with dist.autocast(self.device, self.options.precision):
            decoded = self.vae.decode(self.vae.unscale(latents))
        return to_uint8(finite(decoded, numbers, "pixels", self.options.precision), self.options.pixels)

    def pictures(self, quantizer: TableQuantizer, numbers: Sequence[int]) -> Tensor:
        """uint8 (3M, 3, S, S): original | VAE alone | quantized, of M images, one image after the other."""
        pictures, here = {}, replace(self, options=replace(self.options, num_workers=0))
        for batch in here.encode(list(dict.fromkeys(numbers))):
            latents = (batch.latents, quantizer(batch.latents))
            versions = [batch.originals, *(self.decode(one, batch.numbers) for one in latents)]
            pictures |= {number: [v[i].cpu() for v in versions] for i, number in enumerate(batch.numbers)}
        return torch.stack([picture for number in numbers for picture in pictures[number]])

    def save(self, numbers: Sequence[int], images: Tensor) -> None:
        """Write reconstructions (B, 3, S, S) to OUT/images, under the originals' names."""
        for number, image in zip(numbers, images, strict=True):
            name = Path(self.folder.samples[number][0]).relative_to(self.options.image_dir)
            name = name if name.suffix == ".png" else f"{name}.png"
            save_png(Path(self.options.output_dir) / "images" / name, image)


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


def first_of_each_class(labels: Sequence[int], images_per_class: int, num_images: int | None) -> list[int]:
    """Numbers of the first `images_per_class` samples of each label; of these, `num_images` evenly spaced ones."""
    counts: Counter[int] = Counter()
    chosen = []
    for number, label in enumerate(labels):
        counts[label] += 1
        chosen += [number] if counts[label] <= images_per_class else []
    return chosen if num_images is None else spread_evenly(chosen, num_images)


# ---- variants


@dataclass
class Variant:
    """One way to decode the latents, with its sums: through a quantizer, or unquantized (None, "VAE alone")."""

    quantizer: TableQuantizer | None
    index_counts: Tensor | None = None  # (C, K) int64: how often each index occurred in each dimension
    num_clamped: Tensor | int = 0  # latents outside the quantizer's range
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

    def quantize(self, latents: Tensor) -> Tensor:
        """The latents (B, C, h, w) that are decoded; those that are quantized are counted."""
        if self.quantizer is None:
            return latents
        indices, levels = self.quantizer.quantize(latents), len(self.quantizer.reconstruction_values)
        counts = torch.stack([torch.bincount(one.flatten(), minlength=levels) for one in indices.unbind(1)])
        self.index_counts = counts if self.index_counts is None else self.index_counts + counts
        self.num_clamped = self.num_clamped + (latents.abs() > self.quantizer.max_value).sum()
        return self.quantizer.dequantize(indices)

    def score(self, images: Tensor, batch: EncodedBatch, measures: Measures) -> None:
        """Add the scores of the decoded images (B, 3, S, S) of a batch."""
        scores = [psnr(images, batch.originals), ssim(images, batch.originals)]
        scores += [measures.lpips(images, batch.originals)] if measures.lpips is not None else []
        per_image = zip(*(values.tolist() for values in scores), strict=True)
        self.scores.update(zip(batch.numbers, per_image, strict=True))


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


def several(value: object) -> list:
    """The values of an option that takes one or several, each once."""
    return list(dict.fromkeys(value)) if isinstance(value, (list, tuple)) else [value]


def latents_to_fit(codec: Codec, chosen: Sequence[int]) -> Tensor:
    """Scaled latents (N, C, h, w) of at most FITTED_IMAGES of the chosen images, on the CPU; rank 0 computes them."""
    found, problem, options = [], None, codec.options
    sampled = replace(options, batch_size=1, precision="fp32", mode=False, num_workers=0)
    try:
        if dist.is_main():
            batches = replace(codec, options=sampled).encode(spread_evenly(chosen, FITTED_IMAGES))
            found = [batch.latents.cpu() for batch in batches]
    except (ValueError, OSError) as error:
        problem = error
    dist.agree(problem)
    latents = dist.broadcast_from_main(torch.cat(found) if found else None)
    if latents is None:
        raise ArgumentError("image_dir", f"{options.image_dir}: no image to fit the quantizer lloyd to can be read")
    return latents


# ---- the pass over the images, and its figures


@dataclass
class Outcome:
    """What one pass over this process's images gives besides the variants' sums."""

    done: list[int] = field(default_factory=list)  # numbers of the images that were read
    bad: list[int] = field(default_factory=list)  # and of those that could not be
    originals: FeatureSums | None = None


def reconstruct(codec: Codec, variants: Sequence[Variant], chosen: Sequence[int], measures: Measures) -> Outcome:
    """Fill `variants` from this process's share of the chosen images, and write the first pair's if asked for."""
    extractor, out = measures.extractor, Outcome()
    places = {number: place for place, number in enumerate(chosen)}  # it decides the split of the Inception Score
    if extractor is not None:
        out.originals, enough = FeatureSums(extractor.dim), len(chosen) if len(chosen) >= IS_SPLITS else None
        for variant in variants:
            variant.sums = FeatureSums(extractor.dim, enough)
    local, size = chosen[dist.rank() :: dist.world_size()], codec.options.batch_size
    batches = codec.encode(local, out.bad)
    for batch in tqdm(batches, total=math.ceil(len(local) / size), disable=not dist.is_main(), unit="batch"):
        out.done += batch.numbers
        numbers = [places[number] for number in batch.numbers]
        if extractor is not None:
            out.originals.add(numbers, extractor(batch.originals))
        for i, variant in enumerate(variants):
            images = codec.decode(variant.quantize(batch.latents), batch.numbers)
            variant.score(images, batch, measures)
            if extractor is not None:
                variant.sums.add(numbers, extractor(images))
            if i == 1 and codec.options.save_images:
                codec.save(batch.numbers, images)
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
    clamped, latents = dist.all_reduce_sum(torch.tensor(int(variant.num_clamped), device=device)), int(counts.sum())
    p = counts.double() / counts.sum(1, keepdim=True)  # (C, K)
    entropy = -torch.xlogy(p, p).sum(1) / math.log(2)  # (C,) bits
    tokens = latents / num_images / num_channels  # of an image
    per_image = (variant.quantizer.bits * num_channels * tokens, float(entropy.sum()) * tokens)
    used = int((counts.sum(0) > 0).sum())
    return dict(zip(RATE_KEYS, (used, int(clamped) / latents, *per_image, entropy.tolist()), strict=True))


def summarise(
    variant: Variant, codec: Codec, num_images: int, originals: Statistics | None, reference: Reference | None
) -> dict:
    """A variant's figures over all processes' images; every process must call it. rFID, FID and IS are on rank 0 only.

    originals: statistics of the images' own features, for rFID.
    """
    scores = list(zip(*gathered(variant.scores).values(), strict=True))
    means = [math.fsum(values) / len(values) for values in scores] + [None] * (3 - len(scores))
    kind = None if variant.quantizer is None else variant.quantizer.kind
    bits, half_width = variant.pair or (None, None)
    figures = {"name": variant.name, "bits": bits, "range": half_width, "quantizer": kind}
    figures |= dict(zip(("psnr", "ssim", "lpips"), means, strict=True))
    figures |= dict.fromkeys(("rfid", "fid", "inception_score", "inception_score_std", *RATE_KEYS))
    comparable = codec.options.beside_published and kind in (None, "gaussian")
    figures |= published_figures(variant.pair, comparable)
    if variant.quantizer is not None:
        figures |= _rates(variant, num_images, codec.vae.embed_dim, codec.device)
    if originals is None:
        return figures
    sums = variant.sums.merge()
    if dist.is_main():  # an eigenvalue problem: seconds on all cores
        figures["rfid"] = fid(sums.pool.as_dict(), originals)
        figures["fid"] = None if reference is None else fid(sums.pool.as_dict(), reference.pool)
        if sums.classes is not None:
            figures["inception_score"], figures["inception_score_std"] = sums.classes.score()
    return figures
