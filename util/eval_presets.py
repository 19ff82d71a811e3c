"""`--preset large_eval` and `huge_eval`: the published evaluations, with the numbers to expect, said at the start and compared at the end."""

import argparse
from collections.abc import Mapping

from util.log import get_logger

logger = get_logger()

_PUBLISHED = dict(evaluate=True, num_images=50000, num_iter=256, cfg_schedule="linear", quant_bits=6, eval_bsz=256, weights="ema")

EVAL_PRESETS: dict[str, dict[str, object]] = {
    "large_eval": dict(model="tokenbridge_large", resume="pretrained_models/tokenbridge/tokenbridge_large", cfg=3.1, temperature=0.96, **_PUBLISHED),
    "huge_eval": dict(model="tokenbridge_huge", resume="pretrained_models/tokenbridge/tokenbridge_huge", cfg=3.45, temperature=0.91, **_PUBLISHED),
}
# ImageNet 256 x 256, published (SPEC 9), and how far a healthy run may be off: two runs of 50,000 images differ by so much
EXPECTED: dict[str, dict[str, float]] = {"large_eval": {"fid": 1.76, "inception_score": 294.8, "precision": 0.80, "recall": 0.63},
                                         "huge_eval": {"fid": 1.55, "inception_score": 313.3, "precision": 0.80, "recall": 0.65}}
NAMES = {"fid": "FID", "inception_score": "Inception Score", "precision": "precision", "recall": "recall"}


def apply_eval_preset(args: argparse.Namespace, given: set[str]) -> None:
    """Set the flags of --preset that are not on the command line, and count them as given; say all of them, and what to expect."""
    wanted = EVAL_PRESETS[args.preset]
    for name in wanted.keys() - given:
        setattr(args, name, wanted[name])
    won = {name: getattr(args, name) for name in wanted.keys() & given if getattr(args, name) not in (wanted[name], [wanted[name]])}
    given.update(wanted)
    logger.info("--preset %s: %s", args.preset, " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in wanted.items()))
    if won:
        logger.info("given on the command line instead of the preset's: %s", ", ".join(f"--{name} (preset {wanted[name]})" for name in won))
    logger.info("expected (published): %s%s", ", ".join(f"{NAMES[key]} {value:g}" for key, value in EXPECTED[args.preset].items()),
                "; with other settings than the preset's the figures are not comparable" if won else "")


def comparison(preset: str, record: Mapping[str, object]) -> str:
    """A table of the published figures beside those of `record` (a line of eval.jsonl), and every setting in which the run differs."""
    lines = [f"{'--preset ' + preset:<22}{'published':>11}{'here':>11}{'difference':>12}"]
    for key, published in EXPECTED[preset].items():
        here = record.get(key)
        lines.append(f"{NAMES[key]:<22}{published:>11.4g}" + (f"{here:>11.4g}{here - published:>+12.4g}" if isinstance(here, (int, float)) else
                                                              f"{'-':>11}{'not computed':>14}"))
    differs = [f"{key} {record[key]} instead of {value}" for key, value in EVAL_PRESETS[preset].items()
               if key in record and key not in ("resume", "evaluate") and record[key] != value]
    lines.append(f"not comparable: {'; '.join(differs)}" if differs else "settings are the published ones")
    return "\n".join(lines)
