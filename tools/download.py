"""Fetch what is published: weights from the Hugging Face hub, ADM's ImageNet statistics and its reference batch.

  python -m tools.download vae|large|huge|stats|adm_batch|all [--dry_run]

Files go where the published commands look for them, pretrained_models/... and fid_stats/. A file that cannot be fetched
does not stop the rest: it is reported at the end, with exit status 2. Downloads resume; size and hash are checked; a
file appears under its name only when it is complete. HF_HOME, HF_ENDPOINT and HF_TOKEN mean what they mean to
huggingface_hub.

stats are ADM's mu and sigma, for FID. adm_batch is ADM's reference batch (2 GB): the same kind of statistics, those of
sFID, and 10,000 images, which precision and recall need.
"""

import sys
from collections.abc import Sequence

from checkpoints import download
from checkpoints.download import ADDRESSES, PUBLISHED, DownloadOptions
from evaluation.reference import check_published
from util.cli import make_parser, run_cli
from util.options import add_options, flag_names, read_options


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and fetch. ValueError or OSError, with what to do, for what cannot be had."""
    parser = make_parser(__doc__)
    parser.add_argument("what", nargs="+", choices=[*PUBLISHED, "all"], help="what to fetch")
    add_options(parser, DownloadOptions, **{f"{name}_url": PUBLISHED[name].url for name in ADDRESSES})
    args = parser.parse_args(argv)
    names = [*PUBLISHED] if "all" in args.what else list(dict.fromkeys(args.what))
    with flag_names(parser):
        options = read_options(DownloadOptions, args)
        options.check_names(names)
    download.fetch_all(names, options, check_published)


if __name__ == "__main__":
    sys.exit(run_cli(main))
