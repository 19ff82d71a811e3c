"""What the web page asks for: pictures of a class step by step, and an uploaded picture cropped for editing.

The page's numbers have their defaults and limits here; the page builds its form from `Studio.about`.
"""

import base64
import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count

import numpy as np
from PIL import Image

from dataset.classes import class_label
from dataset.images import center_crop_adm, decode
from generation import Pipeline
from generation.pipeline import GenerationStep
from models.sampling.orders import ORDERS

NO_CLASS = "no class"
NONE = "none"  # how requests and links say NO_CLASS; classes are numbers there
STRIP = 8  # pictures in the strip that shows the unmasking
MAX_PIXELS = 50_000_000  # of an uploaded picture
DATA_URL = "data:image/png;base64,"


def unique_names(names: Sequence[str]) -> list[str]:
    """Names that differ from each other and from NO_CLASS: those that occur several times get numbers, "cat (1)"."""
    counts, taken, result = Counter([*names, NO_CLASS]), {*names, NO_CLASS}, []
    for name in names:
        if counts[name] > 1:
            name = next(numbered for k in count(1) if (numbered := f"{name} ({k})") not in taken)
            taken.add(name)
        result.append(name)
    return result


@dataclass(frozen=True)
class Number:
    """A number of the page's form: its default, its limits and the step of its slider."""

    value: float
    lowest: float
    highest: float
    step: float

    def read(self, name: str, value: object) -> float:
        """The value as int or float. ValueError, which names the field, if it is empty or out of the limits."""
        whole = self.step == 1
        limits = f"a {'whole ' * whole}number from {self.lowest:,} to {self.highest:,}"
        if value is None or value == "":
            raise ValueError(f"{name} is empty: enter {limits}")
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and self.lowest <= value <= self.highest
        if not good or whole and value != int(value):
            raise ValueError(f"{name} must be {limits}, got {str(value)[:40]}")
        return int(value) if whole else float(value)


def data_url(image: Image.Image) -> str:
    """The image as the address of a PNG that needs no file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return DATA_URL + base64.b64encode(file.getvalue()).decode()


def read_picture(content: bytes) -> Image.Image:
    """The RGB picture in an uploaded file. ValueError that says what is wrong with it."""
    try:
        return decode(io.BytesIO(content), most_pixels=MAX_PIXELS)
    except Exception as error:  # each decoder has its own
        reason = "it is no picture" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise ValueError(f"the file cannot be read as a picture: {reason or type(error).__name__}") from error


def strip_steps(num_iter: int) -> set[int]:
    """The steps (0-based) that the strip shows: at most STRIP, the first and the last among them."""
    return {round(i) for i in np.linspace(0, num_iter - 1, STRIP)}


class Studio:
    """A pipeline, the names of its classes, and what the page can ask of it."""

    def __init__(self, pipeline: Pipeline, names: Sequence[str] = (), title: str = "TokenBridge"):
        self.pipeline, self.title, class_num = pipeline, title, pipeline.model.class_num
        self.names = unique_names([*names[:class_num], *map(str, range(len(names), class_num))])
        self.labels = [f"class {i}" if name == str(i) else name for i, name in enumerate(self.names)]
        tokens = pipeline.model.num_tokens
        self.numbers = {
            "seed": Number(0, 0, 2**53 - 1, 1),  # the largest integer that JavaScript has
            "guidance": Number(2, 1, 8, 0.1),
            "temperature": Number(0.9, 0, 1.5, 0.01),
            "steps": Number(min(16, tokens), 1, max(64, tokens), 1),
            "pictures": Number(4, 1, 16, 1),
        }

    def about(self) -> dict:
        """What the page needs to build its form, JSON-able."""
        model = self.pipeline.model
        sizes = {"size": self.pipeline.image_size, "grid": model.grid_size, "dimensions": model.token_dim}
        numbers = {name: asdict(number) for name, number in self.numbers.items()}
        classes = [*enumerate(self.labels), (NONE, NO_CLASS)]
        return {"title": self.title, **sizes, "classes": classes, "orders": list(ORDERS), "numbers": numbers}

    def crop(self, content: bytes) -> dict:
        """The middle square of an uploaded picture, at the model's size. ValueError if it is no picture."""
        return {"image": data_url(center_crop_adm(read_picture(content), self.pipeline.image_size))}

    def read_class(self, value: object) -> int | None:
        """A class number, None for no class; ValueError for anything else."""
        if value == NONE:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.names):
            raise ValueError(
                f"class must be a number from 0 to {len(self.names) - 1}, or {NONE}; got {str(value)[:40]}"
            )
        return value

    def read_edit(self, request: dict) -> dict:
        """init and mask for the pipeline; empty without "image" and "tokens". ValueError for what does not fit."""
        if "image" not in request and "tokens" not in request:
            return {}
        image, tokens = request.get("image"), request.get("tokens")
        if not isinstance(image, str) or not image.startswith(DATA_URL):
            raise ValueError("there is no picture to edit: choose Edit below a generated one, or upload one")
        grid = self.pipeline.model.grid_size
        mask = np.zeros(grid * grid, bool)
        if not isinstance(tokens, list) or not all(type(i) is int and 0 <= i < len(mask) for i in tokens):
            raise ValueError(f"tokens must be a list of numbers from 0 to {len(mask) - 1}")
        if not tokens:
            raise ValueError("nothing is chosen: paint over the part that is to be regenerated")
        mask[tokens] = True
        return {"init": read_picture(base64.b64decode(image[len(DATA_URL) :])), "mask": mask.reshape(grid, grid)}

    def generate(self, request: dict) -> Iterator[dict]:
        """One dict per sampling step, then the result. ValueError before the first step for what does not fit.

        With "image" (PNG as a data URL) and "tokens" (numbers of grid cells), those tokens alone are regenerated.
        The steps of the strip carry images; others do as long as decoding takes less than half of the time.
        """
        numbers = {name: number.read(name, request.get(name)) for name, number in self.numbers.items()}
        classes = [self.read_class(request.get("class"))] * numbers["pictures"]
        options = dict(cfg=numbers["guidance"], num_iter=numbers["steps"], order=request.get("order"))
        options |= dict(seed=numbers["seed"], temperature=numbers["temperature"], **self.read_edit(request))
        started, decoding, strip = time.perf_counter(), 0.0, strip_steps(numbers["steps"])
        for step in self.pipeline.generate_steps(classes, **options):
            event, now = progress(step), time.perf_counter()
            if request.get("watch") and not step.done and (step.step in strip or decoding <= (now - started) / 2):
                event |= {"images": [*map(data_url, step.images())], "strip": step.step in strip}
                decoding += time.perf_counter() - now
            yield event
        images = [*map(data_url, step.images())]
        number, seconds = classes[0], round(time.perf_counter() - started, 1)
        words = NO_CLASS if number is None else class_label(number, self.names)
        yield {"done": True, "images": images, "class": words, "seconds": seconds}


def progress(step: GenerationStep) -> dict:
    """How far sampling is."""
    tokens = step.state.orders.shape[1]
    return {"step": step.step + 1, "steps": step.num_iter, "known": tokens - step.state.num_masked, "tokens": tokens}
