"""The demo: the whole pipeline on real images, on a CPU. `make demo` runs it; --toy: at toy size.

  python -m demo.run             scikit-learn's handwritten digits
  python -m demo.run photos      64x64 crops of colour photographs (make demo-photos)

Each stage is a command that a user would type, printed before it runs. Rerunning skips finished stages, as long as
their commands and the stages before them stay the same, and resumes the interrupted one. It ends with a table of stage,
time and result.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from dataset.images import atomic_write, read_image
from demo.definition import TORCHRUN, Classifier, Demo, list_images
from demo.digits import DIGITS
from demo.photos import PHOTOS
from tools.plot import read_columns, smooth
from util.cli import check_writable, make_parser, parse, run_cli
from util.files import record_own, refuse_others, replacing
from util.locks import folder_lock
from util.presets import command_line, load_preset
from util.stages import Stage, StageRunner

DEMOS = {demo.name: demo for demo in (DIGITS, PHOTOS)}
TOY = dict(vae_steps=4, steps=6, samples=10, reconstructed=20, num_iter=2)  # shows only that the stages fit together

ON_CPU = " --num_workers 0 --device cpu"
TRAINING = "main_tokenbridge.py --preset {name} --use_cached" + ON_CPU
# Name -> command, with {out}, a demo's fields and its sizes filled in.
COMMANDS = {
    "images": "",  # done in this process
    "train VAE": "{vae_launcher} main_vae.py --data_path {out}/{name} --img_size {img_size} --no_flip {vae}"
    " --max_steps {vae_steps} --save_freq 200 --log_freq 50 --output_dir {out}/vae --resume {out}/vae" + ON_CPU,
    "reconstruct": "python reconstruction.py --vae_path {out}/vae/vae.pth --image_dir {out}/{name}/val"
    " --img_size {img_size} {quantizers} --images_per_class all --num_images {reconstructed} --no_rfid --save_images"
    " --grid_images 10 --output_dir {out}/reconstruction" + ON_CPU,
    "cache": "python main_cache.py --vae_path {out}/vae/vae.pth --data_path {out}/{name} --img_size {img_size}"
    " --no_flip --cached_path {out}/cache" + ON_CPU,
    "train TokenBridge": TORCHRUN + " " + TRAINING + " --max_steps {steps}"
    " --vae_path {out}/vae/vae.pth --cached_path {out}/cache --output_dir {out}/model --resume {out}/model",
    "sample": "python main_tokenbridge.py --sample --resume {out}/model --vae_path {out}/vae/vae.pth --classes all"
    " --seed 0 --num_images {samples} {sampling} --output_dir {out}/samples" + ON_CPU,
}


def draw_loss(log: dict, title: str, path: Path) -> None:
    """The picture of the loss: cross-entropy per dimension over steps, raw and smoothed, and the chance level."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, width = figure.subplots(), max(1, len(log["loss"]) // 50)
    axes.plot(log["step"], log["loss"], color="lightsteelblue", linewidth=0.7, label="each step")
    axes.plot(log["step"], smooth(log["loss"], width), color="navy", label=f"mean of {width}")
    axes.axhline(math.log(64), color="gray", linestyle=":", label="chance level, ln 64")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per dimension (nats)", title=title)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=100, format="png")


class Results:
    """The stages' lines in the table, from the files that they wrote; pictures are copied to the folder `pictures`."""

    def __init__(self, demo: Demo, out: Path, pictures: Path):
        self.demo, self.out, self.data, self.pictures = demo, out, out / demo.name, pictures

    def picture(self, kind: str) -> Path:
        """Where the demo's picture of this kind goes, such as samples.png."""
        return self.pictures / next(name for name in self.demo.pictures if name.endswith(kind))

    def show(self, source: Path, kind: str) -> None:
        """Copy a picture with a palette of 256 colours, a third of the size; the original stays."""
        atomic_write(read_image(source).quantize(256), self.picture(kind))

    @cached_property
    def classifier(self) -> Classifier:
        """Fitted on the real training images."""
        return self.demo.fit_classifier(self.data / "train")

    def images(self) -> str:
        """Numbers of real images, and how well the classifier knows them."""
        train, val = (len(list_images(self.data / part)[0]) for part in ("train", "val"))
        accuracy, distance = self.classifier.score(*list_images(self.data / "val"))
        text = f"{train} + {val} real images; class accuracy of the held-out ones (SVM): {accuracy:.1%}"
        return f"{text}, Fréchet distance {distance:.2f}"

    def train_vae(self) -> str:
        """Held-out PSNR."""
        return f"held-out PSNR {torch.load(self.out / 'vae' / 'vae.pth', weights_only=True)['psnr']:.2f} dB"

    def reconstruct(self) -> str:
        """PSNR without and with the quantizer, and class accuracy."""
        folder = self.out / "reconstruction"
        self.show(folder / "grid.png", "reconstruction.png")
        if len(self.demo.pictures) > 3:  # several bits and ranges
            self.show(folder / "rate_distortion.png", "rate_distortion.png")
        vae, quantized = (row["psnr"] for row in json.loads((folder / "results.json").read_text())["rows"][:2])
        accuracy, _ = self.classifier.score(*list_images(folder / "images"))
        text = f"PSNR {vae:.2f} dB (VAE), {quantized:.2f} dB (6 bits)"
        return f"{text}; class accuracy of reconstructions (SVM): {accuracy:.1%}"

    def cache(self) -> str:
        """Number of cached latents."""
        return f"{json.loads((self.out / 'cache' / 'cache.json').read_text())['images']} latents"

    def train_tokenbridge(self) -> str:
        """Loss at the beginning and at the end."""
        log = read_columns(self.out / "model")
        draw_loss(log, f"TokenBridge on {self.demo.name}", self.picture("loss.png"))
        last = log["loss"][-100:]
        return f"loss {log['loss'][0]:.2f} at the first step, {last.mean():.3f} over the last {len(last)}"

    def sample(self) -> str:
        """Class accuracy and Fréchet distance of the generated images."""
        folder = self.out / "samples"
        self.show(folder / "grid.png", "samples.png")
        labels = json.loads((folder / "samples.json").read_text())["labels"]
        accuracy, distance = self.classifier.score([folder / f"{i:06d}.png" for i in range(len(labels))], labels)
        text = f"class accuracy of {len(labels)} generated images (SVM): {accuracy:.1%}"
        return f"{text}, Fréchet distance {distance:.2f}"


@dataclass(frozen=True, kw_only=True)
class DemoStage(Stage):
    """expected: its result on a healthy run."""

    expected: str


def build_stages(demo: Demo, out: Path, pictures: Path, sizes: Mapping[str, int]) -> list[DemoStage]:
    """The pipeline; sizes: the demo's or TOY."""
    results, figures, more = Results(demo, out, pictures), load_preset(demo.name).expected, demo.sampling | sizes
    values = vars(demo) | sizes | dict(out=out, sampling=command_line({name: more[name] for name in demo.sampling}))
    loss = f"{figures['loss of the first step']}, then {figures['mean loss of the last 100 steps']}"
    accuracy = figures["class accuracy of 100 generated images (SVM)"]
    expected = demo.expected | {"train TokenBridge": loss, "sample": accuracy}
    folders = (demo.name, "vae", "reconstruction", "cache", "model", "samples")
    stages: list[DemoStage] = []
    for (name, text), folder in zip(COMMANDS.items(), folders, strict=True):
        about = dict(name=name, folder=out / folder, expected=expected[name], needs=[s.name for s in stages[-1:]])
        command = [part for word in text.split() for part in fill(word, values)]
        work = (lambda: None) if command else partial(demo.write_images, out / demo.name)
        result = getattr(results, name.lower().replace(" ", "_"))
        stages.append(DemoStage(**about, command=command, work=work, result=result))
    return stages


def run_stages(runner: StageRunner) -> list[dict]:
    """The stages' records; ValueError if one failed."""
    rows = runner.run()
    for row in rows:
        if "error" in row:
            raise ValueError(f"{row['name']} failed: {row['error']}; rerun to continue from here")
    return rows


def fill(word: str, values: Mapping[str, object]) -> list[str]:
    """A word of COMMANDS with its values: one word, or the several flags that {vae} and the like stand for."""
    filled = word.format(**values)
    return filled.split() if word in ("{vae_launcher}", "{vae}", "{quantizers}", "{sampling}") else [filled]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages, print the table. ValueError if a stage fails."""
    parser = make_parser(__doc__)
    parser.add_argument("demo", nargs="?", default="digits", choices=DEMOS, help="what it learns")
    where = "where data, checkpoints and records of stages go; those of photos in its folder photos"
    parser.add_argument("--output_dir", default="demo/out", help=where)
    parser.add_argument("--pictures", default="demo", help="where the pictures go")
    parser.add_argument(
        "--toy", action="store_true", help="a few steps of everything: shows that the stages fit, learns nothing"
    )
    args, _ = parse(parser, argv)
    demo = DEMOS[args.demo]
    out = check_writable(Path(args.output_dir) / demo.folder, "--output_dir").resolve()
    pictures = check_writable(args.pictures, "--pictures")
    stages, own = build_stages(demo, out, pictures, TOY if args.toy else demo.sizes), out / ".pictures.json"
    paths = [pictures / name for name in demo.pictures]
    with folder_lock(out, "--output_dir"):
        runner = StageRunner(stages, out)
        refuse_others(paths, own, "--pictures")
        try:
            rows = run_stages(runner)
        finally:
            record_own(paths, own)
    print_table(stages, rows, args.toy)
    print("pictures: " + ", ".join(map(str, paths)))


def print_table(stages: Sequence[DemoStage], rows: Sequence[Mapping], toy: bool) -> None:
    """Stage, time, result, and what to expect unless it is toy size."""
    print(f"\n{'stage':<18}{'time':>7}   result")
    for stage, row in zip(stages, rows, strict=True):
        expected = "" if toy else f"   [expected: {stage.expected}]"
        print(f"{stage.name:<18}{row['seconds']:>5.0f} s   {row['result']}{expected}")
    new = [row["seconds"] for row in rows if not row["skipped"]]
    total = f"{'total':<18}{sum(row['seconds'] for row in rows):>5.0f} s   {len(rows)} stages"
    print(total + (f", {len(new)} of them in this run ({sum(new):.0f} s)" if len(new) < len(rows) else ""))


if __name__ == "__main__":
    sys.exit(run_cli(main))
