"""The stages that give what is asked for: on ImageNet, quickly, or with the demo's model as a stand-in."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from checkpoints.download import PUBLISHED as FILES
from dataset.record import RECORD as CACHE_RECORD
from evaluation.inception import InceptionFeatures, download_target, fetch_inception_weights, write_random_inception
from evaluation.reference import make_reference, save_reference
from models import MODELS
from models.config import TokenBridgeConfig
from tools.reproduce import figures
from tools.reproduce.commands import Command, PlannedStage, parse, published
from tools.reproduce.cost import DOWNLOAD_BYTES, INCEPTION_FLOPS, Work, sampling_flops, vae_flops
from tools.reproduce.options import MODELS_PUBLISHED, Options
from tools.reproduce.training import read_training
from training.flops import IMAGENET, mean_masked, step_flops
from util.checkpoint import LAST
from util.options import ArgumentError
from util.presets import load_preset

CLASSES, IMAGES_RECONSTRUCTED = 1000, 50_000  # of ImageNet; as many of train/ as of val/
FEATURE_BYTES = 20.4e3  # that an evaluation keeps of an image
CACHED_BYTES = 2 * 32 * 16 * 16 * 2  # float16 moments of an image and of its mirror image
SPEED_IMAGES = {False: 5000, True: 16}  # True: of the demo
QUICK = dict(num_images=5000, num_iter=64, fid_infinity=True)
QUICK_PER_CLASS = 5  # reconstructed images
STAND_IN = "stand-in: the demo's model, VAE and digits, random Inception weights, a few images on the CPU"
# The demo's sizes: enough images for every score (the Inception Score needs 10, FID's extrapolation 20).
DEMO_REFERENCE, DEMO_IMAGES, DEMO_RECONSTRUCTED = 200, 32, 12
DEMO_VAE = dict(embed_dim=4, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, attention=False)


class Plan:
    """The stages of `Options`."""

    def __init__(self, options: Options):
        o = self.options = options
        self.data = str(o.root / "digits") if o.demo else o.data_path
        self.vae = o.root / "vae" / "vae.pth" if o.demo else Path(FILES["vae"].target)
        self.inception = o.out / "stand_in" / "inception.pth" if o.demo else download_target()
        self.stats = o.out / "stand_in" / "stats.npz" if o.demo else Path(FILES["stats"].target)
        self.device = "cpu" if o.demo else "cuda"
        self.precision = "fp32" if o.demo else "fp16"
        # Sampling iterations of the evaluation, and of the stage that times another number.
        self.iterations = (8, 4) if o.demo else (64, 256) if o.quick else (256, 64)

    def stages(self) -> list[PlannedStage]:
        """All of them, in the order in which they run."""
        o, found = self.options, self.preparation()
        if o.train:
            return found + self.training(o.train)
        found += self.reconstruction() if "reconstruction" in o.sections else []
        for name in MODELS_PUBLISHED:
            found += self.evaluation(name) if name in o.sections else []
        return found + (self.speed() if "speed" in o.sections else [])

    def command(self, name: str, **changes: object) -> Command:
        """A published command with its folders, and with what every stand-in needs."""
        o = self.options
        places = dict(vae_path=self.vae, device="cpu", num_workers=0) if o.demo else {}
        cache = o.cached_path or str(o.out / "cache")
        return published(name, o.processes, self.data, str(o.out / name), cache).changed(**places | changes)

    # ---- what the commands need

    def checkpoint(self, name: str) -> Path:
        """The model's file."""
        return self.options.root / "model" / LAST if self.options.demo else Path(FILES[name].target)

    def config(self, name: str) -> TokenBridgeConfig:
        """The model's architecture."""
        if not self.options.demo:
            return TokenBridgeConfig(**MODELS[f"tokenbridge_{name}"].keywords)
        flags = load_preset("digits").flags
        sizes = {key: flags[key] for key in ("img_size", "class_num", "buffer_size")}
        shape = dict(vae_embed_dim=4, vae_stride=8, channel_order=range(4))
        return TokenBridgeConfig(**MODELS[flags["model"]].keywords | sizes | shape)

    def vae_work(self) -> tuple[float, float]:
        """FLOPs of encoding and decoding an image."""
        return vae_flops(32, **DEMO_VAE) if self.options.demo else vae_flops()

    def needed(self) -> list[str]:
        """Names of the published files that the run reads."""
        if self.options.train:
            return ["vae"]
        sections = self.options.sections
        models = [n for n in MODELS_PUBLISHED if n in sections or n == "large" and "speed" in sections]
        return ["vae", *models, "stats", *(["adm_batch"] if models else [])]

    def missing(self) -> list[str]:
        """Names of the published files that are not there yet, Inception's weights as "inception"."""
        lacking = [name for name in self.needed() if not Path(FILES[name].target).is_file()]
        return lacking + (["inception"] if not self.options.train and not self.inception.is_file() else [])

    def preparation(self) -> list[PlannedStage]:
        """The stages that get the files."""
        o, inception = self.options, () if self.options.train else (self.inception,)
        if not o.demo:
            products = (*(Path(FILES[name].target) for name in self.needed()), *inception)
            about = dict(name="download", about="published files that are missing", result=dict, products=products)
            work = partial(fetch_inception_weights, None) if inception else dict
            return [PlannedStage.of(Command(("-m", "tools.download", *self.needed())), work=work, **about)]
        found = []
        if o.root == o.out / "toy":
            flags = {"toy": [], "output_dir": [str(o.root)], "pictures": [str(o.root / "pictures")]}
            about = "the demo at toy size: no model of make demo was found"
            products, command = (self.vae, self.checkpoint("large")), Command(("-m", "demo.run"), flags)
            found = [PlannedStage.of(command, name="toy", about=about, result=dict, products=products)]
        if o.train:
            return found
        work = partial(write_stand_ins, self.inception, self.stats, Path(self.data) / "train")
        about = dict(name="stand-ins", about="random Inception weights, statistics of some digits")
        needs, cost = [stage.name for stage in found], Work(single=DEMO_REFERENCE * INCEPTION_FLOPS)
        products = (self.inception, self.stats)
        return [*found, PlannedStage(**about, work=work, result=dict, needs=needs, products=products, cost=cost)]

    # ---- reconstruction

    def reconstruction(self) -> list[PlannedStage]:
        """The published command, the other bits, the other ranges, and the validation images."""
        val = dict(image_dir=Path(self.data) / "val", images_per_class="all", fid_stats="none")
        rows = (
            ("reconstruction", "50 training images of each class through VAE and quantizer", {}),
            ("bits", "the same with fewer bits", dict(bits=[3, 4, 5])),
            ("ranges", "the same with smaller ranges", dict(range=[2, 3, 4])),
            ("validation", "all validation images against their originals", val),
        )
        return [self._reconstruction(*row) for row in rows]

    def _reconstruction(self, name: str, about: str, changes: dict[str, object]) -> PlannedStage:
        o, on_val, folder = self.options, name == "validation", self.options.out / name
        images = DEMO_RECONSTRUCTED if o.demo else QUICK_PER_CLASS * CLASSES if o.quick else IMAGES_RECONSTRUCTED
        changes = dict(output_dir=folder) | changes | (dict(images_per_class=QUICK_PER_CLASS) if o.quick else {})
        if o.demo:
            stand_in = dict(img_size=32, num_images=images, pixels="truncate", inception_weights=self.inception)
            changes = dict(fid_stats=self.stats) | changes | stand_in
        command = self.command("reconstruction", **changes)
        variants = 1 + len(command.flags["bits"]) * len(command.flags["range"])
        encode, decode = self.vae_work()
        cost = Work(single=images * (encode + variants * decode + (1 + variants) * INCEPTION_FLOPS), written=5e6)
        about = dict(name=name, about=about, folder=folder, cost=cost)
        inputs = (self.vae, self.inception, *(() if on_val else (self.stats,)))
        result = partial(figures.read_reconstruction, folder, not on_val)
        return PlannedStage.of(command, "" if on_val else "reconstruction", **about, inputs=inputs, result=result)

    # ---- evaluation

    def evaluation(self, name: str) -> list[PlannedStage]:
        """FID, IS, precision and recall of a model; FID at other guidance scales if asked for; its parameters."""
        o, checkpoint = self.options, self.checkpoint(name)
        found = [self._evaluation(name, name, "FID, IS, precision, recall")]
        scales = sorted({*o.guidance, float(parse(name)[1]["cfg"][0])})
        if len(scales) > 1:
            stage = self._evaluation(f"guidance-{name}", name, "FID against guidance", cfg=scales)
            found.append(replace(stage, result=partial(figures.read_guidance, o.out / name, scales)))
        about = dict(name=f"parameters-{name}", about="size of the checkpoint's model", inputs=(checkpoint,))
        return [*found, PlannedStage(**about, result=partial(figures.count_parameters, checkpoint))]

    def _evaluation(self, stage: str, model: str, about: str, **changes: object) -> PlannedStage:
        o = self.options
        batch = () if o.demo else (Path(FILES["adm_batch"].target),)
        changes = (QUICK if o.quick else {}) | changes
        if o.demo:
            stand_in = dict(model="tokenbridge_digits", resume=self.checkpoint(model).parent, fid_stats=self.stats)
            sizes = dict(num_images=DEMO_IMAGES, num_iter=self.iterations[0], eval_bsz=8)
            changes = stand_in | sizes | dict(inception_weights=self.inception) | changes
        else:
            changes = dict(pr_reference=batch[0]) | changes
        command = self.command(model, precision=self.precision, **changes)
        flags, scales = command.flags, [float(x) for x in command.flags["cfg"]]
        steps, images = int(flags["num_iter"][0]), int(flags["num_images"][0]) * max(1, len(scales) - 1)
        sampling = images * sampling_flops(self.config(model), steps, scales[-1] != 1)
        cost = Work(sampling, images * (self.vae_work()[1] + INCEPTION_FLOPS), images * FEATURE_BYTES)
        inputs = (self.checkpoint(model), self.vae, self.stats, *batch, self.inception)
        result = partial(figures.read_evaluation, Path(flags["output_dir"][0]), f"{model}_eval", scales[0])
        about = f"{flags['num_images'][0]} images of {model} at {steps} iterations: {about}"
        return PlannedStage.of(command, model, name=stage, about=about, result=result, inputs=inputs, cost=cost)

    def speed(self) -> list[PlannedStage]:
        """Images per second of large at another number of iterations, and the time of its head."""
        folder, images = self.options.out / "speed", SPEED_IMAGES[self.options.demo]
        changes = dict(output_dir=folder, num_iter=self.iterations[1], num_images=images)
        found = replace(self._evaluation("speed", "large", "images/s", **changes), folder=folder)
        results = self.options.out / "head.json"
        flags = dict(only="head", budget=60, json=results, model="tokenbridge_large", precision=self.precision)
        if self.options.demo:
            sizes = dict(img_size=32, vae_stride=8, vae_embed_dim=4, buffer_size=8)
            flags |= dict(model="tokenbridge_digits", device="cpu") | sizes
        command = Command(("-m", "tools.bench", "gpu")).changed(**flags)
        about = dict(name="head", about="time of large's head", result=partial(figures.read_head, results))
        return [found, PlannedStage.of(command, **about)]

    # ---- training

    def training(self, name: str) -> list[PlannedStage]:
        """The published cache command, and the first steps of the published training."""
        o, preset, config = self.options, load_preset(name), self.config(name)
        digits = {key: value for key, value in load_preset("digits").flags.items() if key != "max_steps"}
        sizes = dict(img_size=32, vae_embed_dim=4) if o.demo else {}
        cache = self.command("cache", **sizes)
        cost = Work(single=2 * IMAGENET * self.vae_work()[0], written=IMAGENET * CACHED_BYTES)
        about = dict(name="cache", about="latents of the training images, with their mirror images")
        about |= dict(inputs=(self.vae,), cost=Work() if o.demo else cost)
        found = [] if o.cached_path else [PlannedStage.of(cache, "cache", **about, result=dict)]
        folder = o.out / f"train-{name}-{o.steps}"
        other = {} if name == "large" else {key: preset.flags[key] for key in ("model", "epochs", "warmup_epochs")}
        changes = other | dict(output_dir=folder, resume=folder, use_cached=True, precision=self.precision)
        changes |= dict(cached_path=cache.flags["cached_path"][0], max_steps=o.steps)
        changes |= dict(save_every_steps=min(500, o.steps // 4))
        changes |= digits | sizes | dict(vae_stride=8) if o.demo else {}
        command = self.command("train", **changes)
        each, rest = divmod(preset.global_batch, o.processes * int(command.flags["batch_size"][0]))
        if rest and not o.demo:
            message = f"gpus {o.processes} x 64 images do not divide the published batch of {preset.global_batch}"
            raise ArgumentError("gpus", message)
        command = command if o.demo or each == 1 else command.changed(accum_iter=each)
        steps = o.steps * preset.global_batch * step_flops(config, mean_masked(config))
        cost = Work(steps, written=2.2 * DOWNLOAD_BYTES[name])
        where = folder, Path(changes["cached_path"]), Path(o.bands)
        about = dict(name=f"train-{name}", about=f"{o.steps} steps of the published training of {name}", folder=folder)
        about |= dict(needs=[stage.name for stage in found], cost=Work() if o.demo else cost)
        about |= dict(inputs=(self.vae, where[1] / CACHE_RECORD))
        result = partial(read_training, *where, preset, o.processes, self.device)
        return [*found, PlannedStage.of(command, "train", **about, result=result)]


def write_stand_ins(weights: Path, stats: Path, images: Path) -> None:
    """Random Inception weights, and the statistics and features of some images by them."""
    weights.parent.mkdir(parents=True, exist_ok=True)
    extractor = InceptionFeatures(str(write_random_inception(weights)), torch.device("cpu"))
    save_reference(stats, make_reference(images, extractor, img_size=32, num_images=DEMO_REFERENCE))
