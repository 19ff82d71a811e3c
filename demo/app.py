"""A web page to try a trained model: choose a class, watch the tokens unmask, regenerate a part of a picture.

  python -m demo.app --resume demo/out/model        # the digits of `make demo`

The page is served to this machine only, unless --host says otherwise.
"""

import argparse
import sys
from collections.abc import Sequence

import generation
from checkpoints import hub
from checkpoints.content import class_names
from checkpoints.published import WEIGHTS
from demo.server import LOCAL, Server
from demo.studio import Studio
from util import dist
from util.checkpoint import find_file, read_file
from util.cli import make_parser, run_cli
from util.json_reader import read_json
from util.log import get_logger

logger = get_logger()


def read_names(path: str) -> list[str]:
    """Class names from JSON; ValueError naming the file."""
    try:
        content = read_json(path, (dict, list))
        if isinstance(content, dict):
            content = [content[str(i)] for i in range(len(content))]
        return [str(name[-1] if isinstance(name, list) else name) for name in content]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} (--names) holds no class names: {error!r}") from error


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--resume", default="demo/out/model", help="checkpoint file, folder, or hf://OWNER/REPOSITORY/PATH")
    add("--vae_path", default="", help="its VAE; by default the one that it was trained with")
    add("--weights", default="ema", choices=WEIGHTS)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--names", default="", help="JSON file with a list of class names, or an object from number to name")
    add("--host", default="127.0.0.1", help="address or name to serve at; 0.0.0.0 lets the whole network in")
    add("--port", type=int, default=7860, help="0 takes a free one")
    return parser


def serve(server: Server) -> None:
    """Answer requests until interrupted."""
    print(f"open {server.url} in a browser; Ctrl-C ends it", flush=True)
    server.serve_forever()


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and serve the page until interrupted. ValueError or OSError for bad input."""
    args = build_parser().parse_args(argv)
    names = read_names(args.names) if args.names else []
    with Server(args.host, args.port) as server:
        device, path = dist.pick_device(args.device), find_file(hub.local_path(args.resume, "--resume"))
        vae_path = hub.local_path(args.vae_path, "--vae_path") or None
        pipeline = generation.load(path, vae_path, weights=args.weights, device=device)
        server.studio = Studio(
            pipeline, names or class_names(read_file(path, mmap=True)), f"TokenBridge: {args.resume}"
        )
        if args.host not in LOCAL:
            logger.warning("--host %s: other machines can reach the page, and there is no password", args.host)
        serve(server)


if __name__ == "__main__":
    sys.exit(run_cli(main))
