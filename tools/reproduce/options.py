"""What `python -m tools.reproduce` is asked for."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from util.checkpoint import LAST
from util.options import ArgumentError, check_options, option

SECTIONS = ("reconstruction", "large", "huge", "speed")
MODELS_PUBLISHED = ("large", "huge")


@dataclass(frozen=True)
class Options:
    """What to reproduce, and where. ArgumentError for what does not go together."""

    data_path: str = option("", "the ImageNet folder, with train/<class>/ and val/<class>/; not needed with demo")
    output_dir: str = option("reproduction", "where records, features and reproduction.md go")
    gpus: int | None = option(None, "processes, one per GPU; default: 8 as published, with demo 2 on the CPU", lowest=1)
    only: str = option("", f"parts, separated by commas: {', '.join(SECTIONS)}; default: all")
    guidance: tuple[float, ...] = option(
        (), "also FID at these guidance scales, as many images each, and its plot", nargs="+", lowest=0, highest=1e4
    )
    quick: bool = option(False, "5,000 images, 64 iterations: shows that all works, compared with nothing published")
    demo: bool = option(False, "the same stages with the demo's model and random Inception weights, on the CPU")
    demo_dir: str = option("demo/out", "with demo: what make demo wrote; if it is not there, a toy-size training")
    train: str | None = option(None, "instead: the first steps of the published training", choices=MODELS_PUBLISHED)
    steps: int = option(2000, "with train: optimizer steps", lowest=20)
    cached_path: str = option("", "with train: a latent cache; default: OUT/cache, made first (42 GB for ImageNet)")
    bands: str = option("loss_bands", "with train: folder of the recorded losses that the run is compared with")

    def __post_init__(self) -> None:
        check_options(self)
        unknown = [name for name in self.sections if name not in SECTIONS]
        if unknown:
            raise ArgumentError("only", f"only {unknown[0]!r} is unknown; choose from {', '.join(SECTIONS)}")
        if not self.demo and not self.data_path:
            raise ArgumentError("data_path", "data_path is needed: the ImageNet folder that holds train/ and val/")
        for name in ("quick", "only", "guidance") if self.train else ():
            if getattr(self, name):
                raise ArgumentError(name, f"{name} does not go with train, which runs a training only")
        if self.guidance and not set(MODELS_PUBLISHED) & set(self.sections):
            raise ArgumentError("guidance", f"guidance goes with large and huge, only {self.only} has neither")
        for name, reason in (("quick", "which is quicker"), ("data_path", "which has its own images")):
            if self.demo and getattr(self, name):
                raise ArgumentError(name, f"{name} does not go with demo, {reason}")

    @property
    def sections(self) -> tuple[str, ...]:
        """The parts that were chosen."""
        return tuple(name.strip() for name in self.only.split(",")) if self.only else SECTIONS

    @property
    def processes(self) -> int:
        """Of each command."""
        return self.gpus or (2 if self.demo else 8)

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.output_dir)

    @property
    def comparable(self) -> bool:
        """Whether the figures stand beside the published ones."""
        return not (self.quick or self.demo)

    @cached_property
    def root(self) -> Path:
        """With demo: the folder with digits/, vae/ and model/."""
        parts = (Path(self.demo_dir) / part for part in ("digits/train", "vae/vae.pth", f"model/{LAST}"))
        begun = (self.out / "stages" / "toy.json").exists()  # a run goes on with what it began with
        return self.out / "toy" if begun or not all(part.exists() for part in parts) else Path(self.demo_dir)
