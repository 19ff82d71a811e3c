"""The demo on colour photographs: 64x64 crops of eleven pictures inside scikit-image and scikit-learn.

Ten classes of one picture each; the motorcycle is a stereo pair. Validation crops lie in the last quarter of a
picture's rows (of some classes in the first), training crops in the other three, so they share no pixel. (The pair is
rectified: what one picture shows in a row, the other shows in the same row.) One picture per class measures how well
textures are learned, not how well a model generalises to other pictures.
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from dataset.images import atomic_write, read_image
from demo.definition import TORCHRUN, Demo

SIZE, HEIGHT = 64, 288  # pixels: side of a crop; height to which each picture is resized first
QUARTER = HEIGHT // 4  # rows that are held out, at the bottom or, of these classes, at the top
HELD_OUT_TOP = ("flower", "motorcycle", "rocket")
CROPS = {"train": 400, "val": 20}  # of each class
TRIES = 3  # random positions for each crop, of which the one with the most contrast is taken: less empty sky
# Class -> its pictures. All are in the packages' wheels: nothing is downloaded.
PICTURES = {
    "astronaut": ("skimage.data/astronaut.png",),
    "cat": ("skimage.data/chelsea.png",),
    "coffee": ("skimage.data/coffee.png",),
    "flower": ("sklearn.datasets.images/flower.jpg",),
    "galaxies": ("skimage.data/hubble_deep_field.jpg",),
    "motorcycle": ("skimage.data/motorcycle_left.png", "skimage.data/motorcycle_right.png"),
    "retina": ("skimage.data/retina.jpg",),
    "rocket": ("skimage.data/rocket.jpg",),
    "temple": ("sklearn.datasets.images/china.jpg",),
    "tissue": ("skimage.data/ihc.png",),
}


def read_picture(name: str) -> np.ndarray:
    """A picture of PICTURES, uint8 (HEIGHT, W, 3). FileNotFoundError if the installed package lacks it."""
    package, file = name.split("/")
    path = Path(str(files(package) / file))
    if not path.is_file():
        owner = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package.split(".")[0]]
        raise FileNotFoundError(
            f"{path} is missing: the installed {owner} has no such picture; install its newest wheel"
        )
    image = read_image(path)
    size = round(image.width * HEIGHT / image.height), HEIGHT
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def rows_of(name: str, part: str) -> tuple[int, int]:
    """First row of a class's training or validation crops, and the one after the last."""
    at_top, size = name in HELD_OUT_TOP, HEIGHT - QUARTER if part == "train" else QUARTER
    return (0, size) if at_top == (part == "val") else (HEIGHT - size, HEIGHT)


def draw_crop(picture: np.ndarray, rows: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A crop (SIZE, SIZE, 3) within these rows of a picture (HEIGHT, W, 3): of TRIES the one with the most contrast."""
    tops = rng.integers(rows[0], rows[1] - SIZE + 1, TRIES)
    lefts = rng.integers(picture.shape[1] - SIZE + 1, size=TRIES)
    crops = [picture[top : top + SIZE, left : left + SIZE] for top, left in zip(tops, lefts, strict=True)]
    return max(crops, key=np.std)


def write_image_folder(root: str | Path) -> dict[str, int]:
    """Write root/{train,val}/<class>/<number>.png, 64x64 RGB; returns the number of images of each part."""
    rng = np.random.default_rng(0)
    for name, sources in PICTURES.items():
        pictures = [read_picture(source) for source in sources]
        for part, count in CROPS.items():
            for number in range(count):
                crop = draw_crop(pictures[number % len(pictures)], rows_of(name, part), rng)
                atomic_write(Image.fromarray(crop), Path(root) / part / name / f"{number:04d}.png")
    return {part: count * len(PICTURES) for part, count in CROPS.items()}


def features(path: str | Path) -> np.ndarray:
    """An image file as the classifier sees it: colours and coarse edges, not where they are, (F,).

    Of the image box-averaged to 16x16: square roots of a joint colour histogram (4x4x4), mean and deviation of each
    channel, and at two resolutions the mean difference of neighbours in four directions.
    """
    small = read_image(path).resize((16, 16), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float64) / 255  # (16, 16, 3)
    bins = np.minimum((pixels * 4).astype(int), 3) @ (16, 4, 1)
    parts = [np.sqrt(np.bincount(bins.ravel(), minlength=64) / bins.size), pixels.mean((0, 1)), pixels.std((0, 1))]
    grey = pixels.mean(2)
    for _ in range(2):
        left, right, above, below = grey[:, :-1], grey[:, 1:], grey[:-1], grey[1:]
        edges = (right - left, below - above, below[:, 1:] - above[:, :-1], below[:, :-1] - above[:, 1:])
        parts.append([np.abs(edge).mean() for edge in edges])
        grey = grey.reshape(len(grey) // 2, 2, -1, 2).mean((1, 3))  # half the resolution
    return np.concatenate(parts)


PHOTOS = Demo(
    name="photos",
    folder="photos",
    pictures=("photos_samples.png", "photos_reconstruction.png", "photos_loss.png", "photos_rate_distortion.png"),
    write_images=write_image_folder,
    features=features,
    estimator=make_pipeline(StandardScaler(), SVC(C=10, decision_function_shape="ovo")),
    img_size=SIZE,
    vae="--vae_embed_dim 8 --width 8 --ch_mult 1,1,4,8 --norm_groups 1 --num_res_blocks 1 --no_attention"
    " --kl_weight 2e-6 --lr 1e-3 --batch_size 4",
    vae_launcher=TORCHRUN,
    quantizers="--bits 6 3 4 5 7 8 --range 5.0 2.0 3.0 4.0",
    sampling=dict(cfg=2.0, temperature=0.9, num_iter=16),
    sizes=dict(vae_steps=3000, steps=1600, samples=100, reconstructed=200),
    expected={
        "images": "93 %",
        "train VAE": "22.5 dB or more",
        "reconstruct": "6 bits within 0.2 dB of the VAE",
        "cache": "4000",
    },
)
