"""The demo on digits: scikit-learn's handwritten digits as an image folder, and a support vector machine."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from dataset.images import atomic_write, read_image
from demo.definition import Demo

SIZE = 32  # pixels; load_digits is 8x8
VAL_SHARE = 0.1


def split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train" | "val": (images (N, 8, 8) in [0, 16], labels (N,))}: the 1,797 digits in a fixed stratified split."""
    data = load_digits()
    options = dict(test_size=VAL_SHARE, stratify=data.target, random_state=0)
    train_x, val_x, train_y, val_y = train_test_split(data.images, data.target, **options)
    return {"train": (train_x, train_y), "val": (val_x, val_y)}


def write_image_folder(root: str | Path) -> dict[str, int]:
    """Write root/{train,val}/<digit>/<number>.png, 32x32 RGB, bicubic; returns the number of images of each part."""
    parts = split()
    for part, (images, labels) in parts.items():
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
            image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
            atomic_write(image, Path(root) / part / str(label) / f"{number:04d}.png")
    return {part: len(labels) for part, (_, labels) in parts.items()}


def features(path: str | Path) -> np.ndarray:
    """An image file as the classifier sees it: grey, box-averaged to 8x8, in [0, 16], (64,)."""
    small = read_image(path).convert("L").resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel() * (16 / 255)


DIGITS = Demo(
    name="digits",
    folder="",
    pictures=("samples.png", "reconstruction.png", "loss.png"),
    write_images=write_image_folder,
    features=features,
    estimator=SVC(gamma=0.001, C=10, decision_function_shape="ovo"),
    img_size=SIZE,
    vae="--vae_embed_dim 4 --width 32 --ch_mult 1,1,2,2 --num_res_blocks 1 --no_attention --kl_weight 1e-5 --lr 1e-3"
    " --batch_size 16",
    quantizers="--bits 6 --range 5.0",
    sampling=dict(cfg=2.0, temperature=0.7, num_iter=12),
    sizes=dict(vae_steps=800, steps=2200, samples=100, reconstructed=180),
    expected={"images": "99 %", "train VAE": "28 dB or more", "reconstruct": "97 % or more", "cache": "1617"},
)
