"""Presets, configs/NAME.yaml: the flags of a run by name, the settings it is compared with, and the numbers to
expect.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from util import dist
from util.log import get_logger

logger = get_logger()

FOLDER = Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Preset:
    """The content of configs/NAME.yaml.

    flags: what `--preset NAME` sets; flags_on_cpu replace some of them on a CPU. global_batch: images per optimizer
    step, which --accum_iter keeps on fewer processes. published: further settings of the run to compare with;
    neutral: those that change its random numbers or its speed only. expected: figures by name, from `source`
    ("published" or "measured here").
    """

    name: str
    flags: dict[str, object]
    flags_on_cpu: dict[str, object] = field(default_factory=dict)
    global_batch: int | None = None
    published: dict[str, object] = field(default_factory=dict)
    neutral: dict[str, object] = field(default_factory=dict)
    source: str = ""
    expected: dict[str, float | str] = field(default_factory=dict)

    @property
    def evaluates(self) -> bool:
        """Whether the preset is an evaluation, and no training."""
        return bool(self.flags.get("evaluate"))

    @property
    def decisive(self) -> dict[str, object]:
        """Every setting of the run to compare with that decides its result."""
        left_out = {*self.neutral, "evaluate", "resume"}
        return {name: value for name, value in (self.flags | self.published).items() if name not in left_out}


def preset_names() -> list[str]:
    """The names for --preset: the files of configs/, trainings before evaluations."""
    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (name.endswith("_eval"), name))


def load_preset(name: str) -> Preset:
    """The preset of configs/NAME.yaml. ValueError if there is none, or if the file has unknown or missing keys."""
    path = FOLDER / f"{name}.yaml"
    if name not in preset_names():
        raise ValueError(f"preset {name!r} is unknown; choose from {', '.join(preset_names())}")
    try:
        content = yaml.safe_load(path.read_text())
        return Preset(name, **content)
    except (yaml.YAMLError, TypeError) as error:
        known = ", ".join(field.name for field in fields(Preset) if field.name != "name")
        raise ValueError(f"{path} is no preset, whose keys are {known}: {error}") from error


def flag_text(name: str, value: object) -> str:
    """A flag as one would type it."""
    if value is True:
        return f"--{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def command_line(values: Mapping[str, object]) -> str:
    """The flags as one would type them; a switch that is off is left out."""
    return " ".join(flag_text(name, value) for name, value in values.items() if value is not False)


def differences(settings: Mapping[str, object], published: Mapping[str, object]) -> list[str]:
    """ "name value instead of value" for each published setting that `settings` has with another value."""
    return [
        f"{name} {settings[name]} instead of {value}"
        for name, value in published.items()
        if name in settings and settings[name] != value
    ]


def apply_preset(args: argparse.Namespace, given: set[str], preset: Preset, processes: int) -> None:
    """Set the preset's flags that are not on the command line, and count them as given; log all of them.

    On a CPU the preset's `flags_on_cpu` hold. --accum_iter is set so that the global batch is the preset's, unless
    batch or accumulation were given.
    """
    chosen = dict(preset.flags)
    if preset.flags_on_cpu.keys() - given and dist.pick_device(args.device).type == "cpu":
        chosen |= preset.flags_on_cpu
        usual = {name: preset.flags[name] for name in preset.flags_on_cpu}
        logger.info(
            "--preset %s on a CPU: %s; on a GPU %s, as published",
            preset.name,
            command_line(preset.flags_on_cpu),
            command_line(usual),
        )
    if preset.global_batch and not {"batch_size", "accum_iter"} & given:
        accumulated, rest = divmod(preset.global_batch, chosen["batch_size"] * processes)
        if not rest:
            chosen["accum_iter"] = accumulated
    changed = {
        name: value
        for name, value in preset.flags.items()
        if name in given and getattr(args, name) not in (value, [value])
    }
    for name in chosen.keys() - given:
        setattr(args, name, chosen[name])
    given.update(chosen)
    logger.info("--preset %s: %s", preset.name, command_line({name: getattr(args, name) for name in chosen}))
    _log_comparability(args, preset, changed, processes)


def _log_comparability(args: argparse.Namespace, preset: Preset, changed: dict[str, object], processes: int) -> None:
    """Log the preset's flags that were changed, another global batch, and the figures to expect."""
    if changed:
        text = ", ".join(f"--{name} (preset {value})" for name, value in changed.items())
        logger.info("given on the command line instead of the preset's: %s", text)
    if preset.global_batch and args.batch_size * args.accum_iter * processes != preset.global_batch:
        logger.warning(
            "the global batch is %d, the preset's %d (%d processes x --batch_size %d x --accum_iter %d); "
            "the learning rate follows it",
            args.batch_size * args.accum_iter * processes,
            preset.global_batch,
            processes,
            args.batch_size,
            args.accum_iter,
        )
    if preset.expected:
        figures = (
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in preset.expected.items()
        )
        note = "; with other settings than the preset's the figures are not comparable" if changed else ""
        logger.info("expected (%s): %s%s", preset.source, ", ".join(figures), note)
