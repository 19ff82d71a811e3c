"""From class numbers to images: `load(path).generate([207, 360], cfg=3.0, seed=0)`.

`generate_batches` is the loop over batches; --sample, --evaluate, the sample grids of training and `Pipeline` use it.

Letters: B images of a batch, S their side in pixels, L tokens, C latent channels, H and W latent grid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoints.content import class_names
from checkpoints.folder import check_free, write_folder
from checkpoints.hub import SCHEME, local_path
from checkpoints.load import load_model
from dataset.images import to_pil, to_uint8
from generation.editing import Edit, Picture, make_edit
from models.sampling.loop import SamplerState, sample_steps
from models.sampling.options import SamplerOptions
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import dist
from util.checkpoint import SAFE
from util.options import ArgumentError, option, read_options
from util.seeds import mixed_seed

Classes = Sequence[int | None | Mapping[int, float]]


@dataclass(kw_only=True)
class GenerationSettings(SamplerOptions):
    """How images are generated: the sampler's options, the seed, the size of a batch and the precision."""

    seed: int = 0
    batch_size: int = option(64, lowest=1)
    precision: str = "fp32"


def generation_settings(args: object, device: torch.device) -> GenerationSettings:
    """The settings of main_tokenbridge.py's flags."""
    precision = dist.pick_precision(args.precision, device)
    return read_options(GenerationSettings, args, seed=args.seed, batch_size=args.eval_bsz, precision=precision)


@dataclass
class GenerationStep:
    """What is known of a batch after a sampling step."""

    numbers: Sequence[int]  # image numbers (B,)
    state: SamplerState
    vae: AutoencoderKL

    @property
    def step(self) -> int:
        """0-based."""
        return self.state.step

    @property
    def num_iter(self) -> int:
        """Sampling steps in all."""
        return self.state.num_iter

    @property
    def done(self) -> bool:
        """Whether this was the last step: `images` then gives the results."""
        return self.state.step == self.state.num_iter - 1

    @torch.no_grad()
    def pixels(self) -> Tensor:
        """uint8 (B, 3, S, S), grey where a token is masked; each call decodes the batch. ValueError as `decode`."""
        images = decode(self.vae, self.state.latents, self.numbers)
        if self.state.num_masked == 0:
            return images
        masked = self.state.masked.repeat_interleave(self.vae.stride, 1).repeat_interleave(self.vae.stride, 2)
        return images.masked_fill(masked.unsqueeze(1), 128)  # masked is (B, S, S)

    def images(self) -> list[Image.Image]:
        """`pixels` as PIL images."""
        return to_pil(self.pixels())


def decode(vae: AutoencoderKL, latents: Tensor, numbers: Sequence[int]) -> Tensor:
    """uint8 images (B, 3, S, S) of scaled latents; ArgumentError naming the first of `numbers` that is not finite.

    Always in float32: activations of the VAE can overflow half precision.
    """
    with dist.autocast(latents.device, "fp32"):
        images = vae.decode(vae.unscale(latents.float()))
    bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        what = f"image {numbers[bad[0]]} (and {len(bad) - 1} more of its batch) came out NaN"
        why = "the weights are broken, or the precision overflowed; look at the checkpoint, or use precision fp32"
        raise ArgumentError("precision", f"{what}: {why}")
    return to_uint8(images)


def start_sampling(
    model: TokenBridge,
    labels: Classes,
    numbers: Sequence[int],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int] | None = None,
    edit: Edit | None = None,
) -> Iterator[SamplerState]:
    """The sampler's states for one batch; arguments as for `generate_batches`. They are checked at the call."""
    settings.check(model.token_dim)
    class_embedding = model.class_embeddings([labels[i] for i in numbers])  # (B, D)
    own_seeds = [mixed_seed(settings.seed, i) if seeds is None else seeds[i] for i in numbers]
    editing = {} if edit is None else {"init": edit.latents, "regenerate": edit.regenerate}
    return sample_steps(model, class_embedding, settings, seeds=own_seeds, **editing)


@torch.no_grad()
def generate_batches(
    model: TokenBridge,
    vae: AutoencoderKL,
    labels: Classes,
    indices: Sequence[int],
    settings: GenerationSettings,
    device: torch.device,
    *,
    on_step: Callable[[GenerationStep], None] | None = None,
    seeds: Sequence[int] | None = None,
    edit: Edit | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (image numbers, uint8 images (B, 3, S, S)) for the image numbers `indices`, whose classes are labels[i].

    Image i depends on (settings.seed, i) alone, not on the batch. labels: class numbers, None, or mixtures (see
    TokenBridge.class_embeddings). seeds: one per image number, used instead of those of (settings.seed, i). on_step is
    called after each sampling step. ValueError if logits or pixels of an image are not finite.
    """
    for first in range(0, len(indices), settings.batch_size):
        numbers = list(indices[first : first + settings.batch_size])
        with dist.autocast(device, settings.precision):
            for state in start_sampling(model, labels, numbers, settings, seeds=seeds, edit=edit):
                if on_step is not None:
                    with dist.autocast(device, "fp32"):  # the caller's own operations are not autocast
                        on_step(GenerationStep(numbers, state, vae))
        yield numbers, decode(vae, state.latents, numbers)


@dataclass
class Pipeline(ModelHubMixin):
    """A model and its VAE, both in eval mode on one device.

    precision: fp32, bf16 or fp16; None chooses by device. class_names: by class number, as training recorded them.
    about: what their file says of them, for `save_pretrained` (see checkpoints.load.load_model).

    save_pretrained(folder) and push_to_hub("OWNER/REPOSITORY") write the folder of tools.export, with a model card.
    """

    model: TokenBridge
    vae: AutoencoderKL
    precision: str | None = None
    class_names: Sequence[str] = ()
    about: Mapping[str, object] = field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **options: object) -> "Pipeline":
        """The pipeline of a folder, or of OWNER/REPOSITORY on the hub; options: those of `load`.

        The mixin's own download is not used: checkpoints/hub.py trusts nothing in the hub's answer.
        """
        if Path(name).exists():
            return load(name, **options)
        return load(f"{SCHEME}{name}{f'@{revision}' if revision else ''}", **options)

    def save_pretrained(self, save_directory: str | Path, **options: object) -> str | None:
        """Write the folder; options: the mixin's. ArgumentError if it holds an export already."""
        check_free(Path(save_directory), SAFE)
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(save_directory, self.model, self.vae, self.about)

    @property
    def device(self) -> torch.device:
        """Where images are generated."""
        return self.model.mask_token.device

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return self.model.grid_size * self.vae.stride

    def settings(self, *, precision: str | None = None, **options: object) -> GenerationSettings:
        """GenerationSettings of the keyword arguments that `generate` takes."""
        precision = dist.pick_precision(precision or self.precision, self.device)
        return GenerationSettings(precision=precision, **options)

    def generate(
        self,
        classes: Classes,
        *,
        init: Picture | None = None,
        mask: Picture | None = None,
        on_step: Callable[[GenerationStep], None] | None = None,
        progress: bool = False,
        **options: object,
    ) -> list[Image.Image]:
        """One PIL image per entry of `classes`: a class number, None for no class, or a mixture {207: 0.5, 360: 0.5}.

        Image i depends on (seed, i) alone and is the one that `main_tokenbridge.py --sample --seed` writes as number
        i. init and mask: regenerate only the white part of the mask (see `token_mask`). on_step is called with a
        GenerationStep after every step of every batch; progress shows a bar. options: the fields of
        GenerationSettings, such as seed, cfg, num_iter, temperature and order. ValueError for what does not fit.
        """
        settings = self.settings(**options)
        edit = make_edit(self.model, self.vae, init, mask)
        images = []
        steps = -(-len(classes) // settings.batch_size) * settings.num_iter
        with tqdm(total=steps, unit="step", disable=not progress) as bar:

            def after_step(step: GenerationStep) -> None:
                bar.update()
                if on_step is not None:
                    on_step(step)

            indices = range(len(classes))
            for _, batch in generate_batches(
                self.model, self.vae, classes, indices, settings, self.device, on_step=after_step, edit=edit
            ):
                images += to_pil(batch)
        return images

    def generate_steps(
        self, classes: Classes, *, init: Picture | None = None, mask: Picture | None = None, **options: object
    ) -> Iterator[GenerationStep]:
        """As `generate` for one batch, but yields a GenerationStep after every step; closing the iterator stops.

        Everything is checked at the call, before the first step.
        """
        settings, numbers = self.settings(**options), range(len(classes))
        edit = make_edit(self.model, self.vae, init, mask)
        states = start_sampling(self.model, classes, numbers, settings, edit=edit)

        def next_state() -> SamplerState | None:
            with dist.autocast(self.device, settings.precision):  # left while the caller has control
                return next(states, None)

        return (GenerationStep(numbers, state, self.vae) for state in iter(next_state, None))


def load(
    path: str | Path,
    vae_path: str | Path | None = None,
    *,
    weights: str = "ema",
    device: torch.device | str | None = None,
) -> Pipeline:
    """The pipeline of a checkpoint (a file, or a folder with checkpoint-last.pth or model.safetensors) and its VAE.

    Both may be hf://OWNER/REPOSITORY[@REVISION][/PATH], which is fetched from the hub.

    vae_path: by default where training had it, else beside the checkpoint, else pretrained_models/vae/kl16.ckpt; a VAE
    that the model was not trained with is refused. weights: "ema" or "model". device: the CPU unless given. Published
    checkpoints, which hold no config, are recognised by their shapes. FileNotFoundError or ValueError naming the file.
    """
    path, vae_path = local_path(path), vae_path and local_path(vae_path)
    model, vae, about = load_model(path, vae_path, weights=weights, device=device)
    return Pipeline(model, vae, class_names=class_names(about), about=about)
