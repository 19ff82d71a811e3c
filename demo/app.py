"""A web page to try a trained model: choose a class, watch the tokens unmask, paint a mask and inpaint it.

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
from PIL import Image

import generation
from checkpoints import download
from checkpoints.published import WEIGHTS
from dataset.images import center_crop_adm, to_rgb
from generation import Pipeline
from generation.pipeline import GenerationStep
from models.sampling.orders import ORDERS
from util import dist
from util.checkpoint import find_file, read_file
from util.cli import make_parser, run_cli
from util.log import get_logger

if TYPE_CHECKING:
    import gradio as gr

logger = get_logger()

NO_CLASS = "no class"
SHOWN_PIXELS = 256  # smallest side of an image on the page
MAX_IMAGES = 16
Shown = Iterator[tuple[Image.Image, str]]  # image, line of text below it


def need_gradio() -> "gr":
    """The gradio package; ValueError that says how to get it."""
    try:
        import gradio
    except ImportError as error:
        hint = "make extras, or pip install -r requirements-extra.txt"
        raise ValueError(f"the web demo needs gradio, an optional extra ({error}): {hint}") from error
    return gradio


def enlarge(image: Image.Image) -> Image.Image:
    """A whole multiple of a small image, without smoothing, at least SHOWN_PIXELS wide."""
    factor = max(1, -(-SHOWN_PIXELS // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def sheet_columns(count: int) -> int:
    """Columns of a sheet of `count` images: as square as possible."""
    return -(-count // max(1, int(count**0.5)))


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """A sheet of the images, enlarged."""
    columns, (width, height) = sheet_columns(len(images)), images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return enlarge(sheet)


def first_of(sheet: np.ndarray | None, count: int) -> np.ndarray | None:
    """The first image of a sheet of `count`."""
    if sheet is None:
        return None
    side = sheet.shape[1] // sheet_columns(int(count))
    return np.asarray(enlarge(Image.fromarray(sheet[:side, :side])))


def read_drawing(value: dict, size: int) -> tuple[Image.Image, Image.Image]:
    """The editor's image and what was painted on it -> (image, mask), both size x size; white = regenerate.

    ValueError if there is no image, or nothing was painted.
    """
    if not value or value.get("background") is None:
        raise ValueError("there is no picture to edit: upload one, or take the last result")
    background = to_rgb(Image.fromarray(np.asarray(value["background"])))
    painted = np.zeros((background.height, background.width), bool)
    for layer in value.get("layers") or []:
        painted |= np.asarray(layer)[..., 3] > 0
    if not painted.any():
        raise ValueError("nothing was painted: paint over the part that is to be regenerated")
    mask = center_crop_adm(Image.fromarray(painted.astype(np.uint8) * 255).convert("RGB"), size)
    if not (np.asarray(mask) > 127).any():
        raise ValueError("the painted part is too small, or lies outside the middle square that the model sees")
    return center_crop_adm(background, size), mask


class Studio:
    """A pipeline and the names of its classes; the page's buttons call `generate`."""

    def __init__(self, pipeline: Pipeline, names: Sequence[str] = ()):
        self.pipeline, class_num = pipeline, pipeline.model.class_num
        self.names = [*names[:class_num], *map(str, range(len(names), class_num))]

    def class_number(self, name: str) -> int | None:
        """None for no class; ValueError for an unknown name."""
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
    ) -> Shown:
        """(image, line below it) of steps, then of the result. With a drawing, its painted part is regenerated.

        Images of steps cost a decoding each: they take half of the time at most. ValueError for what does not fit.
        """
        if not 1 <= int(count) <= MAX_IMAGES:
            raise ValueError(f"1 to {MAX_IMAGES} pictures at a time, not {count}")
        init, mask = (None, None) if drawing is None else read_drawing(drawing, self.pipeline.image_size)
        classes = [self.class_number(name)] * int(count)
        options = dict(seed=int(seed), num_iter=int(num_iter), cfg=float(cfg), temperature=float(temperature))
        started, decoding = time.perf_counter(), 0.0
        for step in self.pipeline.generate_steps(classes, init=init, mask=mask, order=order, **options):
            now = time.perf_counter()
            if watch and not step.done and decoding <= (now - started) / 2:
                yield side_by_side(step.images()), progress_line(step)
                decoding += time.perf_counter() - now
        result = side_by_side(step.images())
        yield result, f"done: class {name}, seed {int(seed)}, {time.perf_counter() - started:.1f} s"


def progress_line(step: GenerationStep) -> str:
    """The line below an image that is not finished."""
    tokens = step.state.orders.shape[1]
    return f"step {step.step + 1} of {step.num_iter}: {tokens - step.state.num_masked} of {tokens} tokens are known"


def build_page(studio: Studio, title: str) -> "gr.Blocks":
    """The page; every button calls `Studio.generate`."""
    gr = need_gradio()
    model, size = studio.pipeline.model, studio.pipeline.image_size

    def shown(*values: object) -> Shown:
        try:
            yield from studio.generate(*values)
        except ValueError as error:
            raise gr.Error(str(error), duration=8) from error

    def inpaint(drawing: dict, *values: object) -> Shown:
        yield from shown(*values, 1, "random", True, drawing)

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(
            f"## {title}\n{size} x {size} pixels, {len(studio.names)} classes, {model.num_tokens} tokens of "
            f"{model.token_dim} dimensions. Grey tokens are still masked."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                settings = settings_column(gr, studio)
            with gr.Column(scale=2), gr.Tabs():
                with gr.Tab("generate"):
                    result, count = generate_tab(gr, settings, shown)
                with gr.Tab("edit", elem_id="edit"):
                    edit_tab(gr, settings, inpaint, result, count)
    return page


def settings_column(gr: "gr", studio: Studio) -> list:
    """What both tabs share: class, seed, guidance, temperature, iterations."""
    tokens = studio.pipeline.model.num_tokens
    return [
        gr.Dropdown([*studio.names, NO_CLASS], value=studio.names[0], label="class", elem_id="class"),
        gr.Number(0, label="seed", precision=0, minimum=0, elem_id="seed"),
        gr.Slider(1, 8, 2, step=0.1, label="guidance", elem_id="cfg"),
        gr.Slider(0, 1.5, 0.9, step=0.01, label="temperature", elem_id="temperature"),
        gr.Slider(1, max(64, tokens), min(16, tokens), step=1, label="iterations", elem_id="iterations"),
    ]


def result_image(gr: "gr", label: str, elem_id: str) -> "gr.Image":
    """An image to look at and download."""
    buttons = ["download", "fullscreen"]
    return gr.Image(label=label, format="png", interactive=False, buttons=buttons, elem_id=elem_id)


def generate_tab(gr: "gr", settings: list, generate: object) -> tuple:
    """The tab that generates; its result and the number of images in it."""
    with gr.Row():
        count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="pictures", elem_id="count")
        order = gr.Dropdown(list(ORDERS), value="random", label="order of the tokens", elem_id="order")
        watch = gr.Checkbox(True, label="watch tokens unmask", elem_id="watch")
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="go")
        stop = gr.Button("Stop", elem_id="stop")
    result = result_image(gr, "pictures", "result")
    hint = "Generate samples pictures of the class"
    line = gr.Textbox(show_label=False, interactive=False, elem_id="line", placeholder=hint)
    running = go.click(generate, [*settings, count, order, watch], [result, line])
    stop.click(None, cancels=[running])
    return result, count


def edit_tab(gr: "gr", settings: list, inpaint: object, result: "gr.Image", count: "gr.Slider") -> None:
    """The tab that regenerates what is painted over."""
    take = gr.Button("Take the last result", elem_id="take")
    brush, size = (
        gr.Brush(default_size=24, colors=["#ff4081"], color_mode="fixed"),
        (SHOWN_PIXELS * 2, SHOWN_PIXELS * 2),
    )
    options = dict(type="numpy", sources=("upload",), transforms=(), layers=False, format="png", elem_id="editor")
    editor = gr.ImageEditor(label="paint over what is to be regenerated", brush=brush, canvas_size=size, **options)
    draw = gr.Button("Regenerate the painted part", variant="primary", elem_id="draw")
    edited = result_image(gr, "result", "edited")
    line = gr.Textbox(show_label=False, interactive=False, elem_id="edit-line")
    take.click(first_of, [result, count], editor)
    draw.click(inpaint, [editor, *settings], [edited, line])


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
    """All flags."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--resume", default="demo/out/model", help="checkpoint file, folder, or hf://OWNER/REPOSITORY/PATH")
    add("--vae_path", default="", help="its VAE; by default the one that it was trained with")
    add("--weights", default="ema", choices=WEIGHTS)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--names", default="", help="JSON file with a list of class names, or an object from number to name")
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets every machine of the network in")
    add("--port", type=int, default=7860)
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
    names = read_names(args.names) if args.names else []
    check_port(args.host, args.port)
    device, path = dist.pick_device(args.device), find_file(download.local_path(args.resume, "--resume"))
    vae_path = download.local_path(args.vae_path, "--vae_path") or None
    pipeline = generation.load(path, vae_path, weights=args.weights, device=device)
    page = build_page(Studio(pipeline, names or class_names(path)), f"TokenBridge: {args.resume}")
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("--host %s: other machines can reach the page, and there is no password", args.host)
    theme = gr.themes.Base(font=["system-ui"], font_mono=["monospace"])
    options = dict(share=False, quiet=True, ssr_mode=False, footer_links=[], prevent_thread_lock=True)
    page.queue(default_concurrency_limit=1)
    page.launch(server_name=args.host, server_port=args.port, theme=theme, **options)
    print(f"open http://{args.host}:{args.port} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    sys.exit(run_cli(main))
