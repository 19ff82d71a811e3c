"""A page in the browser to play with a trained model: pick a class, watch the tokens unmask, draw a mask and have that part drawn anew.

  python -m demo.app --resume demo/out/model        # the digits of `make demo`; needs gradio: make extras

The page is served to this machine only, unless --host says otherwise.
"""

import argparse
import json
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from checkpoints import download
from checkpoints.weights import CHOICES, find_file, read_file
from dataset.images import center_crop_adm
from generation.library import GenerationStep, decode, generate_steps
from generation.loading import load
from models.sampling.orders import ORDERS
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util import dist
from util.cli import make_parser
from util.log import get_logger, run_cli

if TYPE_CHECKING:
    import gradio as gr

logger = get_logger()

NO_CLASS = "no class"
SHOWN = 256  # pixels, at least, that a picture has on the page
MOST = 16  # pictures at a time


def need_gradio() -> "gr":
    """The gradio package; ValueError that says how to get it."""
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            f"the web demo needs gradio, an optional extra ({error}): make extras, or pip install -r requirements-extra.txt"
        ) from error
    return gradio


# ------------------------------------------------------------------------------------------------------------- pictures


def enlarge(image: Image.Image) -> Image.Image:
    """A whole multiple of a small picture, without smoothing, at least SHOWN pixels wide."""
    factor = max(1, -(-SHOWN // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """One picture: the images in rows, a square of them if that goes."""
    columns, (width, height) = -(-len(images) // max(1, int(len(images) ** 0.5))), images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return enlarge(sheet)


def read_drawing(value: dict, size: int) -> tuple[Image.Image, Image.Image]:
    """The editor's picture and what was painted on it -> (image, mask), both size x size; white in the mask is to be drawn anew.

    ValueError if there is no picture, or nothing was painted.
    """
    if not value or value.get("background") is None:
        raise ValueError("there is no picture to edit: upload one, or take the last result")
    background = Image.fromarray(np.asarray(value["background"])).convert("RGB")
    painted = np.zeros((background.height, background.width), bool)
    for layer in value.get("layers") or []:
        painted |= np.asarray(layer)[..., 3] > 0
    if not painted.any():
        raise ValueError("nothing was painted: paint over the part that is to be drawn anew")
    image, mask = (
        center_crop_adm(background, size),
        center_crop_adm(Image.fromarray(painted.astype(np.uint8) * 255).convert("RGB"), size),
    )
    if not (np.asarray(mask) > 127).any():
        raise ValueError("the painted part is too small, or lies outside the middle square that the model sees")
    return image, mask


# ------------------------------------------------------------------------------------------------------------- the model behind the page


class Studio:
    """A model, its VAE and the names of its classes; the functions that the page's buttons call."""

    def __init__(self, model: TokenBridge, vae: AutoencoderKL, names: Sequence[str] | None = None):
        self.model, self.vae, self.size = model, vae, model.config.img_size
        names = list(names or [])[: model.class_num]
        self.names = names + [str(i) for i in range(len(names), model.class_num)]

    def class_number(self, name: str) -> int | None:
        """None for no class; ValueError for a name that is none of the model's."""
        if name == NO_CLASS:
            return None
        if name not in self.names:
            raise ValueError(f"class {name!r} is none of the model's {len(self.names)}")
        return self.names.index(name)

    def generate(
        self,
        name: str,
        seed: int,
        cfg: float,
        temperature: float,
        num_iter: int,
        count: int = 1,
        order: str = "random",
        watch: bool = True,
        drawing: dict | None = None,
    ) -> Iterator[tuple[Image.Image, str]]:
        """(picture, line below it) after each step that is shown, then of the result. With a drawing its painted part is drawn anew.

        The pictures so far cost a decoding each: they are shown for half of the time at most. ValueError for what does not fit.
        """
        if not 1 <= int(count) <= MOST:
            raise ValueError(f"1 to {MOST} pictures at a time, not {count}")
        edit = {} if drawing is None else dict(zip(("init", "mask"), read_drawing(drawing, self.size), strict=True))
        started, spent = time.perf_counter(), 0.0
        steps = generate_steps(
            self.model,
            self.vae,
            [self.class_number(name)] * int(count),
            seed=int(seed),
            num_iter=int(num_iter),
            cfg=float(cfg),
            temperature=float(temperature),
            order=order,
            **edit,
        )
        for step in steps:
            now = time.perf_counter()
            if watch and not step.done and spent <= (now - started) / 2:
                yield side_by_side(step.images()), progress_line(step)
                spent += time.perf_counter() - now
        with torch.no_grad():
            pixels = decode(self.vae, step.state.latents, range(int(count))).permute(0, 2, 3, 1).cpu().numpy()
        yield (
            side_by_side([Image.fromarray(p) for p in pixels]),
            f"done: class {name}, seed {int(seed)}, {time.perf_counter() - started:.1f} s",
        )


def progress_line(step: GenerationStep) -> str:
    """What is said below a picture that is not finished."""
    known = step.state.orders.shape[1] - step.state.num_masked
    return f"step {step.step + 1} of {step.num_iter}: {known} of {step.state.orders.shape[1]} tokens are known"


# ------------------------------------------------------------------------------------------------------------- the page


def build_page(studio: Studio, title: str) -> "gr.Blocks":
    """The page; every button calls `Studio.generate`."""
    gr = need_gradio()

    def shown(*values: object) -> Iterator[tuple[Image.Image, str]]:
        try:
            yield from studio.generate(*values)
        except ValueError as error:
            raise gr.Error(str(error), duration=8) from error

    def inpaint(drawing: dict, *values: object) -> Iterator[tuple[Image.Image, str]]:
        yield from shown(*values, 1, "random", True, drawing)

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(
            f"## {title}\n{studio.size} x {studio.size} pixels, {len(studio.names)} classes, {studio.model.num_tokens} tokens of "
            f"{studio.model.token_dim} dimensions. Grey tokens are not known yet."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                name = gr.Dropdown([*studio.names, NO_CLASS], value=studio.names[0], label="class", elem_id="class")
                seed = gr.Number(0, label="seed", precision=0, minimum=0, elem_id="seed")
                cfg = gr.Slider(1, 8, 2, step=0.1, label="guidance", elem_id="cfg")
                temperature = gr.Slider(0, 1.5, 0.9, step=0.01, label="temperature", elem_id="temperature")
                most = max(64, studio.model.num_tokens)
                num_iter = gr.Slider(
                    1, most, min(16, studio.model.num_tokens), step=1, label="iterations", elem_id="iterations"
                )
            with gr.Column(scale=2), gr.Tabs():
                with gr.Tab("generate"):
                    with gr.Row():
                        count = gr.Slider(1, MOST, 4, step=1, label="pictures", elem_id="count")
                        order = gr.Dropdown(list(ORDERS), value="random", label="order of the tokens", elem_id="order")
                        watch = gr.Checkbox(True, label="watch tokens unmask", elem_id="watch")
                    with gr.Row():
                        go, stop = (
                            gr.Button("Generate", variant="primary", elem_id="go"),
                            gr.Button("Stop", elem_id="stop"),
                        )
                    result = gr.Image(
                        label="pictures",
                        format="png",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id="result",
                    )
                    line = gr.Textbox(
                        show_label=False,
                        interactive=False,
                        elem_id="line",
                        placeholder="Generate draws pictures of the class",
                    )
                with gr.Tab("edit", elem_id="edit"):
                    take = gr.Button("Take the last result", elem_id="take")
                    editor = gr.ImageEditor(
                        label="paint over what is to be drawn anew",
                        type="numpy",
                        sources=("upload",),
                        transforms=(),
                        brush=gr.Brush(default_size=24, colors=["#ff4081"], color_mode="fixed"),
                        layers=False,
                        format="png",
                        canvas_size=(SHOWN * 2, SHOWN * 2),
                        elem_id="editor",
                    )
                    draw = gr.Button("Draw the painted part anew", variant="primary", elem_id="draw")
                    edited = gr.Image(
                        label="result",
                        format="png",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        elem_id="edited",
                    )
                    edit_line = gr.Textbox(show_label=False, interactive=False, elem_id="edit-line")
        settings = [name, seed, cfg, temperature, num_iter]
        running = go.click(shown, [*settings, count, order, watch], [result, line])
        stop.click(None, cancels=[running])
        take.click(first_of, [result, count], editor)
        draw.click(inpaint, [editor, *settings], [edited, edit_line])
    return page


def first_of(sheet: np.ndarray | None, count: int) -> np.ndarray | None:
    """The first picture of a sheet of `count` (see `side_by_side`)."""
    if sheet is None:
        return None
    columns = -(-int(count) // max(1, int(count**0.5)))
    side = sheet.shape[1] // columns
    return np.asarray(enlarge(Image.fromarray(sheet[:side, :side])))


def class_names(path: Path) -> list[str]:
    """The class folders' names that training noted in the checkpoint; none in a published one."""
    config = read_file(path, mmap=True).get("config") or {}
    return [str(name) for name in config.get("classes") or []]


def check_port(host: str, port: int) -> None:
    """ValueError if the page could not be served there; before the model is loaded."""
    try:
        with socket.socket() as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot serve at {host}:{port} (--host, --port): {error}") from error


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--resume", default="demo/out/model", help="checkpoint file, folder, or hf://OWNER/REPOSITORY/PATH"
    )
    parser.add_argument("--vae_path", default="", help="its VAE; by default the one that it was trained with")
    parser.add_argument("--weights", default="ema", choices=CHOICES)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--names", default="", help="JSON file with a list of class names, or an object from number to name"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets every machine of the network in"
    )
    parser.add_argument("--port", type=int, default=7860)
    return parser


def read_names(path: str) -> list[str]:
    """Class names from JSON; ValueError naming the file."""
    try:
        content = json.loads(Path(path).read_text())
        if isinstance(content, dict):
            content = [content[str(i)] for i in range(len(content))]
        return [str(name[-1] if isinstance(name, list) else name) for name in content]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} (--names) holds no class names: {error!r}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and serve the page until interrupted. ValueError or OSError for bad input."""
    args = build_parser().parse_args(argv)
    gr = need_gradio()
    names = read_names(args.names) if args.names else None
    check_port(args.host, args.port)
    device = dist.pick_device(args.device)
    path = find_file(download.local_path(args.resume, "--resume"))
    model, vae = load(
        path, download.local_path(args.vae_path, "--vae_path") or None, weights=args.weights, device=device
    )
    page = build_page(Studio(model, vae, names or class_names(path)), f"TokenBridge: {args.resume}")
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("--host %s: other machines can reach the page, and there is no password", args.host)
    page.queue(default_concurrency_limit=1).launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Base(font=["system-ui"], font_mono=["monospace"]),
        prevent_thread_lock=True,
    )
    print(f"open http://{args.host}:{args.port} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    sys.exit(run_cli(main))
